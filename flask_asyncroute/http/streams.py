"""A stream of events: what it sends, when it beats and when it ends.

`sse` makes one for a request; the server's thread iterates over it. It reads the store whenever it is told that there is
something new, from where it was: so it is never behind what it has sent, needs no queue of its own, and its client may be
slow. It holds no connection of the store, no lock and no context meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..errors import AsyncRouteError
from ..followers import Follower
from ..runner import Runner
from ..stores.events import PROGRESS, STATE, Event
from ..task import AsyncRouteTask
from .event_ids import EventIds
from .frames import HEARTBEAT, frame, retry

logger = logging.getLogger("flask_asyncroute")

HEARTBEAT_SECONDS = 10.0
LOOK_AGAIN_SECONDS = 30.0
"""How often the caller is looked up again."""
LATE_SECONDS = 2 * HEARTBEAT_SECONDS
"""How long a client may take for one piece before it counts as gone."""
PAGE = 100
"""Events that are read at once; each may hold 64 KiB."""
PIECE = 64 * 1024
"""Bytes that are sent at once, at most."""
RETRY_MS = 1000
"""When a client is to come back whose stream was ended for its age, or with the server."""

MayRead = Callable[[AsyncRouteTask], bool]


@dataclass(slots=True)
class Stream:
    """What one client is sent. Of one thread. There may be hundreds, so it holds no more than it needs.

    :param task_id: of the task whose stream it is; None: that of a group.
    :param group: all tasks of this group; None: of all groups.
    :param since: the change number of the last event that the client has, of a group that after which it follows; None: it
        begins with all of a task.
    :param beginning: what comes first, but for who resumes the stream of a task.
    :param known: the change number of the task as `beginning` tells of it.
    :param has_ended: whether its task has, so that nothing is to be waited for.
    :param seconds: until it ends by itself.
    :param look_up: returns, looked up again, whether the caller may read a task.
    :param hang_up: ends the connection to the client; None where the server does not show it.
    """

    runner: Runner
    ids: EventIds
    task_id: str | None
    group: str | None
    since: int | None
    beginning: bytes
    known: int
    has_ended: bool
    seconds: float
    may_read: MayRead
    look_up: Callable[[], MayRead]
    hang_up: Callable[[], None] | None

    def follow(self) -> Iterator[bytes]:
        """Yield what there is, then what comes, until the task ends, the time is up or the server exits."""
        news = Follower(self.hang_up)
        try:
            with self.runner.notifier.telling(news, self.task_id):
                try:
                    for data in self._follow(news):
                        for start in range(0, len(data), PIECE):
                            news.must_be_sent_by = time.monotonic() + LATE_SECONDS
                            yield data[start : start + PIECE]
                            news.must_be_sent_by = None
                        del data  # it may be large, and what comes next may take its time
                except AsyncRouteError as error:
                    # Here, where it can be hung up on: this client may not read either.
                    news.must_be_sent_by = time.monotonic() + LATE_SECONDS
                    yield _ended_early(error)
        except AsyncRouteError as error:
            yield _ended_early(error)

    def _follow(self, news: Follower) -> Iterator[bytes]:
        now = time.monotonic()
        ends_at = now + self.seconds
        look_at = now + LOOK_AGAIN_SECONDS
        beat_at = now + HEARTBEAT_SECONDS
        if self.since is None or self.task_id is None:
            yield self.beginning
            self.beginning = b""
        since = self.since or 0
        while True:
            news.clear()
            found = self.runner.store.events(since, PAGE, self.task_id, self.group)
            # A file that was put in place of the store's, new or from a backup: its numbers say nothing about ours.
            if found.change < since or self.runner.store.secret() != self.ids.key:
                yield retry(RETRY_MS)
                return
            is_over = self.task_id is not None and any(map(_is_end, found.events))
            has_more = len(found.events) == PAGE
            since = found.change
            for piece in self._pieces(found.events):
                yield piece
                beat_at = time.monotonic() + HEARTBEAT_SECONDS
                del piece
            del found
            if is_over or (self.has_ended and not has_more):
                return
            now = time.monotonic()
            if now >= ends_at or self.runner.notifier.is_over:
                yield retry(RETRY_MS)
                return
            if now >= look_at:
                look_at = now + LOOK_AGAIN_SECONDS
                try:
                    self.may_read = self.look_up()
                except Exception as error:
                    # The app's own function refuses, or fails; the client, who comes back, is told so by itself.
                    yield _ended_early(error)
                    return
                if self.task_id is not None and not self._is_there(self.task_id):
                    return
            if now >= beat_at:
                beat_at = now + HEARTBEAT_SECONDS
                yield HEARTBEAT
            if not has_more:
                news.wait(max(min(ends_at, look_at, beat_at) - time.monotonic(), 0.0))

    def _pieces(self, events: Sequence[Event]) -> Iterator[bytes]:
        """Yield what the client is sent of these events, as many in a piece as fit."""
        piece = b""
        for event in events:
            if self._is_known(event) or not self.may_read(event.task):
                continue
            if _is_end(event) and event.task.sse_result:
                # Only now, one at a time: each may be large.
                whole = self.runner.store.get(event.task.id)
                if whole is None or whole.completed_change != event.change:
                    continue  # it was removed, or there is another store
                event = replace(event, task=whole)
            data = frame(event, self.ids)
            if piece and len(piece) + len(data) > PIECE:
                yield piece
                piece = b""
            piece += data
        if piece:
            yield piece

    def _is_known(self, event: Event) -> bool:
        """Return whether a client that has just been given the task as it is knows of this by that."""
        if self.task_id is None or self.since is not None or event.change > self.known:
            return False
        return event.name in (STATE, PROGRESS) and not _is_end(event)

    def _is_there(self, task_id: str) -> bool:
        task = self.runner.store.get(task_id)
        return task is not None and self.may_read(task)


def _ended_early(error: Exception) -> bytes:
    """Log it; return what has the client come back for the rest. What was sent was sent."""
    logger.warning("A stream of events ended early: %s", error)
    return retry(RETRY_MS)


def _is_end(event: Event) -> bool:
    return event.name == STATE and event.data is None and event.task.state.is_terminal
