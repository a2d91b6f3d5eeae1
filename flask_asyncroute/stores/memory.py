"""The store in process memory (``memory://``), for apps that may lose tasks at a restart."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from msgspec.structs import replace

from ..background import when_gone
from ..callbacks.model import NOT_STARTED, PENDING, RUNNING, Delivery
from ..encoding import encode_json
from ..errors import ConfigurationError, IdTaken, KeyTaken, TooManyTasks, UniqueTaken
from ..query import Condition, Position, Sort, is_after, matches, ordered
from ..snapshot import Body
from ..task import AsyncRouteTask, State
from . import base
from .base import Claim, Event, Events, Expect, Readers, StartKey, TaskStore, ViewEvent, Waiting
from .outbox import AT_ONCE, LONGEST_US, PER_HOST, Due, Outbox


def check_setting(label: str, setting: str) -> None:
    if setting != "memory://":
        raise ConfigurationError(f"{label} must be exactly 'memory://'; remove the rest.")


def make_store(setting: str, folder: str, namespace: str, create_tables: bool) -> MemoryTaskStore:
    return MemoryTaskStore()


@dataclass(slots=True)
class _Entry:
    task: AsyncRouteTask
    request: bytes
    body: Body | None
    grants: Collection[tuple[str, str]]
    key: StartKey | None
    sent: list[tuple[int, str, bytes]] = field(default_factory=list)
    """View events, and states of earlier runs, as change number, name and data."""
    last_sent: tuple[int, int] = (0, 0)  # epoch and number of the last view event

    def keep(self, change: int, name: str, data: bytes) -> None:
        self.sent.append((change, name, data))
        del self.sent[: -base.MAX_EVENTS]

    def drop_request(self) -> None:
        if self.body is not None:
            self.body.close()
        self.request, self.body = b"", None

    def events(self, since: int) -> Iterator[Event]:
        if max(self.task.change, self.sent[-1][0] if self.sent else 0) <= since:
            return
        task = replace(self.task, result_json=None)
        waiting = task.change if task.state is State.NOT_STARTED else task.waiting_change
        for change, state in (
            (waiting, State.NOT_STARTED),
            (task.started_change, State.RUNNING),
            (task.completed_change, task.state),
        ):
            if change is not None and change > since:
                yield Event(change, base.STATE, task.as_in(state))
        is_progress = task.state is State.RUNNING and task.change != task.started_change
        if is_progress and task.change > since:
            yield Event(task.change, base.PROGRESS, task)
        for change, name, data in self.sent:
            if change > since:
                yield Event(change, name, task, data)


@dataclass(slots=True)
class _Callback:
    entry: _Entry
    delivery: Delivery
    due_us: int | None = None
    attempts: int = 0
    holder: str | None = None

    def is_due(self, now_us: int) -> bool:
        if self.due_us is None or self.holder is not None:
            return False
        return not now_us < self.due_us <= now_us + LONGEST_US


class MemoryTaskStore(TaskStore):
    """Stores tasks in a dict under one lock. Records are immutable."""

    label = "memory://"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: dict[str, _Entry] = {}
        self._callbacks: dict[str, _Callback] = {}
        self._start_by: dict[str, int] = {}
        """The `start_by_us` of each NotStarted task that has one, so that the check every second
        does not read all tasks.
        """
        self._start_at: dict[str, int] = {}  # the same for `start_at_us`
        self._unfinished: Counter[str | None] = Counter()
        self._keys: dict[str, str] = {}
        self._values: dict[str, tuple[bytes, int]] = {}
        self._versions = 0
        self._change = 0
        self._secret = os.urandom(32)
        self.outbox: MemoryOutbox = MemoryOutbox(self)
        # Close the bodies, which can be temporary files.
        when_gone(self, _close_bodies, self._tasks)

    def open(self) -> None: ...

    def close(self) -> None:
        """Do nothing, because the tasks exist as long as this object."""

    def secret(self) -> bytes:
        return self._secret

    def add(
        self, task: AsyncRouteTask, request: bytes, body: Body | None,
        grants: Collection[tuple[str, str]], key: StartKey | None = None, quota: int | None = None,
        delivery: Delivery | None = None,
    ) -> None:  # fmt: skip
        with self._lock:
            if task.unique_key in self._keys:
                raise UniqueTaken("An unfinished task has this unique key.")
            if key is not None and key.name in self._keys:
                raise KeyTaken("Another task has this Idempotency-Key.")
            if quota is not None and self._unfinished[task.user] >= quota:
                raise TooManyTasks.of(quota)
            if task.id in self._tasks:
                raise IdTaken(f"Another task has the id {task.id!r}.")
            self._change += 1
            task = replace(task, change=self._change)
            entry = self._tasks[task.id] = _Entry(task, request, body, grants, key)
            self._note_waiting(task)
            self._unfinished[task.user] += 1
            if task.unique_key is not None:
                self._keys[task.unique_key] = task.id
            if key is not None:
                self._keys[key.name] = task.id
            if delivery is not None:
                self._callbacks[task.id] = _Callback(entry, delivery)

    def get(self, task_id: str) -> AsyncRouteTask | None:
        entry = self._tasks.get(task_id)
        return None if entry is None else entry.task

    def started_with(self, key_name: str) -> tuple[AsyncRouteTask, str] | None:
        with self._lock:
            entry = self._tasks.get(self._keys.get(key_name, ""))
            if entry is None:
                return None
            is_key = entry.key is not None and entry.key.name == key_name
            return entry.task, entry.key.fingerprint if is_key and entry.key is not None else ""

    def count_unfinished(self, user: str, limit: int) -> int:
        return min(self._unfinished[user], limit)

    def claim(self, task_id: str, owner: str, now_us: int) -> Claim | None:
        with self._lock:
            entry = self._tasks.get(task_id)
            if entry is None or not base.can_start(entry.task, now_us, self.now_us()):
                return None
            task = entry.task
            started = max(now_us, task.created_us)
            expires = None if task.timeout_us is None else started + task.timeout_us
            values = {
                "state": State.RUNNING, "owner": owner, "epoch": task.epoch + 1,
                "started_us": started, "expires_us": expires,
            }  # fmt: skip
            if task.retry_json is not None:
                values["attempt"] = task.attempt or 1
            return Claim(self._write(entry, values), entry.request)

    def body(self, task_id: str) -> Body:
        with self._lock:
            entry = self._tasks.get(task_id)
            # A later run needs the body again.
            return Body() if entry is None or entry.body is None else entry.body.copy()

    def update(self, task_id: str, expect: Expect, values: dict[str, Any]) -> AsyncRouteTask | None:
        with self._lock:
            entry = self._expected(task_id, expect)
            if entry is None:
                return None
            if values.get("completed_us") is not None:
                task = entry.task
                start_us = task.created_us if task.started_us is None else task.started_us
                values = {**values, "completed_us": max(values["completed_us"], start_us)}
            return self._write(entry, values)

    def add_events(
        self, task_id: str, expect: Expect, sent: Sequence[ViewEvent]
    ) -> Sequence[int] | None:
        with self._lock:
            entry = self._expected(task_id, expect)
            if entry is None:
                return None
            before = self._change
            for event in sent:
                number = entry.task.epoch, event.number
                if number > entry.last_sent:
                    self._change += 1
                    entry.keep(self._change, event.name, event.data)
                    entry.last_sent = number
            return range(before + 1, self._change + 1)

    def delete(self, task_id: str, expect: Expect) -> str | None:
        with self._lock:
            entry = self._expected(task_id, expect)
            if entry is None:
                return None
            self._change += 1
            del self._tasks[task_id]
            self._callbacks.pop(task_id, None)
            self._forget_waiting(entry.task)
            if not entry.task.state.is_terminal:
                self._count_finished(entry.task)
            if entry.key is not None:
                del self._keys[entry.key.name]
            entry.drop_request()
            return entry.task.endpoint

    def query(
        self, conditions: Sequence[Condition], sort: Sort, limit: int, position: Position | None,
        readers: Readers | None,
    ) -> list[AsyncRouteTask]:  # fmt: skip
        with self._lock:
            listed = [entry.task for entry in self._tasks.values() if _may_list(entry, readers)]
        found = (task for task in ordered(listed, sort) if matches(task, conditions))
        if position is not None:
            found = (task for task in found if is_after(task, sort, position))
        return [_without_large_result(task) for task in islice(found, limit)]

    def past_retention(self, now_us: int, limit: int) -> list[str]:
        with self._lock:
            tasks = [entry.task for entry in self._tasks.values()]
        found = (
            task.id
            for task in tasks
            if task.completed_us is not None
            and task.completed_us + task.retention_us < now_us
            and not task.stopping
            and task.callback_state not in PENDING
        )
        return list(islice(found, limit))

    def not_started_in_time(self, now_us: int, owner: str, limit: int) -> list[AsyncRouteTask]:
        with self._lock:
            expired = sorted((at, name) for name, at in self._start_by.items() if at <= now_us)
            tasks = (self._tasks[name].task for _, name in expired)
            return list(islice((task for task in tasks if task.owner in (None, owner)), limit))

    def waiting(
        self, most: Mapping[str, int], before_us: int | None, start_before_us: int | None = None,
        owner: str = "",
    ) -> list[Waiting]:  # fmt: skip
        before = (before_us or 0) if start_before_us is None else start_before_us
        with self._lock:
            due = [(at, self._tasks[name].task) for name, at in self._start_at.items()]
        return base.first_due(
            (
                Waiting(task.id, task.endpoint, at)
                for at, task in due
                if at < before and task.owner in (None, owner)
            ),
            most,
        )

    def newest(self) -> int:
        return self._change

    def events(
        self, since: int, most: int, task_id: str | None = None, group: str | None = None
    ) -> Events:
        with self._lock:
            candidates = self._tasks.values() if task_id is None else (self._tasks.get(task_id),)
            found = [
                event
                for entry in candidates
                if entry is not None
                and entry.task.sse_group is not None
                and (group is None or entry.task.sse_group == group)
                for event in entry.events(since)
            ]
            newest = self._change
        found = sorted(found, key=lambda event: event.change)[:most]
        return Events(found[-1].change if len(found) == most else newest, found)

    def read_value(self, key: str) -> tuple[bytes, int] | None:
        return self._values.get(key)

    def write_value(self, key: str, value: bytes | None, version: int | None) -> bool:
        with self._lock:
            _, present = self._values.get(key, (b"", 0))
            if version is not None and version != present:
                return False
            if value is None:
                return self._values.pop(key, None) is not None
            self._versions += 1
            self._values[key] = (value, self._versions)
            return True

    def value_keys(self) -> Iterable[str]:
        with self._lock:
            return sorted(self._values)

    def _expected(self, task_id: str, expect: Expect) -> _Entry | None:
        entry = self._tasks.get(task_id)
        if (
            entry is None
            or entry.task.state not in expect.states
            or expect.owner not in (None, entry.task.owner)
            or expect.epoch not in (None, entry.task.epoch)
            or expect.stopping not in (None, entry.task.stopping)
        ):
            return None
        return entry

    def _write(self, entry: _Entry, values: dict[str, Any]) -> AsyncRouteTask:
        task = entry.task
        self._change += 1
        state = values.get("state")
        if state is State.NOT_STARTED:
            # Keep these states as events: the next run overwrites them.
            for lost, change in (
                (State.NOT_STARTED, task.waiting_change),
                (State.RUNNING, task.started_change),
            ):
                if change is not None:
                    entry.keep(change, base.STATE, encode_json(task.as_in(lost).to_wire()))
            values = {**values, "waiting_change": None, "started_change": None}
        elif state is not None:
            change_name = "started_change" if state is State.RUNNING else "completed_change"
            waiting = task.change if task.state is State.NOT_STARTED else task.waiting_change
            values = {**values, "waiting_change": waiting, change_name: self._change}
        entry.task = replace(task, **values, revision=task.revision + 1, change=self._change)
        if state is not None:
            self._note_waiting(entry.task)
        if entry.task.state.is_terminal and not task.state.is_terminal:
            self._count_finished(task)
            entry.drop_request()
            if task.id in self._callbacks:
                self._callbacks[task.id].due_us = AT_ONCE
        return entry.task

    def _note_waiting(self, task: AsyncRouteTask) -> None:
        self._forget_waiting(task)
        if task.state is State.NOT_STARTED and task.start_by_us is not None:
            self._start_by[task.id] = task.start_by_us
        if task.state is State.NOT_STARTED and task.start_at_us is not None:
            self._start_at[task.id] = task.start_at_us

    def _forget_waiting(self, task: AsyncRouteTask) -> None:
        self._start_by.pop(task.id, None)
        self._start_at.pop(task.id, None)

    def _count_finished(self, task: AsyncRouteTask) -> None:
        if task.unique_key is not None:
            del self._keys[task.unique_key]
        self._unfinished[task.user] -= 1
        if not self._unfinished[task.user]:
            del self._unfinished[task.user]


def _close_bodies(tasks: Mapping[str, _Entry]) -> None:
    for entry in tasks.values():
        entry.drop_request()


def _may_list(entry: _Entry, readers: Readers | None) -> bool:
    if readers is None:
        return True
    task = entry.task
    if task.user is None and task.permission_json is None:
        return readers.anonymous
    is_owner = task.user is not None and task.user == readers.user
    return is_owner or any(grant in entry.grants for grant in readers.granted)


def _without_large_result(task: AsyncRouteTask) -> AsyncRouteTask:
    is_large = len(task.result_json or b"") > base.LARGE_RESULT
    return replace(task, result_json=None) if is_large else task


class MemoryOutbox(Outbox):
    """Stores the callbacks of a `MemoryTaskStore`, protected by its lock."""

    def __init__(self, store: MemoryTaskStore) -> None:
        self._store = store
        self._callbacks = store._callbacks

    def next_due(self, now_us: int) -> int | None:
        with self._store._lock:
            free = [callback for callback in self._callbacks.values() if callback.holder is None]
            if any(callback.is_due(now_us) for callback in free):
                return AT_ONCE
            return min(
                (callback.due_us for callback in free if callback.due_us is not None), default=None
            )

    def claim(self, holder: str, now_us: int, limit: int) -> list[Due]:
        with self._store._lock:
            callbacks = self._callbacks.values()
            held = Counter(
                callback.delivery.host for callback in callbacks if callback.holder is not None
            )
            due = [callback for callback in callbacks if callback.is_due(now_us)]
            claimed: list[Due] = []
            for callback in sorted(due, key=lambda callback: callback.due_us or 0):
                if len(claimed) < limit and held[callback.delivery.host] < PER_HOST:
                    held[callback.delivery.host] += 1
                    callback.holder = holder
                    task = callback.entry.task
                    if task.callback_state == NOT_STARTED:
                        task = self._change(callback, RUNNING, task.callback_attempts)
                    claimed.append(Due(task, callback.delivery, callback.attempts))
            return claimed

    def record_attempt(
        self, task_id: str, holder: str, state: str, due_us: int | None
    ) -> AsyncRouteTask | None:
        with self._store._lock:
            callback = self._callbacks.get(task_id)
            if callback is None or callback.holder != holder:
                return None
            callback.holder = None
            callback.attempts += 1
            callback.due_us = due_us
            if state not in PENDING:
                callback.delivery = replace(callback.delivery, headers={})
            return self._change(callback, state, callback.entry.task.callback_attempts + 1)

    def release(self, holder: str, keep: Collection[str] = ()) -> None:
        with self._store._lock:
            for task_id, callback in self._callbacks.items():
                if callback.holder == holder and task_id not in keep:
                    callback.holder = None

    def redeliver(self, task_id: str, headers: Mapping[str, str]) -> AsyncRouteTask | None:
        with self._store._lock:
            callback = self._callbacks.get(task_id)
            if callback is None or not callback.entry.task.state.is_terminal:
                return None
            if callback.holder is not None:
                return callback.entry.task
            if callback.entry.task.callback_state not in PENDING:
                callback.delivery = replace(callback.delivery, headers=dict(headers))
            callback.due_us = AT_ONCE
            callback.attempts = 0
            return self._change(callback, NOT_STARTED, 0)

    def _change(self, callback: _Callback, state: str, attempts: int) -> AsyncRouteTask:
        values = {"callback_state": state, "callback_attempts": attempts}
        return self._store._write(callback.entry, values)
