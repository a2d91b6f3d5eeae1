"""The background thread that follows all unfinished tasks of a client."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .errors import TRANSIENT, ClientError, UnreachableError
from .sse import ServerEvent
from .task import RemoteTask, checked
from .transport import FIRST_PAUSE, LEAST_PAUSE, LONGEST_PAUSE, Stream, Transport, delay

CHECK_SECONDS = 60.0
"""Interval of reads while a stream reports all changes: a removed task has no event."""
LINGER_SECONDS = 10.0
"""How long a stream stays open after the last task. A server notices only after seconds that a
stream was closed, and it has capacity for few streams.
"""
REMEMBERED = 1000
"""Ids of ended tasks that are remembered, because a task can end before its start is answered."""


@dataclass(eq=False)
class _Followed:
    """A task, and the time of its next read (monotonic)."""

    task: RemoteTask
    due: float
    failing_since: float | None = None


class Follower:
    """Follows tasks with one group stream if all of them are the caller's, else by polling.

    Its thread runs only while there are tasks. Thread-safe.
    """

    def __init__(self, transport: Transport, events_url: str) -> None:
        self._transport = transport
        self._events_url = events_url
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._followed: dict[str, _Followed] = {}
        self._ended: deque[str] = deque(maxlen=REMEMBERED)
        self._stream: Stream | None = None
        self._is_live = False
        """Whether the open stream reports each change from now on."""
        self._can_stream = True
        self._last_id: str | None = None
        self._failures = 0
        """Consecutive streams that failed before any data."""
        self._unreachable_since: float | None = None

    def find(self, task_id: str) -> RemoteTask | None:
        """Return the task if it is followed."""
        with self._lock:
            found = self._followed.get(task_id)
        return None if found is None else found.task

    def follow(self, task: RemoteTask, after: float | None) -> RemoteTask:
        """Follow a task until it ends; return the object that is followed.

        This is another object with the same id if another thread has just followed it.

        :param after: seconds until its first read, if it is polled.
        """
        with self._lock:
            found = self._followed.get(task.id)
            if found is not None:
                return found.task
            if task.done():
                return task
            if self._transport.closed.is_set():
                raise ClientError("The client is closed.")
            now = time.monotonic()
            is_streamed = self._can_stream and _has_owner_and_events(task)
            has_ended = task.id in self._ended
            if not is_streamed:
                due = now + _poll_pause(after)
            else:
                due = now + CHECK_SECONDS if self._is_live and not has_ended else now
            self._followed[task.id] = _Followed(task, due)
            if self._stream is not None and not is_streamed:
                self._stream.abort()  # all tasks are polled from now on
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="asyncroute-client", daemon=True
                )
                self._thread.start()
            self._wake.set()
        if has_ended:
            # The thread can be blocked until the stream's next data.
            with suppress(ClientError):
                task.refresh()
        return task

    def close(self) -> None:
        """End the thread; wait at most five seconds for it. Unfinished tasks raise an error."""
        with self._lock:
            left = list(self._followed.values())
            self._followed.clear()
            thread = self._thread
            self._transport.close()
            self._wake.set()
        for followed in left:
            followed.task.fail(ClientError("The client was closed. The task goes on."))
        if thread is not None and thread is not threading.current_thread():
            thread.join(5)

    def _run(self) -> None:
        while True:
            self._wake.clear()  # before the checks, so that no wake-up is lost
            with self._lock:
                for followed in [each for each in self._followed.values() if each.task.done()]:
                    del self._followed[followed.task.id]
                if not self._followed:
                    self._thread = self._last_id = None
                    return
                is_streamed = self._is_streamed()
            try:
                if is_streamed:
                    pause = self._follow_stream()
                else:
                    self._last_id = None
                    pause = self._read_due()
            except Exception as error:  # such as from the authentication of the caller's session
                failure = ClientError(f"The client could not follow its tasks: {error!r}")
                failure.__cause__ = error
                self._fail_all(failure)
                pause = LEAST_PAUSE
            self._wake.wait(pause)

    def _is_streamed(self) -> bool:
        tasks = [followed.task for followed in self._followed.values()]
        return self._can_stream and all(map(_has_owner_and_events, tasks))

    def _follow_stream(self) -> float:
        """Follow all tasks with one stream until it ends or must not be used; return the seconds
        until the next one.
        """
        try:
            stream = self._transport.stream(self._events_url, self._last_id)
        except TRANSIENT as error:
            self._failures += 1
            self._read_all_now()
            return min(delay(error, self._backoff()), LONGEST_PAUSE)
        except ClientError:
            self._can_stream = False
            return 0.0
        with stream:
            with self._lock:
                if self._transport.closed.is_set() or not self._is_streamed():
                    return 0.0
                self._stream = stream
            try:
                self._read_stream(stream)
            except UnreachableError:
                self._read_all_now()
                self._failures += 1
                return self._backoff()
            except ClientError:
                self._can_stream = False
                return 0.0
            finally:
                with self._lock:
                    self._stream = None
                    self._is_live = False
        return _poll_pause(stream.parser.retry)

    def _read_stream(self, stream: Stream) -> None:
        busy_at = time.monotonic()
        for piece in stream.pieces():
            if stream.parser.last_id is not None:
                self._last_id = stream.parser.last_id
                self._is_live = True
                self._failures = 0
            for event in piece:
                self._take(event)
            self._read_due()
            now = time.monotonic()
            with self._lock:
                if any(not followed.task.done() for followed in self._followed.values()):
                    busy_at = now
                if now - busy_at >= LINGER_SECONDS or not self._is_streamed():
                    return

    def _take(self, event: ServerEvent) -> None:
        data: Any = event.data
        task_id = data.get("Id") if isinstance(data, dict) else None
        if not isinstance(task_id, str) or not event.name.startswith("task."):
            return
        with self._lock:
            followed = self._followed.get(task_id)
            if followed is None:
                if event.name == "task.completed":
                    self._ended.append(task_id[:128])
                return
        task = followed.task
        if event.name == "task.progress":
            names = ("Progress", "ProgressMessage")
            task.update({**task.task, **{name: data[name] for name in names if name in data}})
            return
        document = checked(data, self._events_url)
        is_completed = document["State"] == "Completed"
        sse = document.get("Sse")
        has_result = "Result" in document or isinstance(sse, dict) and sse.get("SendResult") is True
        if is_completed and not has_result:
            followed.due = 0.0
        else:
            task.update(document)

    def _read_all_now(self) -> None:
        """Read all tasks after a failure of the stream, which may have missed something."""
        with self._lock:
            for followed in self._followed.values():
                followed.due = 0.0
        self._read_due()

    def _read_due(self) -> float:
        """Read the tasks whose time has come; return the seconds until the next one."""
        with self._lock:
            waiting = sorted(self._followed.values(), key=lambda followed: followed.due)
        for followed in waiting:
            if followed.due > time.monotonic() or self._transport.closed.is_set():
                break
            if not followed.task.done() and not self._read(followed):
                return self._backoff()
        dues = [followed.due for followed in waiting if not followed.task.done()]
        return max(min(dues, default=0.0) - time.monotonic(), 0.0)

    def _read(self, followed: _Followed) -> bool:
        """Read a task; return whether to read the next one at once."""
        try:
            after = followed.task.read(once=True)
        except TRANSIENT as error:
            now = time.monotonic()
            followed.due = now + min(delay(error, 1.0), LONGEST_PAUSE)
            if isinstance(error, UnreachableError):
                is_first = self._unreachable_since is None
                self._unreachable_since = self._unreachable_since or now
                if now - self._unreachable_since >= self._transport.retry_for:
                    self._fail_all(error)
                return is_first  # one lost response does not delay the other tasks
            self._unreachable_since = None
            followed.failing_since = followed.failing_since or now
            if now - followed.failing_since >= self._transport.retry_for:
                followed.task.fail(error)
            return True
        except ClientError as error:
            followed.task.fail(error)
            return True
        self._unreachable_since = followed.failing_since = None
        pause = CHECK_SECONDS if self._is_live else _poll_pause(after)
        followed.due = time.monotonic() + pause
        return True

    def _backoff(self) -> float:
        return float(min(FIRST_PAUSE * 2 ** min(self._failures, 10), LONGEST_PAUSE))

    def _fail_all(self, error: ClientError) -> None:
        self._unreachable_since = None
        with self._lock:
            left = list(self._followed.values())
        for followed in left:
            followed.task.fail(error)


def _has_owner_and_events(task: RemoteTask) -> bool:
    return "User" in task.task and "Sse" in task.task


def _poll_pause(after: float | None) -> float:
    return 1.0 if after is None else min(max(after, LEAST_PAUSE), LONGEST_PAUSE)
