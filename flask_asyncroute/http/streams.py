"""Event streams: which events a client receives, and when its stream ends."""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from flask import Request, Response

from ..engine.notifier import Subscriber
from ..errors import AsyncRouteError
from ..permissions import Caller, may_list, may_read
from ..request import context
from ..request.capture import plain_environ
from ..stores.base import PROGRESS, STATE, Event, TaskStore
from ..task import AsyncRouteTask
from ..workers.runner import Runner
from .responses import NO_STORE, VARY
from .sse_format import HEARTBEAT, EventIds, frame, position, present, retry
from .waits import longest

logger = logging.getLogger("flask_asyncroute")

HEARTBEAT_SECONDS = 10.0
LOOK_AGAIN_SECONDS = 30.0
"""Seconds after which a stream identifies its caller again."""
LATE_SECONDS = 2 * HEARTBEAT_SECONDS
"""Seconds that a client has to receive a piece of data. After that, it is disconnected."""
PAGE = 100
"""Maximum number of events per read of the store. Each event has up to 64 KiB."""
PIECE = 64 * 1024
"""Maximum number of bytes that are sent at once."""
RETRY_MS = 1000
"""Milliseconds before a client reconnects after a shutdown or a stream's maximum age."""
FULL_RETRY_MS = 3000
"""Milliseconds before a client reconnects if this process has too many streams."""

CONTENT_TYPE = "text/event-stream"
HEADERS = {
    "Cache-Control": NO_STORE,
    "Vary": VARY,
    "X-Accel-Buffering": "no",  # nginx would delay events until its buffer is full
}


def hanging_up(environ: Mapping[str, Any]) -> Callable[[], None] | None:
    """Return a function that disconnects a request's client, for use by another thread.

    A thread that is blocked while sending to the client then gets an error.

    :return: None if the server does not expose its sockets.
    """
    # waitress and uWSGI do not expose their sockets, but have timeouts.
    connection = environ.get("gunicorn.socket", environ.get("werkzeug.socket"))
    return None if connection is None else partial(_disconnect, connection)


def _disconnect(connection: Any) -> None:
    # ValueError: the connection is closed.
    with suppress(OSError, ValueError):
        # Use a second socket object: the server's can belong to gevent or TLS. Do not duplicate the
        # descriptor: the process can have none free.
        same = socket.socket(fileno=connection.fileno())
        try:
            same.shutdown(socket.SHUT_RDWR)
        finally:
            same.detach()


@dataclass(frozen=True, slots=True)
class _EncodedEvent:
    """An encoded event, which all streams share.

    :param change: the number that the store has given to the change of the task.
    :param is_end: whether the event reports the end of the task.
    """

    change: int
    name: str
    task: AsyncRouteTask
    is_end: bool
    frame: bytes


@dataclass(frozen=True, slots=True)
class _EncodedPage:
    """Encoded events that were read together.

    :param change: the number of the last change that was read.
    """

    change: int
    events: Sequence[_EncodedEvent]


class Stream:
    """The events that one client receives. Not thread-safe.

    :param current: the request for the stream.
    :param caller: the caller that sent the request.
    :param task_id: the only task of the stream; None: all tasks of `group`.
    """

    # A process can have hundreds of streams, so each keeps little data.

    __slots__ = ("runner", "environ", "caller", "task_id", "ids", "since", "beginning")
    group: str | None = None
    has_ended = False
    """Whether the task had already ended when the client requested the stream."""
    beginning: bytes

    def __init__(
        self, runner: Runner, current: Request, caller: Caller | None, task_id: str | None
    ) -> None:
        self.runner = runner
        self.environ = current.environ
        self.caller = caller
        self.task_id = task_id
        self.ids = EventIds(runner.store.secret())
        last_id = current.headers.get("Last-Event-ID")
        since = None if last_id is None else self.ids.open(last_id, task_id)
        # An id of a replaced store could be higher than all later ids.
        self.since = None if since is None or since > runner.store.newest() else since
        """The number of the last change that the client has received; None: the stream is new."""

    def may_read(self, task: AsyncRouteTask) -> bool:
        raise NotImplementedError

    def is_known(self, event: _EncodedEvent) -> bool:
        """Check whether the start of the stream already contains what an event reports."""
        return False

    def pieces(self) -> Iterator[bytes]:
        """Yield the encoded events until the stream ends.

        If this process has too many streams, only the start of the stream is sent. The client then
        reconnects later.
        """
        # Count the stream only when the server begins to send. Otherwise, an `after_request`
        # function that fails or replaces the response would leave it counted.
        if self.has_ended:
            yield from self._guarded()
            return
        if not self.runner.stream_slots.acquire(blocking=False):
            yield self.beginning
            yield retry(FULL_RETRY_MS)
            return
        try:
            yield from self._guarded()
        finally:
            self.runner.stream_slots.release()

    def _guarded(self) -> Iterator[bytes]:
        """Yield the encoded events. If the store fails, end the stream without an error."""
        # `subscribed` disconnects a client that stops reading.
        subscriber = Subscriber(hanging_up(self.environ))
        try:
            notifier, feed = self.runner.notifier, (self.task_id, self.group)
            with notifier.subscribed(subscriber, self.task_id), notifier.shared_reads.reading(feed):
                try:
                    for data in self._follow(subscriber):
                        for start in range(0, len(data), PIECE):
                            subscriber.must_be_sent_by = time.monotonic() + LATE_SECONDS
                            yield data[start : start + PIECE]
                            subscriber.must_be_sent_by = None
                        del data  # free the memory: the next event can come much later
                except AsyncRouteError as error:
                    # Catch this inside `subscribed`, which disconnects a client that stops reading.
                    subscriber.must_be_sent_by = time.monotonic() + LATE_SECONDS
                    yield _log_and_reconnect(error)
        except AsyncRouteError as error:
            yield _log_and_reconnect(error)

    def _follow(self, subscriber: Subscriber) -> Iterator[bytes]:
        """Yield past events, then new events.

        The stream ends with the task, at its maximum age, or when the server shuts down.
        """
        now = time.monotonic()
        ends_at = now + longest(self.environ, self.runner.config.stream_age)
        identify_at = now + LOOK_AGAIN_SECONDS
        heartbeat_at = now + HEARTBEAT_SECONDS
        if self.since is None or self.task_id is None:
            yield self.beginning
            self.beginning = b""
        since = self.since or 0
        while True:
            subscriber.clear()
            found = self._read_after(since)
            is_over = self.task_id is not None and any(event.is_end for event in found.events)
            has_more = len(found.events) == PAGE
            since = found.change
            for piece in self._frames(found.events):
                yield piece
                heartbeat_at = time.monotonic() + HEARTBEAT_SECONDS
                del piece
            del found
            if is_over or (self.has_ended and not has_more):
                return
            now = time.monotonic()
            if now >= ends_at or self.runner.notifier.is_over:
                yield retry(RETRY_MS)
                return
            if now >= identify_at:
                identify_at = now + LOOK_AGAIN_SECONDS
                try:
                    with context.again(self.runner.app, plain_environ(self.environ)):
                        self.caller = self.runner.dispatcher.caller()
                except Exception as error:
                    # The identity loader refuses the caller or fails. The client sees why when it
                    # reconnects.
                    yield _log_and_reconnect(error)
                    return
                if self.task_id is not None:
                    task = self._task(self.task_id)
                    if task is None or not self.may_read(task):
                        return
            if now >= heartbeat_at:
                heartbeat_at = now + HEARTBEAT_SECONDS
                yield HEARTBEAT
            if not has_more:
                due = min(ends_at, identify_at, heartbeat_at)
                subscriber.wait(max(due - time.monotonic(), 0.0))

    def _read_after(self, since: int) -> _EncodedPage:
        # Streams share the result. Each stream skips the events that its caller may not read.

        read = partial(_read_page, self.runner.store, self.ids, self.task_id, self.group)
        if self.has_ended:
            return read(since)  # a shared result can lack the last event, the task's end
        reads, feed = self.runner.notifier.shared_reads, (self.task_id, self.group)
        page = reads.page(feed, since, read)
        if len(page.events) == PAGE:
            reads.drop((feed, since))  # do not cache the many large pages of a stream far behind
        return page

    def _task(self, task_id: str) -> AsyncRouteTask | None:
        reads = self.runner.notifier.shared_reads
        return reads.get(task_id, lambda: self.runner.store.get(task_id))

    def _frames(self, events: Sequence[_EncodedEvent]) -> Iterator[bytes]:
        piece = b""
        for event in events:
            if self.is_known(event) or not self.may_read(event.task):
                continue
            data = event.frame
            if event.is_end and event.task.sse_result:
                # Results can be large, so read each only when it is sent.
                whole = self.runner.store.get(event.task.id)
                if whole is None or whole.completed_change != event.change:
                    continue  # the task was deleted, or the store was replaced
                data = frame(Event(event.change, event.name, whole), self.ids)
            if piece and len(piece) + len(data) > PIECE:
                yield piece
                piece = b""
            piece += data
        if piece:
            yield piece


def _read_page(
    store: TaskStore, ids: EventIds, task_id: str | None, group: str | None, since: int
) -> _EncodedPage:
    found = store.events(since, PAGE, task_id, group)
    # Events can be large, so free each after encoding it.
    events = deque(found.events)
    change = found.change
    del found
    rendered = []
    while events:
        rendered.append(_encoded(events.popleft(), ids))
    return _EncodedPage(change, rendered)


class TaskStream(Stream):
    """The event stream of one task. A new stream begins with the task's record."""

    __slots__ = ("known", "has_ended")

    def __init__(
        self, runner: Runner, current: Request, caller: Caller | None, task: AsyncRouteTask
    ) -> None:
        super().__init__(runner, current, caller, task.id)
        self.beginning = present(task)
        self.known = task.change
        self.has_ended = task.state.is_terminal

    def may_read(self, task: AsyncRouteTask) -> bool:
        return may_read(self.caller, task.user, task.granted, self.runner.config.admins)

    def is_known(self, event: _EncodedEvent) -> bool:
        if self.since is not None or event.change > self.known:
            return False
        return event.name in (STATE, PROGRESS) and not event.is_end


class GroupStream(Stream):
    """The events of all tasks that the caller may list, of one group or of all groups."""

    # The stream begins with an id, so a client that is disconnected or refused before the first
    # event misses no event.

    __slots__ = ("group",)

    def __init__(
        self, runner: Runner, current: Request, caller: Caller | None, group: str | None
    ) -> None:
        super().__init__(runner, current, caller, None)
        self.group = group
        if self.since is None:
            self.since = runner.store.newest()
        self.beginning = position(self.since, self.ids)

    def may_read(self, task: AsyncRouteTask) -> bool:
        config = self.runner.config
        lists_anonymous = config.list_anonymous
        return may_list(self.caller, task.user, task.granted, config.admins, lists_anonymous)


def stream_response(current: Request, stream: Stream) -> Response:
    """Create the response that sends a stream. For a HEAD request, it has only the headers."""
    body = () if current.method == "HEAD" else stream.pieces()
    return Response(body, 200, HEADERS, content_type=CONTENT_TYPE)


def _log_and_reconnect(error: Exception) -> bytes:
    # The returned data makes the client reconnect.
    logger.warning(
        "An event stream was interrupted. The client will reconnect and miss no event: %s", error
    )
    return retry(RETRY_MS)


def _encoded(event: Event, ids: EventIds) -> _EncodedEvent:
    is_end = event.name == STATE and event.data is None and event.task.state.is_terminal
    return _EncodedEvent(event.change, event.name, event.task, is_end, frame(event, ids))
