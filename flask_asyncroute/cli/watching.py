"""``watch``: show the progress of a task until it ends. Also for ``submit --wait``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import click

from ..errors import StoreUnavailable
from ..task import AsyncRouteTask, State, now_us
from ..workers.runner import Runner
from .base import FAILED, INTERRUPTED, fail, find, not_found, open_runner
from .reading import MOST_IN_FIELD, duration, json_option, percent
from .text import console, echo_json, escape, preview

OUTAGE_SECONDS = 30.0  # how long an outage of the store may last while a task is watched
RETRY_SECONDS = 0.5
CHECK_SECONDS = 5.0  # how long a wait lasts until the store is read, which shows an outage


@click.command()
@click.argument("task_id", metavar="ID")
@json_option
def watch(task_id: str, as_json: bool) -> None:
    """Show the progress of a task until it ends.

    On a terminal, a progress bar is shown, else a line for each change. With --json, the task is
    printed after each change. Ctrl-C ends the command, but not the task.

    The exit code is 0 if the task is Completed, and 1 if it is Failed or Aborted.

    \b
    Example:
      flask asyncroute watch 6f1c1c5e-90c1-4e3b-a1b1-9b8f7d2c3e4a
    """
    runner = open_runner()
    task = find(runner, task_id)
    with interruptible(task_id):
        if not as_json:
            follow(runner, task, prints_changes=True)
            return
        for changed in changes(runner, task):
            echo_json(changed.to_wire())
            if changed.is_completed and changed.state is not State.COMPLETED:
                raise click.exceptions.Exit(FAILED)


def follow(runner: Runner, task: AsyncRouteTask, prints_changes: bool) -> None:
    """Wait until a task has ended, and print how. On a terminal, show a progress bar.

    :param prints_changes: whether to print a line for each change if there is no terminal.
    :raises click.ClickException: with the exit code 1 if the task is not Completed.
    """
    terminal = console()
    show: AbstractContextManager[Callable[[AsyncRouteTask], None]] = nullcontext(
        _LinePrinter().show if prints_changes else _show_nothing
    )
    if terminal is not None:
        from .progress import progress_bar

        show = progress_bar(terminal)
    with show as show_change:
        for changed in changes(runner, task):
            show_change(changed)
            task = changed
    _print_end(task)


def _print_end(task: AsyncRouteTask) -> None:
    took = duration(task, now_us())
    if task.state is not State.COMPLETED:
        raise fail(f"Task {task.id} is {task.state} ({took}): {task.error}", FAILED)
    click.echo(f"Task {task.id} is {task.state} ({took}).")
    if task.result_json is not None:
        click.echo(f"Result: {escape(preview(task.result_json, MOST_IN_FIELD))}")


def changes(runner: Runner, task: AsyncRouteTask) -> Iterator[AsyncRouteTask]:
    """Yield a task now and after each change, until it has ended.

    During a short outage of the store, try again.

    :raises click.ClickException: if the task is removed.
    """
    yield task
    failed_at: float | None = None
    while not task.is_completed:
        try:
            found = runner.notifier.wait(task.id, partial(_is_newer, task), CHECK_SECONDS)
        except StoreUnavailable:
            now = time.monotonic()
            failed_at = now if failed_at is None else failed_at
            if now - failed_at > OUTAGE_SECONDS:
                raise
            time.sleep(RETRY_SECONDS)
            continue
        failed_at = None
        if found is None:
            raise not_found(runner, task.id)
        if _is_newer(task, found):
            task = found
            yield task


@contextmanager
def interruptible(task_id: str) -> Iterator[None]:
    """After Ctrl-C within the block, end the command with a message."""
    try:
        yield
    except KeyboardInterrupt:
        raise fail(
            f"Stopped watching. Task {task_id} continues. To watch it again, run: flask asyncroute "
            f"watch {task_id}",
            INTERRUPTED,
        ) from None


def _is_newer(known: AsyncRouteTask, found: AsyncRouteTask) -> bool:
    return found.revision != known.revision


class _LinePrinter:
    """Prints a line for each visible change of a task that has not ended."""

    def __init__(self) -> None:
        self._printed = ""

    def show(self, task: AsyncRouteTask) -> None:
        parts: list[str] = [task.state]
        if task.progress is not None:
            parts.append(f"{percent(task)} %")
        if task.progress_message is not None:
            parts.append(escape(task.progress_message))
        line = " ".join(parts)
        if line != self._printed and not task.is_completed:
            click.echo(f"{time.strftime('%H:%M:%S')} {line}")
            self._printed = line


def _show_nothing(task: AsyncRouteTask) -> None:
    pass
