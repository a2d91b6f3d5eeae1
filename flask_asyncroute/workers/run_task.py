"""Runs one task: claims it, rebuilds its request, calls the view and records the outcome."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from flask import Flask, got_request_exception

from .. import snapshot
from ..config import Config
from ..current_task import running
from ..encoding import encode_result, json_default
from ..engine.dispatcher import TIMED_OUT, Dispatcher
from ..engine.lifecycle import LOST, SHUT_DOWN, Lifecycle
from ..engine.notifier import Notifier
from ..engine.pending_writes import FIRST_DELAY, MAX_DELAY
from ..errors import (
    AsyncRouteError,
    ConfigurationError,
    ResultError,
    RetryRequested,
    StoreUnavailable,
    TaskAborted,
)
from ..executors import interruption
from ..executors.base import TaskExecutor
from ..executors.execution import Execution
from ..executors.outcome import Outcome, can_retry, failed, is_http_error
from ..request import context
from ..retries import Retry
from ..routes import Route, View
from ..stores.base import Claim, TaskStore
from ..task import AsyncRouteTask, State, now_us
from .maintenance import Timekeeper

logger = logging.getLogger("flask_asyncroute")

INLINE_WAIT_SECONDS = 0.5  # interval at which a retry inside a request checks for a shutdown


class Worker(Protocol):
    """The attributes of `runner.Runner` that this module uses. Importing that class would be a
    circular import.
    """

    app: Flask
    config: Config
    routes: Mapping[str, Route]
    before_task: Sequence[Callable[[], Any]]
    is_inline: bool

    store: TaskStore
    lifecycle: Lifecycle
    dispatcher: Dispatcher
    notifier: Notifier
    timekeeper: Timekeeper

    def enter(self) -> None: ...

    def wake(self) -> None: ...


def run(runner: Worker, executor: TaskExecutor, task_id: str) -> None:
    """Run a waiting task on this thread; return at once if another process has claimed it.

    If the task runs inside its request, also wait for its retries. Never raise an Exception. The
    task gets an outcome, whatever the view does.
    """
    runs_again = _run_safely(runner, executor, task_id)
    if runs_again and executor.runs_inline:
        _run_retries(runner, executor, task_id)


def _run_retries(runner: Worker, executor: TaskExecutor, task_id: str) -> None:
    """Run the further attempts of a task inside its request, each at its time. Return early if the
    task is stopped or this process shuts down.
    """
    while True:
        seconds = INLINE_WAIT_SECONDS
        try:
            task = runner.store.get(task_id)
            if task is None or task.is_completed:
                return
            # While it is Running, the failure of its last attempt is not stored yet.
            if task.state is State.NOT_STARTED and task.start_at_us is not None:
                seconds = min((task.start_at_us - runner.store.now_us()) / 1_000_000, seconds)
        except StoreUnavailable:
            pass
        is_closing = runner.dispatcher.is_closing
        if is_closing or seconds <= 0:
            _run_safely(runner, executor, task_id)
        else:
            time.sleep(seconds)
        if is_closing:
            return


def _run_safely(runner: Worker, executor: TaskExecutor, task_id: str) -> bool:
    """Run one attempt. Return whether the task runs again."""
    try:
        return _run(runner, executor, task_id)
    except TaskAborted:
        logger.warning(
            "Task %s was interrupted after its view had ended. The result is stored, or another "
            "worker recovers the task.",
            task_id,
        )
    except Exception as error:
        is_known = isinstance(error, AsyncRouteError)
        logger.error("Task %s could not be run: %s", task_id, error, exc_info=not is_known)
        if executor.is_bound:
            runner.lifecycle.abort_later(task_id, LOST)
    return False


def _run(runner: Worker, executor: TaskExecutor, task_id: str) -> bool:
    dispatcher, lifecycle = runner.dispatcher, runner.lifecycle
    execution = Execution(task_id, executor.interrupt_after, runner.wake)
    if not dispatcher.begin(execution, executor):
        return False
    is_ended = False
    try:
        runner.notifier.watch()
        try:
            if dispatcher.is_closing:
                # Another process will run the task, unless only this process can run it.
                if executor.is_bound:
                    lifecycle.abort_later(task_id, SHUT_DOWN)
                return False
            runner.enter()
            claim = lifecycle.claim(task_id)
            if claim is None:
                if executor.is_bound:
                    # Maintenance aborts expired tasks too. But it can belong to a later runner,
                    # which has another name and leaves this task alone.
                    lifecycle.abort_if_expired(task_id)
                return False
            task = claim.task
            seconds = None if task.timeout_us is None else task.timeout_us / 1_000_000
            execution.begin(
                task.user, task.epoch, seconds, task.on_loss == "restart", task.attempt or 1,
                task.retries_left,
            )  # fmt: skip
            runner.timekeeper.begin(execution)
            pid = os.getpid()
            try:
                outcome = _carry_out(runner, executor, claim, execution)
            finally:
                if os.getpid() != pid:
                    # The view forked this process. The task and all connections belong to the
                    # parent process.
                    logger.error(
                        "The view of task %s forked, and the forked process returned from the "
                        "view. The forked process exits now; it should have called os._exit().",
                        task_id,
                    )
                    os._exit(1)
                interruption.leave(execution)
                execution.end()
            completed_us = now_us()
            dispatcher.run_times.note(task, completed_us)
            if execution.is_expired:
                outcome = Outcome(State.ABORTED, {"error": TIMED_OUT})
            values = {"completed_us": completed_us, **outcome.values}
            write: Callable[[], object]
            runs_again = False
            if execution.is_shutting_down and not execution.is_expired:
                # The shutdown has stopped the run, so ignore the view's return value.
                write = partial(lifecycle.cut_short, execution, is_over=True)
            elif outcome.can_retry and execution.retries_left and not execution.stop.is_set():
                runs_again = True
                start_at_us = runner.store.now_us() + _delay_us(runner, task, outcome)
                error = outcome.values["error"]
                write = partial(lifecycle.retry, execution, error, start_at_us, executor.is_bound)
            else:
                write = partial(lifecycle.finish, execution, outcome.state, values)
            # Keep the run registered until its outcome is stored.
            lifecycle.pending_writes.write(task_id, write, partial(dispatcher.end, execution))
            is_ended = True
            return runs_again
        finally:
            runner.notifier.unwatch()
    finally:
        if not is_ended:
            dispatcher.end(execution)


def _delay_us(runner: Worker, task: AsyncRouteTask, outcome: Outcome) -> int:
    """Return the microseconds until the next attempt of a task."""
    if runner.is_inline:
        return 0
    delay = outcome.retry_after
    if delay is None:
        assert task.retry is not None and task.attempt is not None
        delay = task.retry.seconds_before(task.attempt)
    return round(delay * 1_000_000)


def _carry_out(
    runner: Worker, executor: TaskExecutor, claim: Claim, execution: Execution
) -> Outcome:
    """Run a claimed task, in a child process if the executor uses one; return the outcome."""
    body = None
    try:
        if claim.task.body_size:
            body = _read_body(runner.store, claim.task, execution)
        outcome = executor.hand_over(claim, body, execution)
        return outcome or execute(runner, claim.task.endpoint, claim.request, body, execution)
    except BaseException as error:
        return _failed(runner, claim.task.endpoint, error, execution)
    finally:
        if body is not None:
            body.close()


def _read_body(store: TaskStore, task: AsyncRouteTask, execution: Execution) -> snapshot.Body:
    """Return the request body of a claimed task. Retry while the store is unavailable.

    :raises TaskAborted: if the task was stopped, timed out, or was ended by another process.
    """
    delay = FIRST_DELAY
    while True:
        try:
            body = store.body(task.id)
            break
        except StoreUnavailable:
            execution.stop.wait(delay)
            execution.check()
            delay = min(2 * delay, MAX_DELAY)
    if body.size < task.body_size:
        # The body was deleted, because the task has ended. The view must not run without it.
        body.close()
        raise TaskAborted("The task has ended, and its body was deleted.")
    return body


def execute(
    runner: Worker, endpoint: str, request: bytes, body: snapshot.Body | None, execution: Execution
) -> Outcome:
    """Call a view in its rebuilt request, in a thread or child process; return the outcome.

    :param request: an encoded `Snapshot`, which contains a small body.
    :param body: a large body, if any.
    """
    app, outcome = runner.app, None
    try:
        route = runner.routes.get(endpoint)
        if route is None:
            raise ConfigurationError(
                f"The app of ASYNCROUTE_APP ({runner.config.app}) has no async route with the "
                f"endpoint {endpoint!r}."
            )
        captured = snapshot.decode(request)
        if captured.body is not None:
            body = snapshot.Body([captured.body])
        default = json_default(app.json)
        with running(execution, default), context.rebuilt(app, captured, body) as arguments:
            try:
                context.process_url(arguments)
                for prepare in runner.before_task:
                    prepare()
                execution.check()
                result = _call(route, {**route.options.arguments, **arguments}, execution)
                if execution.is_time_up:
                    raise TaskAborted("The view returned after its timeout.")
                if result is None:
                    return Outcome(State.COMPLETED)
                encoded = encode_result(result, default, runner.config.max_result)
                return Outcome(State.COMPLETED, {"result_json": encoded})
            except BaseException as error:
                # Read the error inside the request context, so that a lazy message is translated
                # into the request's language.
                _explain(error, app)
                outcome = _failed(runner, endpoint, error, execution)
                _report(app, error, execution, is_last=not outcome.can_retry)
                raise
    except BaseException as error:
        return outcome or _failed(runner, endpoint, error, execution)


def _explain(error: BaseException, app: Flask) -> None:
    """Explain an error about a value of ``g`` that `before_request` functions would have set."""
    if (
        isinstance(error, AttributeError)
        and issubclass(type(error.obj), app.app_ctx_globals_class)
        and error.args == (error.name,)  # the app has not set the message
    ):
        error.args = (
            f"g.{error.name} is not set, because before_request functions do not run in a task. "
            "Set it in a before_task function.",
        )


def _failed(runner: Worker, endpoint: str, error: BaseException, execution: Execution) -> Outcome:
    if execution.is_time_up and not execution.stop.is_set():
        # The view can have raised the error because of the timeout, before the timekeeper reacted.
        return Outcome(State.ABORTED, {"error": TIMED_OUT})
    outcome = failed(error, runner.config.expose_errors)
    route = runner.routes.get(endpoint)
    # If this release of the app has no retries for the route, any Exception counts.
    retry = Retry() if route is None or route.options.retry is None else route.options.retry
    if not execution.retries_left or not can_retry(error, retry.classes):
        return outcome
    after = error.after if isinstance(error, RetryRequested) else None
    return replace(outcome, can_retry=True, retry_after=after)


def _call(route: Route, arguments: dict[str, Any], execution: Execution) -> Any:
    if inspect.iscoroutinefunction(route.view):
        return _await(route.view, arguments, execution)
    result = interruption.call(route.view, arguments, execution)
    if inspect.iscoroutine(result):
        return _await(lambda: result, {}, execution)
    return result


def _await(view: View, arguments: dict[str, Any], execution: Execution) -> Any:
    """Run a coroutine on its own event loop. A stop cancels the coroutine at once."""

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


def _report(app: Flask, error: BaseException, execution: Execution, is_last: bool) -> None:
    """Log an exception of a view. In the last attempt, also send got_request_exception.

    Earlier attempts are logged as warnings. In the last attempt, an HTTPException of the view is
    ignored, because it is not an error of the app. TaskAborted is always ignored. Errors of log
    handlers and receivers are logged too.
    """
    task_id = execution.task_id
    extra = {"task_id": task_id}
    try:
        if isinstance(error, RetryRequested) and not is_last:
            app.logger.warning(
                "Attempt %d of task %s ended with current_task.retry(reason=%r); the task runs "
                "again.",
                execution.attempt, task_id, str(error), extra=extra,
            )  # fmt: skip
            return
        if not is_last:
            app.logger.warning(
                "Attempt %d of task %s failed; the task runs again.",
                execution.attempt, task_id, exc_info=error, extra=extra,
            )  # fmt: skip
            return
        if isinstance(error, (TaskAborted, RetryRequested)) or is_http_error(error):
            return
        if isinstance(error, ResultError):
            app.logger.error(
                "The result of task %s cannot be stored: %s", task_id, error, extra=extra
            )
            return
        app.logger.exception("The view of task %s raised an exception.", task_id, extra=extra)
        got_request_exception.send(app, _async_wrapper=app.ensure_sync, exception=error)
    except Exception:
        logger.exception(
            "A log handler or signal receiver failed while reporting the error of task %s.", task_id
        )
