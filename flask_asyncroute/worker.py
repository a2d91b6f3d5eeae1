"""Runs one task: claim, rebuild the request, call the view, write the outcome. Executors reach it by import string.

Whatever the view does, :func:`run` returns, and the task has an outcome.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from flask import got_request_exception
from werkzeug.exceptions import HTTPException

from . import context, snapshot
from .dispatcher import TIMED_OUT
from .encoding import encode_result
from .errors import AsyncRouteError, ConfigurationError, ResultError, TaskAborted
from .execution import Execution
from .executors import interruption
from .executors.base import TaskExecutor
from .lifecycle import LOST, SHUT_DOWN
from .outcome import Outcome, failed
from .registry import Route
from .runner import Runner
from .runtime import json_default
from .states import State
from .stores.base import Claim
from .task import now_us
from .typing import View

logger = logging.getLogger("flask_asyncroute")


def run(runner: Runner, executor: TaskExecutor, task_id: str) -> None:
    """Run a waiting task to its end, on this thread; does nothing where somebody else has it. Never raises an Exception."""
    try:
        _run(runner, executor, task_id)
    except TaskAborted:
        # It was raised for the view and arrived after it; the outcome is written already or will be found missing.
        logger.warning("The interruption of task %s came after its end.", task_id)
    except Exception as error:
        logger.error("Task %s could not be run: %s", task_id, error, exc_info=not isinstance(error, AsyncRouteError))
        if executor.is_bound:
            runner.lifecycle.forsake(task_id, LOST)


def _run(runner: Runner, executor: TaskExecutor, task_id: str) -> None:
    execution = Execution(task_id, executor.interrupt_after, runner.wake)
    if not runner.dispatcher.begin(execution, executor):
        return
    is_settled = False
    try:
        runner.notifier.watch()
        try:
            if runner.dispatcher.is_closing:
                # It goes on waiting for another process, if there can be one.
                if executor.is_bound:
                    runner.lifecycle.forsake(task_id, SHUT_DOWN)
                return
            runner.enter()
            claim = runner.lifecycle.claim(task_id)
            if claim is None:
                return
            task = claim.task
            seconds = None if task.timeout_us is None else task.timeout_us / 1_000_000
            execution.begin(task.user, task.epoch, seconds, task.on_loss == "restart")
            runner.wake()
            pid = os.getpid()
            try:
                outcome = _carry_out(runner, executor, claim, execution)
            finally:
                if os.getpid() != pid:
                    _end_copy(task_id)
                interruption.leave(execution)
                execution.end()
            if execution.is_expired:
                # That may not be stored yet, and then this is what is.
                outcome = Outcome(State.ABORTED, {"error": TIMED_OUT})
            values = {"completed_us": now_us(), **outcome.values}
            write: Callable[[], object] = partial(runner.lifecycle.finish, execution, outcome.state, values)
            if execution.is_shutting_down and not execution.is_expired:
                # Whatever the view made of being asked to stop, a part of a result included: it is the shutdown that ended it.
                write = partial(runner.lifecycle.cut_short, execution, is_over=True)
            # It counts as running here until its outcome is stored, whenever that is.
            runner.lifecycle.unwritten.write(task_id, write, partial(runner.dispatcher.end, execution))
            is_settled = True
        finally:
            runner.notifier.unwatch()
    finally:
        if not is_settled:
            runner.dispatcher.end(execution)


def _end_copy(task_id: str) -> None:
    """End a copy of this process that the view has forked and let return: the task, the connections and the server's
    sockets are the other's.
    """
    logger.error(
        "The view of task %s forked, and the copy returned from it. The copy ends here; use os._exit() there.", task_id
    )
    os._exit(1)


def _carry_out(runner: Runner, executor: TaskExecutor, claim: Claim, execution: Execution) -> Outcome:
    """Have a claimed task run, in another process where the executor has one; return how that ended."""
    body = None
    try:
        if claim.task.body_size:
            body = runner.store.body(claim.task.id)
        outcome = executor.hand_over(claim, body, execution)
        return execute(runner, claim.task.endpoint, claim.request, body, execution) if outcome is None else outcome
    except BaseException as error:
        return failed(error, runner.config.expose_errors)
    finally:
        if body is not None:
            body.close()


def execute(runner: Runner, endpoint: str, request: bytes, body: snapshot.Body | None, execution: Execution) -> Outcome:
    """Call a view in its rebuilt request; return how that ended. The same in a thread and in a child.

    :param request: see :func:`snapshot.encode`.
    :param body: a large one; small ones are in ``request``.
    """
    app = runner.app
    try:
        route = runner.routes.get(endpoint)
        if route is None:
            raise ConfigurationError(
                f"The app that ASYNCROUTE_APP names ({runner.config.app}) has no async route with the endpoint {endpoint!r}."
            )
        captured = snapshot.decode(request)
        if captured.body is not None:
            body = snapshot.Body([captured.body])
        with context.running(execution, json_default(app)), context.rebuilt(app, captured, body) as arguments:
            try:
                context.process_url(arguments)
                for prepare in runner.before_task:
                    prepare()
                execution.check()
                result = _call(route, {**route.options.arguments, **arguments}, execution)
                if execution.is_time_up:
                    raise TaskAborted("The view returned after its time was up.")
                if result is None:
                    return Outcome(State.COMPLETED)
                return Outcome(
                    State.COMPLETED, {"result_json": encode_result(result, json_default(app), runner.config.max_result)}
                )
            except (HTTPException, TaskAborted):
                raise
            except ResultError as error:
                app.logger.error(
                    "The result of task %s cannot be stored: %s",
                    execution.task_id, error, extra={"task_id": execution.task_id},
                )  # fmt: skip
                raise
            except BaseException as error:
                _make_known(runner, error, execution.task_id)
                raise
    except BaseException as error:
        if execution.is_time_up and not execution.stop.is_set():
            # Nobody has noticed yet; the view may have, by the clock, and whatever it raises then is its way to end.
            return Outcome(State.ABORTED, {"error": TIMED_OUT})
        return failed(error, runner.config.expose_errors)


def _call(route: Route, arguments: dict[str, Any], execution: Execution) -> Any:
    if inspect.iscoroutinefunction(route.view):
        return _await(route.view, arguments, execution)
    result = interruption.call(route.view, arguments, execution)
    if inspect.iscoroutine(result):
        return _await(lambda: result, {}, execution)
    return result


def _await(view: View, arguments: dict[str, Any], execution: Execution) -> Any:
    """Run a coroutine to its end on an event loop of its own; a stop cancels it at once."""

    async def main() -> Any:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        execution.cancel_with(lambda: loop.call_soon_threadsafe(task.cancel))
        try:
            return await view(**arguments)
        finally:
            execution.cancel_with(None)

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        execution.check()
        raise


def _make_known(runner: Runner, error: BaseException, task_id: str) -> None:
    """Log what a view raised and send Flask's signal, whatever hears of it does."""
    app = runner.app
    try:
        app.logger.exception("The view of task %s raised.", task_id, extra={"task_id": task_id})
        got_request_exception.send(app, _async_wrapper=app.ensure_sync, exception=error)
    except Exception:
        logger.exception("What hears of errors raised over that of task %s.", task_id)
