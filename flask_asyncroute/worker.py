"""Runs one task: claim, rebuild the request, call the view, write the outcome. Executors reach it by import string.

Whatever the view does, :func:`run` returns, and the task has an outcome.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flask import got_request_exception
from werkzeug.exceptions import HTTPException
from werkzeug.http import HTTP_STATUS_CODES

from . import context, snapshot
from .dispatcher import TIMED_OUT
from .encoding import clean_text, encode_result
from .errors import AsyncRouteError, ResultError, TaskAborted
from .execution import Execution
from .executors import interruption
from .executors.base import TaskExecutor
from .registry import Route
from .runner import Runner
from .runtime import json_default
from .states import State
from .stores.base import Claim
from .task import MAX_ERROR, now_us
from .typing import View

logger = logging.getLogger("flask_asyncroute")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: the state to go to and the record fields that go with it."""

    state: State
    values: dict[str, Any] = field(default_factory=dict)


def run(runner: Runner, executor: TaskExecutor, task_id: str) -> None:
    """Run a waiting task to its end, on this thread; does nothing where somebody else has it. Never raises an Exception."""
    try:
        _run(runner, executor, task_id)
    except TaskAborted:
        # It was raised for the view and arrived after it; the outcome is written already or will be found missing.
        logger.warning("The interruption of task %s came after its end.", task_id)
    except AsyncRouteError as error:
        logger.error("Task %s could not be run: %s", task_id, error)
    except Exception:
        logger.exception("Task %s could not be run.", task_id)


def _run(runner: Runner, executor: TaskExecutor, task_id: str) -> None:
    execution = Execution(task_id, executor.interrupt_after, runner.housekeeper.wake)
    runner.dispatcher.begin(execution, executor)
    is_settled = False
    try:
        runner.notifier.watch()
        try:
            runner.enter()
            claim = runner.lifecycle.claim(task_id)
            if claim is None:
                return
            task = claim.task
            seconds = None if task.timeout_us is None else task.timeout_us / 1_000_000
            execution.begin(task.user, task.epoch, seconds, task.on_loss == "restart")
            runner.housekeeper.wake()
            try:
                outcome = execute(runner, runner.routes[task.endpoint], claim, execution)
            finally:
                interruption.leave(execution)
                execution.end()
            write: Callable[[], object] = partial(runner.lifecycle.cut_short, execution, is_over=True)
            if execution.is_expired:
                # That may not be stored yet, and then this is what is.
                outcome = Outcome(State.ABORTED, {"error": TIMED_OUT})
            if outcome is not None:
                values = {"completed_us": now_us(), **outcome.values}
                write = partial(runner.lifecycle.finish, execution, outcome.state, values)
            # It counts as running here until its outcome is stored, whenever that is.
            is_settled = True
            runner.lifecycle.unwritten.write(task_id, write, partial(runner.dispatcher.end, execution))
        finally:
            runner.notifier.unwatch()
    finally:
        if not is_settled:
            runner.dispatcher.end(execution)


def execute(runner: Runner, route: Route, claim: Claim, execution: Execution) -> Outcome | None:
    """Call the view of a claimed task in its rebuilt request; return how that ended, None where the shutdown ended it."""
    app = runner.app
    body = None
    try:
        captured = snapshot.decode(claim.request)
        if claim.task.body_size:
            body = runner.store.body(claim.task.id)
        elif captured.body is not None:
            body = snapshot.Body([captured.body])
        with context.running(execution), context.rebuilt(app, captured, body) as arguments:
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
    except TaskAborted as error:
        if execution.is_time_up and not execution.stop.is_set():
            return Outcome(State.ABORTED, {"error": TIMED_OUT})
        if execution.is_shutting_down:
            return None
        return _failed(error, runner.config.expose_errors)
    except BaseException as error:
        return _failed(error, runner.config.expose_errors)
    finally:
        if body is not None:
            body.close()


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
        execution.run_coroutine(lambda: loop.call_soon_threadsafe(task.cancel))
        try:
            return await view(**arguments)
        finally:
            execution.run_coroutine(None)

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        execution.check()
        raise


def _failed(error: BaseException, expose: bool) -> Outcome:
    name = type(error).__name__
    if isinstance(error, HTTPException):
        code = error.code
        # What abort() makes of a response has no code and name of its own.
        status = getattr(getattr(error, "response", None), "status_code", None) if code is None else None
        phrase = HTTP_STATUS_CODES.get(status) if status is not None else None
        text = _told(
            lambda: f"{code or status or 500} {phrase or error.name}: {error.description or ''}".rstrip(": "), name
        )
        return Outcome(State.FAILED, {"error": clean_text(text, MAX_ERROR), "error_status": code or status})
    if not expose:
        return Outcome(State.FAILED, {"error": clean_text(name, MAX_ERROR)})
    message = _told(lambda: str(error)[:MAX_ERROR], "(its message could not be read)")
    return Outcome(State.FAILED, {"error": clean_text(f"{name}: {message}" if message else name, MAX_ERROR)})


def _told(tell: Callable[[], str], otherwise: str) -> str:
    """Return what an exception says of itself; it is the app's own code that says it, and may raise anything."""
    try:
        return tell()
    except BaseException:
        return otherwise


def _make_known(runner: Runner, error: BaseException, task_id: str) -> None:
    """Log what a view raised and send Flask's signal, whatever hears of it does."""
    app = runner.app
    try:
        app.logger.exception("The view of task %s raised.", task_id, extra={"task_id": task_id})
        got_request_exception.send(app, _async_wrapper=app.ensure_sync, exception=error)
    except Exception:
        logger.exception("What hears of errors raised over that of task %s.", task_id)
