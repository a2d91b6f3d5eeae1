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


def drain(runner: Runner, seconds: float) -> None:
    """Start nothing more, let what runs go on for ``seconds``, then settle the rest: Aborted or, as its route wants it,
    waiting again. Tasks that wait stay as they are, for other processes.

    Returns within ``seconds`` and 1.5 more, whatever the store does: it is the housekeeper that waits for that.
    """
    runner.dispatcher.is_closing = True
    runner.sender.is_closing = True
    waiting = [task_id for executor in runner.executors for task_id in executor.discard_waiting()]
    if not runner.dispatcher.wait_idle(seconds):
        for execution in _unended(runner):
            execution.is_shutting_down = True
            execution.ask_to_stop(INTERRUPT_SECONDS)
        runner.housekeeper.call(partial(_abort, runner))
        runner.dispatcher.wait_idle(GRACE_SECONDS)
    if not runner.housekeeper.call(partial(_settle, runner, waiting)).wait(SETTLE_SECONDS):
        logger.error("The store did not answer in time at the exit; what is not settled others will find lost.")


def _unended(runner: Runner) -> list[Execution]:
    """Return the runs whose code has not ended. What the others' outcome is, is known, and waits for the store at most."""
    return [execution for execution, _ in list(runner.dispatcher.running.values()) if not execution.is_over]


def _abort(runner: Runner) -> None:
    """Abort what is not to be run again; where the store is away, it is tried again at the end."""
    with suppress(AsyncRouteError):
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
    except AsyncRouteError as error:
        logger.error("Not all tasks could be settled at the exit; others will find them lost. (%s)", error)


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
    runners = list(_runners)
    end_waits()
    began = time.monotonic() if _began_at is None else _began_at
    for runner in runners:
        runner.dispatcher.is_closing = True
    for runner in runners:
        try:
            drain(runner, max(runner.config.drain - (time.monotonic() - began), 0.0))
        except Exception:
            logger.exception("The tasks of this process could not be drained; others will find them lost.")


def _after_fork() -> None:
    global _began_at
    _began_at = None
    _runners.clear()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
