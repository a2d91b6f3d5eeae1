"""The SQL task store. Each method is one short transaction."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from secrets import randbits
from typing import Any, TypeVar

from ...callbacks.model import Delivery
from ...errors import IdTaken, UniqueTaken
from ...query import Condition, Position, Sort
from ...snapshot import Body
from ...task import AsyncRouteTask, State
from .. import base
from ..base import Claim, Events, Expect, Readers, SharedTaskStore, StartKey, ViewEvent, Waiting
from . import queries, side_tables
from .database import Cursor, Database, Duplicate, ensure_written
from .events import EventLog
from .joined import JoinedTransaction
from .migrations import Namespace
from .outbox import SQLOutbox
from .queries import Queries
from .rows import columns_of, record_of, row_of
from .statements import CHANNEL, DELAYED, SUBMITTED, Statements, expectation
from .workers import SQLWorkers

T = TypeVar("T")

WAITING_ENDPOINTS = 100  # Maximum per statement: each has three parts; SQLite allows 500.


class _RollBack(Exception):
    """Raised inside a transaction to roll it back."""


class SQLTaskStore(SharedTaskStore):
    """Stores the tasks of one namespace in a database that several processes share.

    After a connection is lost during a commit, the store checks whether the commit succeeded, and
    writes again if it did not.
    """

    def __init__(self, database: Database, namespace: str, create_tables: bool) -> None:
        self.label = database.label
        self.has_unpublished = database.can_join
        self._database = database
        self._sql = Statements(database.dialect.name)
        self._queries = Queries(database.dialect)
        self._namespace = Namespace(database, self._sql, namespace, create_tables)
        self._events = EventLog(database, self._sql, self._namespace)
        self.outbox: SQLOutbox = SQLOutbox(database, self._sql, self._namespace)
        self.workers: SQLWorkers = SQLWorkers(database, self._sql, self._namespace, self.outbox)

    @property
    def _ns(self) -> int:
        return self._namespace.key

    def open(self) -> None:
        self._namespace.open()

    def close(self) -> None:
        self._database.close()

    def add(
        self, task: AsyncRouteTask, request: bytes, body: Body | None,
        grants: Collection[tuple[str, str]], key: StartKey | None = None, quota: int | None = None,
        delivery: Delivery | None = None,
    ) -> None:  # fmt: skip
        sql, ns = self._sql, self._ns
        row = row_of(task)
        row.update(ns=ns, request=request)

        is_plain = task.unique_key is None and body is None and delivery is None

        def add() -> bool:
            if is_plain and not grants and key is None and quota is None:
                self._database.write_one(sql.add_task, row)
                return True
            return self._database.write(add_with_rows)

        def add_with_rows(cursor: Cursor) -> bool:
            if task.unique_key is not None:
                # This comes before other locks, because it can wait for a transaction of the app.
                added = cursor.execute(sql.add_unique_key, row).fetchone()
                if added is None:
                    raise UniqueTaken("An unfinished task has this unique key.")
            if key is not None or quota is not None:
                side_tables.add_key(cursor, sql, ns, task, key, quota)
            cursor.execute(sql.add_task, row)
            self.add_related(cursor, row, body, grants, delivery)
            return True

        def find() -> bool | None:
            found = self.get(task.id)
            if found is None:
                return None
            expected = (task.created_us, task.url, task.user)
            return (found.created_us, found.url, found.user) == expected or None

        try:
            ensure_written(add, find)
        except Duplicate:
            raise IdTaken(f"Another task has the id {task.id!r}.") from None
        if body is not None:
            body.close()

    def add_related(
        self, cursor: Cursor, row: Mapping[str, Any], body: Body | None,
        grants: Collection[tuple[str, str]], delivery: Delivery | None,
    ) -> None:  # fmt: skip
        """Add the rows of a new task in other tables, except its keys.

        :param row: the columns of the task.
        """
        task_id = row["id"]
        if delivery is not None:
            self.outbox.put(cursor, task_id, delivery)
        for kind, name in set(grants):
            reader = queries.reader_key(kind, name)
            cursor.execute(self._sql.add_grant, {**row, "task_id": task_id, "reader": reader})
        if body is not None:
            side_tables.add_body(cursor, self._sql, self._ns, task_id, body)

    def joined(self, connection: Any) -> base.Joined:
        if not self.has_unpublished:
            return super().joined(connection)
        self.open()
        return JoinedTransaction(connection, self._sql, self._namespace, self.add_related)

    def unpublished(self, limit: int) -> list[AsyncRouteTask]:
        self.open()
        values = {"ns": self._ns, "limit": limit}
        return list(map(record_of, self._database.fetch_all(self._sql.unpublished_tasks, values)))

    def publish(self, task_id: str) -> AsyncRouteTask | None:
        # After an unknown commit, the next call of `unpublished` shows whether to try again.
        row = self._database.write_one(self._sql.publish_task, self._which(task_id))
        return None if row is None else record_of(row)

    def get(self, task_id: str) -> AsyncRouteTask | None:
        which = {"ns": self._namespace.key, "task_id": task_id}
        row = self._database.fetch_one(self._sql.get_task, which)
        return None if row is None else record_of(row)

    def started_with(self, key_name: str) -> tuple[AsyncRouteTask, str] | None:
        which = {"ns": self._ns, "name": key_name}
        row = self._database.fetch_one(self._sql.get_task_of_key, which)
        return None if row is None else (record_of(row), row.fingerprint)

    def count_unfinished(self, user: str, limit: int) -> int:
        values = {"ns": self._ns, "user": user, "limit": limit}
        row = self._database.fetch_one(self._sql.count_unfinished, values)
        return 0 if row is None else row.unfinished

    def now_us(self) -> int:
        return self._database.now_us()

    def claim(self, task_id: str, owner: str, now_us: int) -> Claim | None:
        values = {
            "ns": self._ns, "task_id": task_id, "owner": owner, "now": now_us,
            "store_now": self.now_us(),
        }  # fmt: skip

        def find() -> Claim | None:
            row = self._database.fetch_one(self._sql.get_request, values)
            if row is None:
                return None
            task = record_of(row)
            is_ours = task.owner == owner and task.started_us == max(now_us, task.created_us)
            return Claim(task, row.request) if is_ours else None

        def claim() -> Claim | None:
            row = self._database.write_one(self._sql.claim_plain_task, values)
            if row is not None:
                return Claim(record_of(row), row.request)
            # Usually, another process has claimed the task. Checking this avoids waiting for a
            # lock.
            task = self.get(task_id)
            if task is None or not base.can_start(task, now_us, self.now_us()):
                return None
            return self._database.write(claim_with_grants)

        def claim_with_grants(cursor: Cursor) -> Claim | None:
            row = cursor.execute(self._sql.claim_task, values).fetchone()
            if row is None:
                return None
            task = record_of(row)
            self._move_grants(cursor, task)
            return Claim(task, row.request)

        return ensure_written(claim, find)

    def body(self, task_id: str) -> Body:
        which = self._which(task_id)
        return self._database.read(lambda cursor: side_tables.read_body(cursor, self._sql, which))

    def update(self, task_id: str, expect: Expect, values: dict[str, Any]) -> AsyncRouteTask | None:
        def find() -> AsyncRouteTask | None:
            task = self.get(task_id)
            is_ours = task is not None and all(
                getattr(task, name) == value for name, value in values.items()
            )
            return task if is_ours else None

        return ensure_written(lambda: self._update(task_id, expect, values), find)

    def _update(
        self, task_id: str, expect: Expect, values: dict[str, Any]
    ) -> AsyncRouteTask | None:
        sql, fields, state = self._sql, tuple(values), values.get("state")
        which = {**self._which(task_id), **expectation(expect)}
        parameters = {**which, **columns_of(values)}
        if state is None:
            row = self._database.write_one(sql.update_task(fields, expect), parameters)
            return None if row is None else record_of(row)
        if state.is_terminal:
            # Most tasks have no rows in other tables. Then one statement suffices, and locks the
            # namespace only briefly.
            plain = sql.update_task(fields, expect, is_plain=True)
            row = self._database.write_one(plain, parameters)
            if row is not None:
                return record_of(row)
            # Usually, another thread has ended the task. Checking this avoids waiting for a lock.
            if self._database.fetch_one(sql.find_task(expect), which) is None:
                return None

        def step(cursor: Cursor) -> AsyncRouteTask:
            if state is State.NOT_STARTED:
                before = cursor.execute(sql.get_locked_task, which).fetchone()
                if before is not None:
                    self._events.keep_states(cursor, record_of(before))
            row = cursor.execute(sql.update_task(fields, expect), parameters).fetchone()
            if row is None:
                raise _RollBack
            task = record_of(row)
            self._move_grants(cursor, task)
            if task.unique_key is not None and task.state.is_terminal:
                cursor.execute(sql.release_unique_key, {**which, "unique_key": task.unique_key})
            if task.body_size and task.state.is_terminal:
                cursor.execute(sql.delete_body, which)
            if task.callback_json is not None and task.state.is_terminal:
                cursor.execute(sql.make_callback_due, which)
            return task

        return self._unless_rolled_back(step)

    def add_events(
        self, task_id: str, expect: Expect, sent: Sequence[ViewEvent]
    ) -> Sequence[int] | None:
        which = {**self._which(task_id), **expectation(expect)}

        def add(cursor: Cursor) -> Sequence[int] | None:
            if cursor.execute(self._sql.lock_task(expect), which).fetchone() is None:
                return None
            return self._events.add(cursor, task_id, expect.epoch or 0, sent)

        # Do not check whether the first write succeeded: a second write skips stored events.
        return ensure_written(lambda: self._database.write(add), lambda: None)

    def delete(self, task_id: str, expect: Expect) -> str | None:
        sql = self._sql
        which = {**self._which(task_id), **expectation(expect)}

        def delete(cursor: Cursor) -> str:
            # Changes of callbacks lock rows in another order, so they must not run meanwhile.
            cursor.execute(sql.lock_namespace, which)
            cursor.execute(sql.skip_change, which)
            row = cursor.execute(sql.delete_task(expect), which).fetchone()
            if row is None:
                raise _RollBack
            for statement in (
                sql.delete_grants, sql.delete_body, sql.delete_keys, sql.delete_events,
                sql.delete_callback,
            ):  # fmt: skip
                cursor.execute(statement, which)
            return str(row.endpoint)

        return ensure_written(
            lambda: self._unless_rolled_back(delete),
            lambda: "" if self.get(task_id) is None else None,
        )

    def query(
        self, conditions: Sequence[Condition], sort: Sort, limit: int, position: Position | None,
        readers: Readers | None,
    ) -> list[AsyncRouteTask]:  # fmt: skip
        if readers is not None and readers == Readers():
            return []
        text, is_merged = self._queries.statement(conditions, sort, position, readers)
        values = queries.values(conditions, limit, position, readers)
        values["ns"] = self._ns
        if not is_merged:
            return [record_of(row) for row in self._database.fetch_all(text, values)]

        def read(cursor: Cursor) -> list[AsyncRouteTask]:
            ids = [task_id for (task_id,) in cursor.execute(text, values).fetchall()]
            if not ids:
                return []
            listed, id_values = self._queries.listed(ids)
            rows = cursor.execute(listed, {"ns": self._ns, **id_values}).fetchall()
            by_id = {task.id: task for task in map(record_of, rows)}
            return [by_id[task_id] for task_id in ids]

        return self._database.read(read)

    def waiting(
        self, most: Mapping[str, int], before_us: int | None, start_before_us: int | None = None,
        owner: str = "",
    ) -> list[Waiting]:  # fmt: skip
        self.open()
        values: dict[str, Any] = {"ns": self._ns}
        found = {
            row.endpoint for row in self._database.fetch_all(self._sql.waiting_endpoints, values)
        }
        endpoints = [endpoint for endpoint in most if endpoint in found]
        if start_before_us is None:
            start_before_us = before_us or 0
        tasks: list[Waiting] = []
        for start in range(0, len(endpoints), WAITING_ENDPOINTS):
            values = {
                "ns": self._ns, "before": before_us, "start_before": start_before_us, "owner": owner
            }  # fmt: skip
            page = endpoints[start : start + WAITING_ENDPOINTS]
            for number, endpoint in enumerate(page):
                values[f"endpoint_{number}"] = endpoint
                values[f"limit_{number}"] = most[endpoint]
            rows = self._database.fetch_all(
                self._sql.waiting_tasks(len(page), only_delayed=before_us is None), values
            )
            tasks += [Waiting(row.id, row.endpoint, row.due_us) for row in rows]
        return base.first_due(tasks, most)

    def past_retention(self, now_us: int, limit: int) -> list[str]:
        values = {"ns": self._ns, "now": now_us, "limit": limit}
        return [row.id for row in self._database.fetch_all(self._sql.tasks_past_retention, values)]

    def not_started_in_time(self, now_us: int, owner: str, limit: int) -> list[AsyncRouteTask]:
        values = {"ns": self._ns, "now": now_us, "owner": owner, "limit": limit}
        rows = self._database.fetch_all(self._sql.not_started_in_time, values)
        return [record_of(row) for row in rows]

    def changes_since(self, since: int, worker: str | None = None) -> base.Changes:
        self.open()
        return self._events.changes_since(since, worker)

    def newest(self) -> int:
        self.open()
        return self._events.newest()

    def last_assigned(self) -> int:
        self.open()
        row = self._database.fetch_one(self._sql.get_assigned_change, {"ns": self._ns})
        return int(row.change)

    def events(
        self, since: int, most: int, task_id: str | None = None, group: str | None = None
    ) -> Events:
        self.open()
        return self._events.read(since, most, task_id, group)

    def listen(
        self,
        notify: Callable[[], None],
        submitted: Callable[[], None] = lambda: None,
        delayed: Callable[[], None] = lambda: None,
    ) -> base.Listener | None:
        self.open()
        changed = str(self._ns)
        calls = {changed: notify, changed + SUBMITTED: submitted, changed + DELAYED: delayed}
        return self._database.listen(CHANNEL, calls, {changed})

    def keep_notifying(self, seconds: float) -> None:
        self.open()
        if self._sql.keep_notifying:
            values = {"ns": self._ns, "us": int(seconds * 1_000_000)}
            sql = self._sql.keep_notifying
            ensure_written(lambda: self._database.write_one(sql, values), lambda: None)

    def secret(self) -> bytes:
        return self._namespace.secret

    def read_value(self, key: str) -> tuple[bytes, int] | None:
        row = self._database.fetch_one(self._sql.get_value, {"ns": self._ns, "key": key})
        return None if row is None else (row.value, row.version)

    def write_value(self, key: str, value: bytes | None, version: int | None) -> bool:
        # Use a random version, so that a value that is removed and set again gets no earlier
        # version.
        new = {"ns": self._ns, "key": key, "value": value, "version": randbits(62) + 1}

        def find() -> bool | None:
            held = self.read_value(key)
            is_written = held is None if value is None else held == (value, new["version"])
            return is_written or None

        def write(cursor: Cursor) -> bool:
            return side_tables.write_value(cursor, self._sql, new, version)

        return ensure_written(lambda: self._database.write(write), find)

    def value_keys(self) -> Iterable[str]:
        rows = self._database.fetch_all(self._sql.value_keys, {"ns": self._ns})
        return [row.key for row in rows]

    def maintain(self) -> None:
        self.open()
        self._database.maintain()

    def forget(self) -> None:
        self._database.forget()

    def _which(self, task_id: str) -> dict[str, Any]:
        return {"ns": self._ns, "task_id": task_id}

    def _unless_rolled_back(self, work: Callable[[Cursor], T]) -> T | None:
        try:
            return self._database.write(work)
        except _RollBack:
            return None

    def _move_grants(self, cursor: Cursor, task: AsyncRouteTask) -> None:
        if task.permission_json is not None:
            values = {**self._which(task.id), "state": task.state.value}
            cursor.execute(self._sql.set_grant_state, values)
