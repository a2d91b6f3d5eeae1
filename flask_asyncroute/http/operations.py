"""The blueprint: get, result, stop, query and events. Reads go to the store, a stop to the dispatcher; permission comes first."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

from flask import Blueprint, Flask, Request, Response, has_request_context, request
from flask.blueprints import BlueprintSetupState

from ..dispatcher import unknown
from ..encoding import MEDIA_TYPES
from ..errors import NotPermitted, RequestRefused, TaskFailed, TaskFinished, TaskUnfinished
from ..permissions import Caller, may_read, may_write
from ..query import open_cursor, position_of, seal_cursor
from ..removal import purge
from ..runner import Runner
from ..runtime import EXTENSION, current_runtime, runtime_of
from ..states import State
from ..stores.base import Readers
from ..task import AsyncRouteTask, now_us
from . import asking
from .answers import document_of, etag_of, task_answer
from .negotiation import negotiate, render
from .problems import problem_response
from .sse import CONTENT_TYPE, group_events, task_events
from .waiting import asked_wait, hold, may_change

logger = logging.getLogger("flask_asyncroute")

_HOST = "asyncroute_host"
"""The variable of rules that are served on any host or subdomain."""

Operation = Callable[..., Response]
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def make_blueprint(decorators: Sequence[Decorator]) -> Blueprint:
    """Return the blueprint of the operations; its rules are made for each app from the app's configuration.

    :param decorators: of the app's own, put around every operation, the last one outermost.
    """
    blueprint = Blueprint(EXTENSION, __name__)
    views = {name: _guarded(operation, decorators) for name, operation in _OPERATIONS.items()}

    @blueprint.record
    def add_rules(state: BlueprintSetupState) -> None:
        config = runtime_of(cast(Flask, state.app)).initial
        one, many = config.task_path, config.tasks_path
        paths = [f"{one}/<task_id>"] if "path" in config.task_id_in else []
        if set(config.task_id_in) - {"path"}:
            paths.append(one)
        hosts = _hosts(cast(Flask, state.app))

        def add(path: str, endpoint: str, *methods: str) -> None:
            for host in hosts:
                state.add_url_rule(path, endpoint, views[endpoint], methods=methods, **host)

        if "get" in config.operations:
            for path in paths:
                add(path, "get", "GET")
            for path in paths:
                add(f"{path}/result", "result", "GET")
        if "stop" in config.operations:
            for path in paths:
                add(path, "stop", "DELETE")
        if "query" in config.operations:
            add(many, "query", "GET", "POST")
            add(f"{many}/query", "query", "POST")
        if "events" in config.operations:
            for path in paths:
                add(f"{path}/events", "events", "GET")
            add(f"{many}/events", "group_events", "GET")

    return blueprint


def _hosts(app: Flask) -> list[dict[str, str]]:
    """Return the options that rules need to be served wherever a task may be started: Location names a path alone."""
    if app.url_map.host_matching:
        app.url_default_functions.setdefault(EXTENSION, []).append(_add_host)
        return [{"host": f"<{_HOST}>"}]
    if app.subdomain_matching:
        # The first is what url_for gives.
        return [{}, {"subdomain": f"<{_HOST}>"}]
    return [{}]


def _add_host(endpoint: str, values: dict[str, Any]) -> None:
    if has_request_context():
        values.setdefault(_HOST, request.host)


def _guarded(operation: Operation, decorators: Sequence[Decorator]) -> Callable[..., Any]:
    @functools.wraps(operation)
    def view(task_id: str | None = None, **host: str) -> Response:
        try:
            return operation(current_runtime().runner, task_id)
        except RequestRefused as refusal:
            return problem_response(refusal, request.headers.get("Accept"), request.path)

    guarded: Callable[..., Any] = view
    for decorator in decorators:
        guarded = decorator(guarded)
    return guarded


def get(runner: Runner, task_id: str | None) -> Response:
    """Answer with a task as it is now, whatever its state."""
    current: Request = request._get_current_object()  # type: ignore[attr-defined]
    media_type = negotiate(current.environ.get("HTTP_ACCEPT"), MEDIA_TYPES)
    seconds = asked_wait(current, runner.config.max_wait)
    task, _ = _readable(runner, task_id, current)
    etag = etag_of(task, media_type)
    if seconds:
        task = _held(runner, task, seconds, current, etag)
        etag = etag_of(task, media_type)
    if "HTTP_IF_NONE_MATCH" in current.environ and current.if_none_match.contains_weak(etag):
        return render(b"", media_type, "", 304, [("ETag", f'"{etag}"')])
    return task_answer(task, runner.dispatcher.pace, media_type, 200, [("ETag", f'"{etag}"')])


def result(runner: Runner, task_id: str | None) -> Response:
    """Answer with the result alone, or with why there is none."""
    media_type = negotiate(request.headers.get("Accept"), MEDIA_TYPES)
    task, _ = _readable(runner, task_id)
    if not task.is_completed:
        raise TaskUnfinished(
            f"The task has no result yet: its State is {task.state}.",
            task_id=task.id,
            retry_after=runner.dispatcher.pace.rest(task, now_us()),
        )
    if task.state is State.ABORTED:
        raise TaskFinished(f"The task was aborted and has no result: {task.error}.", task_id=task.id)
    if task.state is State.FAILED:
        failure = TaskFailed(f"The task failed: {task.error}", task_id=task.id)
        if task.error_status is not None and 400 <= task.error_status < 500:
            return problem_response(
                _with_status(failure, task.error_status), request.headers.get("Accept"), request.path
            )
        raise failure
    if media_type == "application/json":
        return render(task.result_json or b"null", media_type, "Result", 200)
    return render(task.result, media_type, "Result", 200)


def stop(runner: Runner, task_id: str | None) -> Response:
    """Stop a task, or remove one that has ended."""
    media_type = negotiate(request.headers.get("Accept"), MEDIA_TYPES)
    asking.refuse_foreign_page(request, runner.config)
    is_purge = asking.is_purge(request)
    task, caller = _readable(runner, task_id)
    if not may_write(caller, task.user, task.granted, runner.config.admins):
        raise NotPermitted("You may read this task and not stop it.", task_id=task.id)
    if not is_purge:
        return task_answer(runner.dispatcher.stop(task), runner.dispatcher.pace, media_type)
    if not purge(runner.store, runner.lifecycle, task):
        raise unknown(task.id)
    return render(b"", media_type, "", 204)


def query(runner: Runner, task_id: str | None) -> Response:
    """Answer with the tasks that fit and that the caller may read, a page at a time."""
    media_type = negotiate(request.headers.get("Accept"), MEDIA_TYPES)
    asked = asking.query(request)
    caller = runner.dispatcher.caller()
    caller_id = None if caller is None else caller.id
    secret = runner.store.secret()
    position = None if asked.cursor is None else open_cursor(asked.cursor, asked, caller_id, secret)
    readers = _readers(runner, caller)
    found = runner.store.query(asked.conditions, asked.sort, asked.limit + 1, position, readers)
    page = found[: asked.limit]
    headers = []
    if len(found) > len(page):
        cursor = seal_cursor(position_of(page[-1], asked.sort), asked, caller_id, secret)
        headers.append(asking.next_link(request, cursor))
    document = [document_of(task, media_type) for task in page]
    return render(document, media_type, "AsyncRouteTasks", 200, headers)


def events(runner: Runner, task_id: str | None) -> Response:
    """Answer with the events of a task, as they come."""
    negotiate(request.headers.get("Accept"), (CONTENT_TYPE,))
    current: Request = request._get_current_object()  # type: ignore[attr-defined]
    task, caller = _readable(runner, task_id, current)
    return task_events(runner, current, task, caller)


def events_of_group(runner: Runner, task_id: str | None) -> Response:
    """Answer with the events of all tasks of a group that the caller may list, as they come."""
    negotiate(request.headers.get("Accept"), (CONTENT_TYPE,))
    current: Request = request._get_current_object()  # type: ignore[attr-defined]
    caller = runner.dispatcher.caller()
    if not runner.config.list_anonymous and not (caller is not None and caller.is_in(runner.config.admins)):
        runner.tell_of_unlisted()
    return group_events(runner, current, caller)


_OPERATIONS: dict[str, Operation] = {
    "get": get, "result": result, "stop": stop, "query": query, "events": events, "group_events": events_of_group,
}  # fmt: skip


def _held(runner: Runner, task: AsyncRouteTask, seconds: float, current: Request, etag: str) -> AsyncRouteTask:
    """Return a task once it has ended or, where the client knows the present revision, once anything has changed."""
    revision = task.revision
    if "HTTP_IF_NONE_MATCH" in current.environ:
        if not may_change(task) or not current.if_none_match.contains_weak(etag):
            return task
        held, _ = hold(runner, task, seconds, lambda found: found.revision != revision)
    else:
        held, _ = hold(runner, task, seconds, lambda found: found.state.is_terminal)
    if held is None:
        raise unknown(task.id)
    return held


def _readable(runner: Runner, in_path: str | None, current: Request = request) -> tuple[AsyncRouteTask, Caller | None]:
    """Return the task that is asked for and who asks.

    The caller is looked up whether or not there is such a task, so that the two cases take the same time.

    :raises TaskNotFound: where there is none, or the caller may not read it.
    """
    task_id = asking.task_id(current, runner.config, in_path)
    task = runner.store.get(task_id)
    caller = runner.dispatcher.caller()
    if task is None or not may_read(caller, task.user, task.granted, runner.config.admins):
        raise unknown(task_id)
    return task, caller


def _readers(runner: Runner, caller: Caller | None) -> Readers | None:
    """Return under which names the caller lists tasks; None: all."""
    config = runner.config
    if caller is not None and caller.is_in(config.admins):
        return None
    if not config.list_anonymous:
        runner.tell_of_unlisted()
    if caller is None:
        return Readers(anonymous=config.list_anonymous)
    return Readers(caller.id, tuple(caller.names()), config.list_anonymous)


def _with_status(failure: TaskFailed, status: int) -> RequestRefused:
    """Return the refusal with the status of the exception that failed the task."""

    class Failed(TaskFailed):
        pass

    Failed.status = status
    return Failed(failure.detail, task_id=failure.task_id)
