"""A progress bar on a terminal, with rich. Imported only if rich is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
)
from rich.text import Text

from ..task import AsyncRouteTask, State, now_us
from .reading import duration
from .text import escape

Show: TypeAlias = "Callable[[AsyncRouteTask], None]"


@contextmanager
def progress_bar(console: Console) -> Iterator[Show]:
    """Show a progress bar within the block. Yield the function that updates it."""
    columns = (
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.fields[state]}", style="bold", markup=False),
        BarColumn(),
        TextColumn("{task.fields[percent]}", markup=False),
        _TookColumn(),
        TextColumn("{task.fields[message]}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=None, record=None, state="", percent="", message="")
        yield lambda task: progress.update(bar, **_fields(task))


class _TookColumn(ProgressColumn):
    """The duration of the task, which began before the bar is shown."""

    def render(self, bar: Task) -> Text:
        record = bar.fields["record"]
        return Text("" if record is None else duration(record, now_us()))


def _fields(task: AsyncRouteTask) -> dict[str, Any]:
    is_known = task.progress is not None or task.is_completed
    return {
        "description": escape(task.async_route_id),
        "total": 100 if is_known else None,
        "completed": 100 if task.state is State.COMPLETED else task.progress or 0,
        "record": task,
        "state": task.state.value,
        "percent": "" if task.progress is None else f"{task.progress:.0f} %",
        "message": escape(task.progress_message or ""),
    }
