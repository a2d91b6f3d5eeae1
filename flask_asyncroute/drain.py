"""The way out: what a process does with the tasks that it runs when the interpreter exits.

`runner` asks for it. It runs as an `atexit` hook, so a server that is killed, or ends without one, never comes here; what
it ran is then found by the other workers.
"""

from __future__ import annotations

import atexit
import logging
import math

# Its own hook ends child processes. Hooks run in the reverse order, so it must be registered before the one here.
import multiprocessing.util  # noqa: F401
import os
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from . import termination
from .errors import AsyncRouteError
from .lifecycle import SHUT_DOWN
from .states import State

if TYPE_CHECKING:
    from .execution import Execution
    from .runner import Runner

logger = logging.getLogger("flask_asyncroute")

INTERRUPT_SECONDS = 0.2
"""After the drain: from asking what still runs to stop until it is interrupted."""
GRACE_SECONDS = 0.6
"""After the drain: how long what still runs has to end."""
SETTLE_SECONDS = 0.8
"""After that: how long the store has to take what is left."""

_runners: weakref.WeakSet[Runner] = weakref.WeakSet()
_began_at: float | None = None
"""When this process was told that it is to end."""


def at_exit(runner: Runner) -> None:
    """Have ``runner`` drained when this process exits."""
    _runners.add(runner)


def forget(runner: Runner) -> None:
    """Leave ``runner`` alone when this process exits: it was closed."""
    _runners.discard(runner)


def drain(seconds: Mapping[Runner, float]) -> None:
    """Start nothing more, let what runs go on for a time, then settle the rest: Aborted or, as its route wants it, waiting
    again. Tasks that wait stay as they are, for other processes.

    All runners at once: it returns within the longest time and 1.5 seconds more, however many there are and whatever their
    stores do, since it is the housekeepers that wait for those.

    :param seconds: for which the runs of each runner may go on.
    """
    began = time.monotonic()
    runners = list(seconds)
    waiting: dict[Runner, list[str]] = {}
    for runner in runners:
        runner.dispatcher.is_closing = True
        runner.sender.is_closing = True
    for runner in runners:
        waiting[runner] = [task_id for executor in runner.executors for task_id in executor.discard_waiting()]
    late = [runner for runner in runners if not _is_idle_by(runner, began + seconds[runner])]
    for runner in late:
        for execution in _unended(runner):
            execution.is_shutting_down = True
            _ask_to_stop(execution)
        runner.housekeeper.call(partial(_abort, runner))
    deadline = time.monotonic() + GRACE_SECONDS
    for runner in late:
        _is_idle_by(runner, deadline)
    settled = [runner.housekeeper.call(partial(_settle, runner, waiting[runner])) for runner in runners]
    deadline = time.monotonic() + SETTLE_SECONDS
    if not all([event.wait(max(deadline - time.monotonic(), 0.0)) for event in settled]):
        logger.error("The store did not answer in time at the exit; what is not settled others will find lost.")


def _is_idle_by(runner: Runner, deadline: float) -> bool:
    """Wait until nothing runs any more; return whether that was so before the deadline."""
    return runner.dispatcher.wait_idle(max(deadline - time.monotonic(), 0.0))


def _unended(runner: Runner) -> list[Execution]:
    """Return the runs whose code has not ended. What the others' outcome is, is known, and waits for the store at most."""
    return [execution for execution, _ in list(runner.dispatcher.running.values()) if not execution.is_over]


def _ask_to_stop(execution: Execution) -> None:
    try:
        execution.ask_to_stop(INTERRUPT_SECONDS)
    except Exception:
        # What cancels it may fail; nothing else that runs here must miss its end for that.
        logger.exception("Task %s could not be asked to stop.", execution.task_id)


def _abort(runner: Runner) -> None:
    """Abort what is not to be run again; where that fails, as without the store, it is tried again at the end."""
    with suppress(Exception):
        for execution in _unended(runner):
            runner.lifecycle.cut_short(execution, is_over=False)


def _settle(runner: Runner, waiting: list[str]) -> None:
    """Write what is left to be written, the last of it that nothing runs here any more.

    :param waiting: what this process would have run next. Other processes do, but for what only this one can.
    """
    try:
        runner.lifecycle.unwritten.retry(math.inf)
        for execution in _unended(runner):
            runner.lifecycle.cut_short(execution, is_over=True)
        for task in map(runner.store.get, waiting):
            if task is not None and task.state is State.NOT_STARTED and task.owner == runner.lifecycle.owner:
                runner.lifecycle.abort(task, SHUT_DOWN)
        if runner.presence is not None and runner.lifecycle.unwritten.is_empty:
            runner.presence.leave()
    except Exception as error:
        # Of this one: the process may have other runners.
        known = isinstance(error, AsyncRouteError)
        logger.error(
            "Not all tasks could be settled at the exit; others will find them lost. (%s)", error, exc_info=not known
        )


def end_waits() -> None:
    """Have all who wait for news of tasks in this process come to their end, so that they do not hold up its exit.

    Tasks are started and run as before: requests that the server has taken in already are not to fail.
    """
    _note_time()
    for runner in list(_runners):
        runner.notifier.end_waits()


def is_near() -> bool:
    """Return whether the server has decided to end this process; the time that tasks have counts from then on."""
    if not termination.is_near():
        return False
    _note_time()
    return True


def _note_time() -> None:
    global _began_at
    if _began_at is None:
        _began_at = time.monotonic()


def _at_exit() -> None:
    """Drain all runners of this process at once: each has its own time, and the exit waits for the longest.

    The time counts from when the exit was known: a server may have taken seconds since, to part from its clients.
    """
    end_waits()
    spent = 0.0 if _began_at is None else time.monotonic() - _began_at
    try:
        drain({runner: max(runner.config.drain - spent, 0.0) for runner in list(_runners)})
    except Exception:
        logger.exception("The tasks of this process could not be drained; others will find them lost.")


def _after_fork() -> None:
    global _began_at
    _began_at = None
    _runners.clear()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
