"""Tasks in the memory of this process (``memory://``): for tests, for demos, and where losing them at a restart is right."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from msgspec.structs import replace

from ..delivery import PENDING, Delivery
from ..errors import IdTaken, KeyTaken, TooManyTasks
from ..execution import ViewEvent
from ..finalizers import when_gone
from ..query import Condition, Position, Sort, is_after, matches, ordered
from ..snapshot import Body
from ..start_key import StartKey
from ..states import State
from ..task import AsyncRouteTask
from .backlog import oldest
from .base import (
    AHEAD_US,
    LARGE_RESULT,
    Claim,
    Expect,
    News,
    Readers,
    TaskStore,
)
from .events import Events
from .memory_events import MemoryEvents
from .memory_outbox import MemoryOutbox


class MemoryTaskStore(TaskStore):
    """Keeps tasks in dicts under one lock. Readers get records, which never change."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: dict[str, AsyncRouteTask] = {}
        self._requests: dict[str, tuple[bytes, Body | None]] = {}
        self._grants: dict[str, frozenset[tuple[str, str]]] = {}
        self._waiting: dict[str, None] = {}
        self._finished: dict[str, None] = {}
        self._unfinished: dict[str, set[str]] = {}
        self._keys: dict[str, tuple[str, str]] = {}
        self._key_names: dict[str, str] = {}
        self._values: dict[str, tuple[bytes, int]] = {}
        self._versions = 0
        self._change = 0
        self._events = MemoryEvents()
        self.outbox: MemoryOutbox = MemoryOutbox(self._lock, self._tasks, self._write)
        self._secret = os.urandom(32)
        # Bodies of tasks that wait are files; they go with the store, which nobody closes for good.
        when_gone(self, _close_bodies, self._requests)

    def open(self) -> None:
        """There is nothing to open."""

    def close(self) -> None:
        """There is nothing to close: tasks stay as long as the store does."""

    def add(
        self,
        task: AsyncRouteTask,
        request: bytes,
        body: Body | None,
        grants: Collection[tuple[str, str]],
        key: StartKey | None = None,
        quota: int | None = None,
        delivery: Delivery | None = None,
    ) -> None:
        with self._lock:
            if key is not None and key.name in self._keys:
                raise KeyTaken("A task was started with this key.")
            if quota is not None and len(self._unfinished.get(task.user or "", ())) >= quota:
                raise TooManyTasks.of(quota)
            if task.id in self._tasks:
                raise IdTaken(f"A task with the id {task.id!r} exists.")
            self._change += 1
            self._tasks[task.id] = replace(task, change=self._change)
            self._requests[task.id] = (request, body)
            self._waiting[task.id] = None
            self._unfinished.setdefault(task.user or "", set()).add(task.id)
            if delivery is not None:
                self.outbox.put(task.id, delivery)
            if grants:
                self._grants[task.id] = frozenset(grants)
            if key is not None:
                self._keys[key.name] = (task.id, key.fingerprint)
                self._key_names[task.id] = key.name

    def get(self, task_id: str) -> AsyncRouteTask | None:
        return self._tasks.get(task_id)

    def started_with(self, key_name: str) -> tuple[AsyncRouteTask, str] | None:
        with self._lock:
            found = self._keys.get(key_name)
            return None if found is None else (self._tasks[found[0]], found[1])

    def claim(self, task_id: str, owner: str, now_us: int) -> Claim | None:
        with self._lock:
            task = self._tasks.get(task_id)
            if task is None or task.state is not State.NOT_STARTED:
                return None
            started = max(now_us, task.created_us)
            expires = None if task.timeout_us is None else started + task.timeout_us
            values = {"state": State.RUNNING, "owner": owner, "epoch": task.epoch + 1, "started_us": started}
            return Claim(self._write(task, {**values, "expires_us": expires}), self._requests[task_id][0])

    def body(self, task_id: str) -> Body:
        with self._lock:
            request = self._requests.get(task_id)
            body = None if request is None else request[1]
            if request is not None:
                self._requests[task_id] = (request[0], None)
        return Body() if body is None else body

    def update(self, task_id: str, expect: Expect, values: dict[str, Any]) -> AsyncRouteTask | None:
        with self._lock:
            task = self._tasks.get(task_id)
            if task is None or not _is_as_expected(task, expect):
                return None
            if values.get("completed_us") is not None:
                begun = task.created_us if task.started_us is None else task.started_us
                values = {**values, "completed_us": max(values["completed_us"], begun)}
            return self._write(task, values)

    def add_events(self, task_id: str, expect: Expect, sent: Sequence[ViewEvent]) -> bool:
        with self._lock:
            task = self._tasks.get(task_id)
            if task is None or not _is_as_expected(task, expect):
                return False
            self._change = self._events.put(task_id, task.epoch, self._change, sent)
            return True

    def delete(self, task_id: str, expect: Expect) -> bool:
        with self._lock:
            task = self._tasks.get(task_id)
            if task is None or not _is_as_expected(task, expect):
                return False
            self._change += 1
            del self._tasks[task_id]
            self._grants.pop(task_id, None)
            self._waiting.pop(task_id, None)
            self._finished.pop(task_id, None)
            self._settle(task)
            self._keys.pop(self._key_names.pop(task_id, ""), None)
            self._drop_request(task_id)
            self._events.drop(task_id)
            self.outbox.drop(task_id)
            return True

    def query(
        self,
        conditions: Sequence[Condition],
        sort: Sort,
        limit: int,
        position: Position | None,
        readers: Readers | None,
    ) -> list[AsyncRouteTask]:
        with self._lock:
            tasks = list(self._tasks.values())
        found = (
            task
            for task in ordered(tasks, sort)
            if matches(task, conditions)
            and (position is None or is_after(task, sort, position))
            and (readers is None or self._may_list(task, readers))
        )
        return [_without_large_result(task) for task in islice(found, limit)]

    def waiting(self, most: Mapping[str, int], before_us: int) -> list[tuple[str, str]]:
        with self._lock:
            tasks = [self._tasks[task_id] for task_id in self._waiting]
        fit = [
            task for task in tasks if task.endpoint in most and not before_us <= task.created_us <= before_us + AHEAD_US
        ]
        fit.sort(key=lambda task: task.created_us)
        return oldest(((task.id, task.endpoint) for task in fit), most)

    def outlived(self, now_us: int, limit: int) -> list[str]:
        with self._lock:
            tasks = [self._tasks[task_id] for task_id in self._finished]
        fit = (
            task
            for task in tasks
            if not task.stopping
            and task.callback_state not in PENDING
            and (task.completed_us or 0) + task.retention_us < now_us
        )
        return [task.id for task in islice(fit, limit)]

    def news(self, since: int) -> News:
        with self._lock:
            change = self._change
            tasks = [task for task in self._tasks.values() if task.change > since] if 0 <= since < change else []
            sent = self._events.written(since) if 0 <= since < change else ()
        return News(change, sorted(tasks, key=lambda task: task.change), sent)

    def newest(self) -> int:
        return self._change

    def events(self, since: int, most: int, task_id: str | None = None, group: str | None = None) -> Events:
        with self._lock:
            asked = (
                list(self._tasks.values())
                if task_id is None
                else [self._tasks[task_id]]
                if task_id in self._tasks
                else []
            )
            changed = [
                task for task in asked if task.sse_group is not None and (group is None or task.sse_group == group)
            ]
            found = self._events.since(since, changed)[:most]
            return Events(found[-1].change if len(found) == most else self._change, found)

    def secret(self) -> bytes:
        return self._secret

    def read_value(self, key: str) -> tuple[bytes, int] | None:
        return self._values.get(key)

    def write_value(self, key: str, value: bytes | None, version: int | None) -> bool:
        with self._lock:
            present = self._values.get(key)
            if version is not None and version != (0 if present is None else present[1]):
                return False
            if value is None:
                return self._values.pop(key, None) is not None
            self._versions += 1
            self._values[key] = (value, self._versions)
            return True

    def value_keys(self) -> Iterable[str]:
        with self._lock:
            return sorted(self._values)

    def _write(self, task: AsyncRouteTask, values: dict[str, Any]) -> AsyncRouteTask:
        self._change += 1
        state = values.get("state")
        if state is State.NOT_STARTED:
            self._events.keep_states(task)
            values = {**values, "waiting_change": None, "started_change": None}
        elif state is not None:
            begun = "started_change" if state is State.RUNNING else "completed_change"
            waiting = task.change if task.state is State.NOT_STARTED else task.waiting_change
            values = {**values, "waiting_change": waiting, begun: self._change}
        changed = replace(task, **values, revision=task.revision + 1, change=self._change)
        self._tasks[task.id] = changed
        if changed.state is not task.state:
            self._waiting.pop(task.id, None)
            if changed.state is State.NOT_STARTED:
                self._waiting[task.id] = None
            elif changed.state.is_terminal:
                self._finished[task.id] = None
            if changed.state.is_terminal:
                self._settle(task)
                self._drop_request(task.id)
                self.outbox.make_due(task.id)
        return changed

    def _settle(self, task: AsyncRouteTask) -> None:
        """Count a task no longer as one that its user has yet to see finished."""
        held = self._unfinished.get(task.user or "", set())
        held.discard(task.id)
        if not held:
            self._unfinished.pop(task.user or "", None)

    def _drop_request(self, task_id: str) -> None:
        _, body = self._requests.pop(task_id, (b"", None))
        if body is not None:
            body.close()

    def _may_list(self, task: AsyncRouteTask, readers: Readers) -> bool:
        if task.user is None:
            return readers.anonymous
        return task.user == readers.user or not self._grants.get(task.id, frozenset()).isdisjoint(readers.granted)


def _close_bodies(requests: Mapping[str, tuple[bytes, Body | None]]) -> None:
    for _, body in requests.values():
        if body is not None:
            body.close()


def _is_as_expected(task: AsyncRouteTask, expect: Expect) -> bool:
    return (
        task.state in expect.states
        and (expect.owner is None or task.owner == expect.owner)
        and (expect.epoch is None or task.epoch == expect.epoch)
        and (expect.stopping is None or task.stopping == expect.stopping)
    )


def _without_large_result(task: AsyncRouteTask) -> AsyncRouteTask:
    if task.result_json is not None and len(task.result_json) > LARGE_RESULT:
        return replace(task, result_json=None)
    return task
