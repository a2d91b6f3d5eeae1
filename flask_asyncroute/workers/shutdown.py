"""Shut down gracefully: end the tasks of this process in time when the server stops it.

A runner holds the threads and the store of one app in this process. ``ASYNCROUTE_DRAIN`` is the
time that running tasks have after the shutdown has begun.
"""

# Servers run exit hooks only after open requests have ended. So this module ends waits and streams
# earlier: when gunicorn or uvicorn receives a signal, or else before Python joins threads.

from __future__ import annotations

import _thread
import atexit

# Import these first, so that our exit hooks run before theirs, which join threads and child
# processes: hooks run in reverse order.
import concurrent.futures.thread  # noqa: F401
import logging
import math
import multiprocessing
import multiprocessing.util  # noqa: F401
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

from ..engine.lifecycle import SHUT_DOWN
from ..errors import AsyncRouteError
from ..executors.execution import Execution
from ..task import State
from .recovery import FAR_FUTURE_US
from .runner import Runner

logger = logging.getLogger("flask_asyncroute")

INTERRUPT_SECONDS = 0.2  # from asking a run to stop to interrupting it
GRACE_SECONDS = 0.6  # for the remaining runs to stop after being asked
RECORD_SECONDS = 0.8  # then, for recording the remaining outcomes
MOST_RETRIES = 1000  # retries of an endpoint to abort; other workers recover the rest
MOST_NAMED = 20  # task ids in the log message about the exit

_SIGNALS = [
    number
    for name in ("SIGTERM", "SIGINT", "SIGQUIT", "SIGABRT")
    if (number := getattr(signal, name, None)) is not None
]
# They are remembered because a server is found through its signal handlers, which `_chained`
# replaces and uvicorn uninstalls.
_servers: list[weakref.ref[Any]] = []
"""The gunicorn workers and uvicorn servers that were found in this process."""
runners: weakref.WeakSet[Runner] = weakref.WeakSet()  # to shut down when this process exits
_began_at: float | None = None  # when the shutdown was first noticed (monotonic)


def is_server_ending() -> bool:
    """Check whether gunicorn or uvicorn is stopping this process.

    The time limit ``ASYNCROUTE_DRAIN`` begins when this function first returns True.
    """
    # gunicorn stops a process after a signal or after `max_requests`.
    is_ending = any(
        not getattr(server, "alive", True) or getattr(server, "should_exit", False)
        for server in _known_servers()
    )
    if is_ending:
        _note_time()
    return is_ending


def restart_gunicorn_timeout() -> float:
    """Restart the timeout after which gunicorn kills a busy sync worker.

    :return: the timeout in seconds; infinity under other servers.
    """
    for server in _known_servers():
        settings = getattr(server, "cfg", None)
        if settings is not None and settings.timeout:
            server.notify()  # half of the timeout can have passed before the request began
            return float(settings.timeout)
    return math.inf


def _known_servers() -> list[Any]:
    # A server is found if a signal handler of this process is its method.
    for number in _SIGNALS:
        server = getattr(signal.getsignal(number), "__self__", None)
        is_server = hasattr(server, "alive") or hasattr(server, "should_exit")
        if is_server and not any(known() is server for known in _servers):
            _servers.append(weakref.ref(server))
    return [server for known in _servers if (server := known()) is not None]


def notice(then: Callable[[], None]) -> None:
    """Call ``then`` on a new thread when the server receives a signal to exit.

    Call this on the main thread, after the server has installed its signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        logger.warning(
            "async_routes.start() was not called in the main thread, so this process cannot detect "
            "the signal to exit: open waits and streams may delay its exit. Call start() in the "
            "main thread."
        )
        return
    if "uvicorn" in sys.modules and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        logger.warning(
            "uvicorn does not run exit hooks after SIGTERM, so running tasks are not shut down "
            "gracefully. Call signal.signal(signal.SIGTERM, signal.default_int_handler) before "
            "async_routes.start()."
        )
    servers = _known_servers()
    handled: list[Callable[..., Any]] = []
    for number in _SIGNALS:
        handler = signal.getsignal(number)
        # Servers that exit on KeyboardInterrupt, such as waitress and cheroot, would first wait for
        # open requests; so replace their handler, too.
        is_interrupt = handler is signal.default_int_handler
        if callable(handler) and (is_interrupt or getattr(handler, "__self__", None) in servers):
            signal.signal(number, _chained(handler, then, handled))


def _chained(
    handler: Callable[[int, FrameType | None], Any],
    then: Callable[[], None],
    handled: list[Callable[..., Any]],
) -> Callable[..., Any]:
    """Return a signal handler that starts ``then`` on a new thread and then calls ``handler``.

    :param handled: the handlers that must not be called again.
    """
    # A gunicorn worker's handler is called only once. Ctrl-C sends the worker SIGINT from the
    # terminal and SIGQUIT from the arbiter: a second call would wait for a lock that the first
    # holds, or end the graceful shutdown. uvicorn's handler is called each time: a second Ctrl-C
    # makes uvicorn end open requests.
    server = getattr(handler, "__self__", None)
    # uvicorn runs exit hooks after SIGINT, but not after SIGTERM. So pass it SIGINT.
    is_uvicorn = hasattr(server, "should_exit")

    def handle(number: int, frame: FrameType | None) -> Any:
        if handler in handled:
            return None
        if hasattr(server, "alive"):
            handled.append(handler)
        # The interrupted main thread can hold any lock, and starting a threading.Thread would take
        # one. If no thread can be started, continue.
        with suppress(RuntimeError):
            _thread.start_new_thread(then, ())
        return handler(signal.SIGINT if is_uvicorn else number, frame)

    return handle


def shut_down(seconds: Mapping[Runner, float]) -> int:
    """Start no more tasks. Give running tasks time to end, then abort or requeue them.

    Tasks that have not started stay in the store for other processes. This function returns at most
    1.5 seconds after the longest time limit.

    :param seconds: how long the running tasks of each runner can continue.
    :return: the number of tasks that did not end in time.
    """
    # The runners shut down concurrently. Only maintenance threads wait for stores.
    began = time.monotonic()
    running = sum(len(runner.dispatcher.running) for runner in seconds)
    if running:
        with suppress(Exception):  # a log filter or handler of the app failed
            logger.info(
                "This process exits; it waits up to %.1f s for %d running tasks.",
                max(seconds.values()), running,
            )  # fmt: skip
    for runner in seconds:
        runner.dispatcher.is_closing = True
        runner.sender.is_closing = True
    waiting = {
        runner: [task_id for executor in runner.executors for task_id in executor.discard_waiting()]
        for runner in seconds
    }
    late = [runner for runner in seconds if not _is_idle_by(runner, began + seconds[runner])]
    cut: list[str] = []
    for runner in late:
        for execution in _unfinished(runner):
            cut.append(execution.task_id)
            execution.is_shutting_down = True
            try:
                execution.ask_to_stop(INTERRUPT_SECONDS)
            except Exception:
                # The app's cancel function failed. Continue, to stop the other runs.
                logger.exception("Task %s could not be asked to stop.", execution.task_id)
        runner.maintenance.call(partial(_abort, runner))
    deadline = time.monotonic() + GRACE_SECONDS
    for runner in late:
        _is_idle_by(runner, deadline)
    recorded = [
        runner.maintenance.call(partial(_record, runner, waiting[runner])) for runner in seconds
    ]
    queued = sum(map(len, waiting.values()))
    if running or queued:
        with suppress(Exception):
            logger.info(
                "At the exit of this process %d tasks had ended, %d were aborted or requeued (%s), "
                "and %d had not started.",
                max(running - len(cut), 0), len(cut), ", ".join(cut[:MOST_NAMED]) or "none", queued,
            )  # fmt: skip
    deadline = time.monotonic() + RECORD_SECONDS
    if not all([event.wait(max(deadline - time.monotonic(), 0.0)) for event in recorded]):
        logger.error(
            "The store did not respond in time during the shutdown; other workers will recover the "
            "remaining tasks."
        )
    return len(cut)


def _is_idle_by(runner: Runner, deadline: float) -> bool:
    return runner.dispatcher.wait_idle(max(deadline - time.monotonic(), 0.0))


def _unfinished(runner: Runner) -> list[Execution]:
    runs = list(runner.dispatcher.running.values())
    return [execution for execution, _ in runs if not execution.is_over]


def _abort(runner: Runner) -> None:
    with suppress(Exception):  # because `_record` tries again
        for execution in _unfinished(runner):
            runner.lifecycle.cut_short(execution, is_over=False)


def _record(runner: Runner, waiting: list[str]) -> None:
    """Record the missing outcomes. Abort the waiting tasks that no other process can run.

    :param waiting: the ids of tasks that have not started.
    """
    try:
        runner.lifecycle.pending_writes.retry(math.inf)
        for execution in _unfinished(runner):
            runner.lifecycle.cut_short(execution, is_over=True)
        for task in map(runner.store.get, [*waiting, *_bound_retries(runner)]):
            if task and task.state is State.NOT_STARTED and task.owner == runner.lifecycle.owner:
                runner.lifecycle.abort(task, SHUT_DOWN)
        if runner.heartbeat is not None and runner.lifecycle.pending_writes.is_empty:
            runner.heartbeat.leave()
    except Exception as error:
        logger.error(
            "Some outcomes could not be recorded during the shutdown; other workers will recover "
            "these tasks. (%s)",
            error, exc_info=not isinstance(error, AsyncRouteError),
        )  # fmt: skip


def _bound_retries(runner: Runner) -> list[str]:
    """Return the ids of tasks that wait in no queue for their start time, and that only this
    process can run.
    """
    limits = {name: MOST_RETRIES for name, route in runner.routes.items() if route.options.is_bound}
    if not limits:
        return []
    owner = runner.lifecycle.owner
    return [task.id for task in runner.store.waiting(limits, 0, FAR_FUTURE_US, owner)]


def end_waits() -> None:
    """End all waits and streams of this process. Tasks can still start and run."""
    _note_time()
    for runner in list(runners):
        runner.notifier.end_waits()


def _note_time() -> None:
    global _began_at
    if _began_at is None:
        _began_at = time.monotonic()


def _at_exit() -> None:
    # The time ASYNCROUTE_DRAIN began when the shutdown was first noticed.
    end_waits()
    spent = 0.0 if _began_at is None else time.monotonic() - _began_at
    try:
        shut_down({runner: max(runner.config.drain - spent, 0.0) for runner in list(runners)})
    except Exception:
        logger.exception(
            "The graceful shutdown of this process failed; other workers will recover its tasks."
        )
    runners.clear()


def _before_joins() -> None:
    # Servers can handle waits and streams on threads that Python joins before it runs exit hooks.
    end_waits()
    if multiprocessing.parent_process() is not None:
        _at_exit()  # processes forked by multiprocessing (as in Granian) run no exit hooks


def _after_fork() -> None:
    global _began_at
    _began_at = None
    runners.clear()


atexit.register(_at_exit)
# `threading._register_atexit` is private, but runs before Python joins threads. Otherwise, an open
# stream on such a thread would delay the exit for minutes.
_register_before_joins = getattr(threading, "_register_atexit", None)
if _register_before_joins is not None:
    _register_before_joins(_before_joins)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
