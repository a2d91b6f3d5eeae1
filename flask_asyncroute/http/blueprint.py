"""The endpoints of task operations: get, result, stop, query and events."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, cast

from flask import Blueprint, Flask, Request, Response, has_request_context, request
from flask.blueprints import BlueprintSetupState

from ..callbacks.model import PENDING
from ..encoding import MEDIA_TYPES
from ..engine.dispatcher import unknown
from ..engine.lifecycle import purge
from ..errors import (
    InvalidRequest,
    NotPermitted,
    RequestRefused,
    TaskFailed,
    TaskFinished,
    TaskNotFound,
    TaskUnfinished,
)
from ..permissions import Caller, may_read, may_write
from ..query import open_cursor, position_of, seal_cursor
from ..runtime import EXTENSION, current_runtime, runtime_of
from ..stores.base import Readers
from ..task import AsyncRouteTask, State, now_us
from ..validators import is_name
from ..workers.runner import Runner
from . import pages, params
from .responses import (
    document_of,
    etag_of,
    negotiate,
    problem_response,
    render,
    task_answer,
)
from .streams import CONTENT_TYPE, HEADERS, GroupStream, TaskStream, stream_response
from .waits import held, longest

logger = logging.getLogger("flask_asyncroute")

_HOST = "asyncroute_host"
"""The URL variable in rules that match any host or subdomain."""

Operation = Callable[[Runner, Request, "str | None"], Response]
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def make_blueprint(decorators: Sequence[Decorator]) -> Blueprint:
    """Create the blueprint of the operations. Its rules depend on each app's configuration.

    :param decorators: the app's decorators for every operation, the last outermost.
    """
    blueprint = Blueprint(EXTENSION, __name__, template_folder=str(pages.TEMPLATES))
    views = {name: _view(operation, decorators) for name, operation in _OPERATIONS.items()}

    @blueprint.record
    def add_rules(state: BlueprintSetupState) -> None:
        app = cast(Flask, state.app)
        config = runtime_of(app).initial
        one, many = config.task_path, config.tasks_path
        paths = [f"{one}/<task_id>"] if "path" in config.task_id_in else []
        if set(config.task_id_in) - {"path"}:
            paths.append(one)
        form_paths = paths if config.pages and "get" in config.operations else []
        rules: list[tuple[str, str, str, tuple[str, ...]]] = [
            *(("get", path, "get", ("GET",)) for path in paths),
            *(("get", f"{path}/result", "result", ("GET",)) for path in paths),
            *(("stop", path, "stop", ("DELETE",)) for path in paths),
            *(("stop", f"{path}/stop", "stop_by_form", ("POST",)) for path in form_paths),
            ("query", many, "query", ("GET", "POST")),
            ("query", f"{many}/query", "query", ("POST",)),
            *(("events", f"{path}/events", "events", ("GET",)) for path in paths),
            ("events", f"{many}/events", "group_events", ("GET",)),
        ]
        hosts = _hosts(app)
        for operation, path, endpoint, methods in rules:
            if operation in config.operations:
                for host in hosts:
                    state.add_url_rule(path, endpoint, views[endpoint], methods=methods, **host)
        if config.pages:
            for host in hosts:
                rule = f"{one}-pages/<path:filename>"
                state.add_url_rule(rule, "asset", _asset, methods=["GET"], **host)

    return blueprint


def _asset(filename: str, **host: str) -> Response:
    return pages.asset(filename)


def _hosts(app: Flask) -> list[dict[str, str]]:
    """Return URL rule options for every host or subdomain. Clients request a task on its route's
    host, because the Location header contains none.
    """
    if app.url_map.host_matching:
        app.url_default_functions.setdefault(EXTENSION, []).append(_add_host)
        return [{"host": f"<{_HOST}>"}]
    if app.subdomain_matching:
        # url_for() uses the first rule, which has no subdomain.
        return [{}, {"subdomain": f"<{_HOST}>"}]
    return [{}]


def _add_host(endpoint: str, values: dict[str, Any]) -> None:
    if has_request_context():
        values.setdefault(_HOST, request.host)


def _view(operation: Operation, decorators: Sequence[Decorator]) -> Callable[..., Any]:
    @functools.wraps(operation)
    def view(task_id: str | None = None, **host: str) -> Response:
        current: Request = request._get_current_object()  # type: ignore[attr-defined]
        try:
            return operation(current_runtime().runner, current, task_id)
        except RequestRefused as refusal:
            return pages.refuse(refusal, current)

    decorated: Callable[..., Any] = view
    for decorator in decorators:
        decorated = decorator(decorated)
    return decorated


def get(runner: Runner, current: Request, task_id: str | None) -> Response:
    """Return a task. With ``?wait=``, wait for its end or a change."""
    if pages.wants_page(current, runner.config):
        task, caller = _readable(runner, current, task_id)
        may_stop = may_write(caller, task.user, task.granted, runner.config.admins)
        return pages.task_page(runner, current, task, caller, may_stop)
    media_type = negotiate(current.environ.get("HTTP_ACCEPT"), MEDIA_TYPES)
    seconds = params.requested_wait(current, runner.config.max_wait)
    task, _ = _readable(runner, current, task_id)

    is_enough = _wait_condition(current, task) if seconds else None
    if is_enough is None:
        return _answer(runner, current, media_type, task)

    def answer(found: AsyncRouteTask | None, is_applied: bool) -> Response:
        if found is None:
            return failed(unknown(task.id))
        return _answer(runner, current, media_type, found)

    def failed(error: Exception) -> Response:
        if not isinstance(error, RequestRefused):
            # The response is 500. Flask has left the request and logs no error.
            logger.error(
                "A request that waited for task %s failed with status 500. The task is unaffected.",
                task.id,
                exc_info=error,
            )
            raise error
        return problem_response(error, current.headers.get("Accept"), current.path)

    seconds = longest(current.environ, seconds)
    announced = render(b"", media_type, "", 200)
    return held(runner, task, seconds, is_enough, announced, answer, failed)


def result(runner: Runner, current: Request, task_id: str | None) -> Response:
    """Return only a task's result, or a problem that says why there is no result."""
    media_type = negotiate(current.headers.get("Accept"), MEDIA_TYPES)
    task, _ = _readable(runner, current, task_id)
    if not task.is_completed:
        raise TaskUnfinished(
            f"The task has no result yet: its State is {task.state}.",
            task_id=task.id,
            retry_after=runner.dispatcher.run_times.rest(task, now_us()),
        )
    if task.state is State.ABORTED:
        detail = f"The task was aborted and has no result: {task.error}."
        raise TaskFinished(detail, task_id=task.id)
    if task.state is State.FAILED:
        failure = TaskFailed(f"The task failed: {task.error}", task_id=task.id)
        if task.error_status is not None and 400 <= task.error_status < 500:
            failure.status = task.error_status
        raise failure
    return render(task.result_json or b"null", media_type, "Result", 200)


def stop(runner: Runner, current: Request, task_id: str | None) -> Response:
    """Stop a task. With ``?purge=true``, delete a finished task instead."""
    media_type = negotiate(current.headers.get("Accept"), MEDIA_TYPES)
    params.refuse_cross_site(current, runner.config)
    is_purge = params.is_purge(current)
    task, caller = _readable(runner, current, task_id)
    if not may_write(caller, task.user, task.granted, runner.config.admins):
        raise NotPermitted("You may read this task, but not stop it.", task_id=task.id)
    if not is_purge:
        return task_answer(runner.dispatcher.stop(task), runner.dispatcher.run_times, media_type)
    if not purge(runner.store, runner.lifecycle, task):
        raise unknown(task.id)
    return render(b"", media_type, "", 204)


def stop_by_form(runner: Runner, current: Request, task_id: str | None) -> Response:
    """Stop a task for the form on its page, and redirect to the page."""
    params.refuse_cross_site(current, runner.config)
    task, caller = _readable(runner, current, task_id)
    if not may_write(caller, task.user, task.granted, runner.config.admins):
        raise NotPermitted("You may read this task, but not stop it.", task_id=task.id)
    pages.check_token(runner, current, task.id, caller)
    with suppress(TaskFinished):  # its page shows how it ended
        runner.dispatcher.stop(task)
    return pages.redirect_to_task(runner, current, task)


def query(runner: Runner, current: Request, task_id: str | None) -> Response:
    """Return a page of the matching tasks that the caller may list."""
    is_page = current.method == "GET" and pages.wants_page(current, runner.config)
    media_type = "" if is_page else negotiate(current.headers.get("Accept"), MEDIA_TYPES)
    parsed = params.query(current)
    caller = runner.dispatcher.caller()
    caller_id = None if caller is None else caller.id
    secret = runner.store.secret()
    position = (
        None if parsed.cursor is None else open_cursor(parsed.cursor, parsed, caller_id, secret)
    )
    readers = _readers(runner, caller)
    found = runner.store.query(parsed.conditions, parsed.sort, parsed.limit + 1, position, readers)
    page = found[: parsed.limit]
    if not page and readers is not None and not readers.anonymous:
        runner.warn_about_unlisted()
    next_url = None
    if len(found) > len(page):
        cursor = seal_cursor(position_of(page[-1], parsed.sort), parsed, caller_id, secret)
        next_url = params.next_url(current, cursor)
    if is_page:
        return pages.tasks_page(runner, current, page, next_url)
    headers = [] if next_url is None else [("Link", f'<{next_url}>; rel="next"')]
    document = [document_of(task, media_type) for task in page]
    return render(document, media_type, "AsyncRouteTasks", 200, headers)


def events(runner: Runner, current: Request, task_id: str | None) -> Response:
    negotiate(current.headers.get("Accept"), (CONTENT_TYPE,))
    task, caller = _readable(runner, current, task_id)
    if task.sse_group is None:
        raise TaskNotFound("The route of this task has no events (sse=False).", task_id=task.id)
    stream = TaskStream(runner, current, caller, task)
    end = task.completed_change if task.is_completed else None
    if end is not None and (stream.since or 0) >= end:
        return Response(status=204, headers=HEADERS)
    return stream_response(current, stream)


def events_of_group(runner: Runner, current: Request, task_id: str | None) -> Response:
    """Stream the events of a group's tasks, or of all tasks, that the caller may list."""
    negotiate(current.headers.get("Accept"), (CONTENT_TYPE,))
    caller = runner.dispatcher.caller()
    is_admin = caller is not None and caller.is_in(runner.config.admins)
    if not is_admin and not runner.config.list_anonymous:
        runner.warn_about_unlisted()
    groups = params.arguments(current).getlist("group")
    if len(groups) > 1 or not all(is_name(group) for group in groups):
        raise InvalidRequest("group: the value is invalid; use one name of 1 to 255 characters.")
    group = groups[0] if groups else None
    return stream_response(current, GroupStream(runner, current, caller, group))


_OPERATIONS: dict[str, Operation] = {
    "get": get, "result": result, "stop": stop, "stop_by_form": stop_by_form, "query": query,
    "events": events, "group_events": events_of_group,
}  # fmt: skip


def _answer(runner: Runner, current: Request, media_type: str, task: AsyncRouteTask) -> Response:
    etag = etag_of(task, media_type)
    headers = [("ETag", f'"{etag}"')]
    if _matches_etag(current, etag):
        return render(b"", media_type, "", 304, headers)
    return task_answer(task, runner.dispatcher.run_times, media_type, 200, headers)


def _matches_etag(current: Request, etag: str) -> bool:
    """Return whether If-None-Match contains ``etag``."""
    # The header is rarely sent, and its parser takes 5 % of the time of a request.
    return "HTTP_IF_NONE_MATCH" in current.environ and current.if_none_match.contains_weak(etag)


def _wait_condition(
    current: Request, task: AsyncRouteTask
) -> Callable[[AsyncRouteTask], bool] | None:
    """Return the condition that ends a get's wait: the end of the task, or any change if
    If-None-Match has the current revision. Return None (no wait) if If-None-Match has only older
    revisions, or the task cannot change any more.
    """
    if "HTTP_IF_NONE_MATCH" not in current.environ:
        return lambda found: found.is_completed
    may_change = not task.is_completed or task.stopping or task.callback_state in PENDING
    if may_change and _has_revision(current, task):
        return lambda found: found.revision != task.revision
    return None


def _has_revision(current: Request, task: AsyncRouteTask) -> bool:
    """Return whether the client has the current revision. Compressors and proxies can weaken its
    ETag or add a suffix.
    """
    tags = current.if_none_match.as_set(include_weak=True)
    return any(tag.partition("-")[0] == str(task.revision) for tag in tags)


def _readable(
    runner: Runner, current: Request, in_path: str | None
) -> tuple[AsyncRouteTask, Caller | None]:
    """Return the requested task, and the caller.

    The caller is always identified, so that the response time does not reveal whether a task
    exists.

    :raises TaskNotFound: if the task does not exist, or the caller may not read it.
    """
    task_id = params.task_id(current, runner.config, in_path)
    task = runner.store.get(task_id)
    caller = runner.dispatcher.caller()
    if task is None or not may_read(caller, task.user, task.granted, runner.config.admins):
        raise unknown(task_id)
    return task, caller


def _readers(runner: Runner, caller: Caller | None) -> Readers | None:
    """Return the names by which the caller may list tasks; None if it may list all tasks."""
    config = runner.config
    if caller is not None and caller.is_in(config.admins):
        return None
    if caller is None:
        return Readers(anonymous=config.list_anonymous)
    return Readers(caller.id, tuple(caller.names()), config.list_anonymous)
