"""A stream of events: what it sends, when it beats and when it ends.

`sse` makes one for a request; the server's thread iterates over it. It reads the store whenever it is told that there is
something new, from where it was: so it is never behind what it has sent, needs no queue of its own, and its client may be
as slow as it likes. It holds no connection of the store, no lock and no context meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import AsyncRouteError
from ..runner import Runner
from ..stores.events import PROGRESS, STATE, Event
from ..task import AsyncRouteTask
from .event_ids import EventIds
from .frames import HEARTBEAT, frame, retry

logger = logging.getLogger("flask_asyncroute")

HEARTBEAT_SECONDS = 10.0
LOOK_AGAIN_SECONDS = 30.0
"""How often the caller is looked up again."""
PAGE = 100
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
    :param seconds: until it ends by itself.
    :param look_up: returns, looked up again, whether the caller may read a task.
    """

    runner: Runner
    ids: EventIds
    task_id: str | None
    group: str | None
    since: int | None
    beginning: bytes
    known: int
    seconds: float
    may_read: MayRead
    look_up: Callable[[], MayRead]

    def whole(self) -> Iterator[bytes]:
        """Yield all that there is of a finished task."""
        if self.since is None:
            yield self.beginning
        since, has_more = self.since or 0, True
        while has_more:
            data, since, _, has_more = self._read(since)
            if data:
                yield data

    def follow(self) -> Iterator[bytes]:
        """Yield what there is, then what comes, until the task ends, the time is up or the server exits."""
        try:
            yield from self._follow()
        except AsyncRouteError as error:
            # What was sent was sent; the client comes back for the rest.
            logger.warning("A stream of events ended early: %s", error)
            yield retry(RETRY_MS)

    def _follow(self) -> Iterator[bytes]:
        now = time.monotonic()
        ends_at = now + self.seconds
        look_at = now + LOOK_AGAIN_SECONDS
        beat_at = now + HEARTBEAT_SECONDS
        since = self.since
        with self.runner.notifier.following(self.task_id) as news:
            if since is None or self.task_id is None:
                yield self.beginning
                self.beginning = b""
            since = since or 0
            while True:
                news.clear()
                data, since, is_over, has_more = self._read(since)
                if data:
                    yield data
                    del data  # not to be held until the next
                    beat_at = time.monotonic() + HEARTBEAT_SECONDS
                if is_over:
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
                        logger.warning("A stream of events ended early: %s", error)
                        yield retry(RETRY_MS)
                        return
                    if self.task_id is not None and not self._is_there(self.task_id):
                        return
                if now >= beat_at:
                    beat_at = now + HEARTBEAT_SECONDS
                    yield HEARTBEAT
                if not has_more:
                    news.wait(max(min(ends_at, look_at, beat_at) - time.monotonic(), 0.0))

    def _read(self, since: int) -> tuple[bytes, int, bool, bool]:
        """Return the next events as they are sent, the number they go up to, whether the task's end is among them, and
        whether there is more already.
        """
        found = self.runner.store.events(since, PAGE, self.task_id, self.group)
        fit = [event for event in found.events if not self._is_known(event) and self.may_read(event.task)]
        is_over = self.task_id is not None and any(_is_end(event) for event in found.events)
        return b"".join(frame(event, self.ids) for event in fit), found.change, is_over, len(found.events) == PAGE

    def _is_known(self, event: Event) -> bool:
        """Return whether a client that has just been given the task as it is knows of this by that."""
        if self.task_id is None or self.since is not None or event.change > self.known:
            return False
        return event.name in (STATE, PROGRESS) and not _is_end(event)

    def _is_there(self, task_id: str) -> bool:
        task = self.runner.store.get(task_id)
        return task is not None and self.may_read(task)


def _is_end(event: Event) -> bool:
    return event.name == STATE and event.data is None and event.task.state.is_terminal
