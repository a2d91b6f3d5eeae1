"""The operations that answer with a stream of events: which one a request gets, and who may have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import cast

from flask import Flask, Request, Response, current_app

from .. import context
from ..capture import plain_environ
from ..errors import InvalidRequest, TaskNotFound
from ..names import is_name
from ..permissions import Caller, may_list, may_read
from ..runner import Runner
from ..task import AsyncRouteTask
from . import connection
from .asking import arguments
from .event_ids import EventIds
from .frames import position, present, retry
from .negotiation import NO_STORE, VARY
from .streams import MayRead, Stream

CONTENT_TYPE = "text/event-stream"
UNTHREADED_SECONDS = 5.0
"""How long a stream goes on where the server does nothing else meanwhile."""
FULL_RETRY_MS = 3000
"""When a client is to come back for whom there was no place."""


def task_events(runner: Runner, current: Request, task: AsyncRouteTask, caller: Caller | None) -> Response:
    """Answer with the events of one task.

    :param task: one that the caller may read.
    :raises TaskNotFound: where its route has no events.
    """
    if task.sse_group is None:
        raise TaskNotFound("The route of this task has no events (sse=False).", task_id=task.id)
    ids = EventIds(runner.store.secret())
    since = _last(current, ids, runner, task.id)
    if task.state.is_terminal and task.completed_change is not None and (since or 0) >= task.completed_change:
        return Response(status=204, headers=_HEADERS)
    may = partial(_may_read_task, runner, caller)
    looking = _looking(runner, current, _may_read_task)
    has_ended, age, hang_up = task.state.is_terminal, _age(runner, current), connection.hanging_up(current.environ)
    stream = Stream(
        runner, ids, task.id, None, since, present(task), task.change, has_ended, age, may, looking, hang_up
    )
    if has_ended:
        return _answer(current, stream.follow())
    return _answer(current, _placed(runner, stream))


def group_events(runner: Runner, current: Request, caller: Caller | None) -> Response:
    """Answer with the events of all tasks of a group that the caller may list; of all groups where none is named.

    :raises InvalidRequest: for more than one group, or what cannot be one.
    """
    groups = arguments(current).getlist("group")
    if len(groups) > 1 or not all(is_name(group) for group in groups):
        raise InvalidRequest("group takes one name of at most 255 characters.")
    ids = EventIds(runner.store.secret())
    last = _last(current, ids, runner, None)
    since = runner.store.newest() if last is None else last
    may = partial(_may_list_task, runner, caller)
    group = groups[0] if groups else None
    looking = _looking(runner, current, _may_list_task)
    # With an id from the start: who is cut off before the first event, or finds no place, misses nothing.
    age, hang_up = _age(runner, current), connection.hanging_up(current.environ)
    stream = Stream(runner, ids, None, group, since, position(since, ids), 0, False, age, may, looking, hang_up)
    return _answer(current, _placed(runner, stream))


_HEADERS = {
    "Cache-Control": NO_STORE,
    "Vary": VARY,
    # nginx and those that follow it would keep what is sent until there is more of it.
    "X-Accel-Buffering": "no",
}


def _answer(current: Request, body: Iterable[bytes]) -> Response:
    return Response(() if current.method == "HEAD" else body, 200, _HEADERS, content_type=CONTENT_TYPE)


def _placed(runner: Runner, stream: Stream) -> Iterator[bytes]:
    """Yield a stream where there is a place for it, else its beginning alone.

    The place is taken when the server begins to send, not before: what the app's own functions do with a response until
    then, failing or answering with another, must not cost one.
    """
    if not runner.places.take():
        yield stream.beginning
        yield retry(FULL_RETRY_MS)
        return
    try:
        yield from stream.follow()
    finally:
        runner.places.give_back()


def _age(runner: Runner, current: Request) -> float:
    age = runner.config.stream_age
    return age if current.environ.get("wsgi.multithread", True) else min(age, UNTHREADED_SECONDS)


def _last(current: Request, ids: EventIds, runner: Runner, task_id: str | None) -> int | None:
    """Return the number of the last event that the client has; None where it has none of ours."""
    given = current.headers.get("Last-Event-ID")
    since = None if given is None else ids.open(given, task_id)
    # One from a store that was there before this one would hold back all that comes.
    return None if since is None or since > runner.store.newest() else since


def _may_read_task(runner: Runner, caller: Caller | None, task: AsyncRouteTask) -> bool:
    return may_read(caller, task.user, task.granted, runner.config.admins)


def _may_list_task(runner: Runner, caller: Caller | None, task: AsyncRouteTask) -> bool:
    return may_list(caller, task.user, task.granted, runner.config.admins, runner.config.list_anonymous)


def _looking(
    runner: Runner, current: Request, may: Callable[[Runner, Caller | None, AsyncRouteTask], bool]
) -> Callable[[], MayRead]:
    """Return what looks the caller up again, in the request as it was."""
    app = cast(Flask, current_app._get_current_object())  # type: ignore[attr-defined]
    environ = current.environ  # the server holds it as long as the stream; a copy would be one more of each

    def look() -> MayRead:
        with context.again(app, plain_environ(environ)):
            return partial(may, runner, runner.dispatcher.caller())

    return look
