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
from typing import TYPE_CHECKING

from .errors import AsyncRouteError

if TYPE_CHECKING:
    from .runner import Runner

logger = logging.getLogger("flask_asyncroute")

INTERRUPT_SECONDS = 0.2
"""After the drain: from asking what still runs to stop until it is interrupted."""
GRACE_SECONDS = 0.6
"""After the drain: how long what still runs has to end."""

_runners: weakref.WeakSet[Runner] = weakref.WeakSet()


def at_exit(runner: Runner) -> None:
    """Have ``runner`` drained when this process exits."""
    _runners.add(runner)


def drain(runner: Runner, seconds: float) -> None:
    """Start nothing more, let what runs go on for ``seconds``, then settle the rest: Aborted or, as its route wants it,
    waiting again. Tasks that wait stay as they are, for other processes.

    Returns within ``seconds`` and a little over a second more, unless the store makes it wait.
    """
    runner.dispatcher.is_closing = True
    for executor in runner.executors:
        executor.discard_waiting()
    if not runner.dispatcher.wait_idle(seconds):
        runner.lifecycle.unwritten.retry(math.inf)
        _cut_short(runner)
    is_settled = True
    for execution, _ in list(runner.dispatcher.running.values()):
        try:
            runner.lifecycle.cut_short(execution, is_over=True)
        except AsyncRouteError as error:
            is_settled = False
            logger.error(
                "Task %s could not be settled at the exit; others will find it lost. (%s)", execution.task_id, error
            )
    if is_settled and runner.presence is not None:
        try:
            runner.presence.leave()
        except AsyncRouteError as error:
            logger.warning("This worker could not say that it leaves; others will find it gone. (%s)", error)


def _cut_short(runner: Runner) -> None:
    """Have what still runs end, and wait a moment for it."""
    for execution, _ in list(runner.dispatcher.running.values()):
        execution.is_shutting_down = True
        try:
            runner.lifecycle.cut_short(execution, is_over=False)
        except AsyncRouteError as error:
            logger.error("Task %s could not be aborted at the exit. (%s)", execution.task_id, error)
        execution.ask_to_stop(INTERRUPT_SECONDS)
    runner.dispatcher.wait_idle(GRACE_SECONDS)


def _at_exit() -> None:
    """Drain all runners of this process at once: each has its own time, and the exit waits for the longest."""
    runners = list(_runners)
    began = time.monotonic()
    for runner in runners:
        runner.dispatcher.is_closing = True
    for runner in runners:
        try:
            drain(runner, max(runner.config.drain - (time.monotonic() - began), 0.0))
        except Exception:
            logger.exception("The tasks of this process could not be drained; others will find them lost.")


def _after_fork() -> None:
    _runners.clear()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
