"""The task store in SQL: every method of the port as one short transaction."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ...delivery import Delivery
from ...errors import IdTaken
from ...execution import ViewEvent
from ...query import Condition, Position, Sort
from ...snapshot import Body
from ...start_key import StartKey
from ...states import State
from ...task import AsyncRouteTask
from ..backlog import oldest
from ..base import Claim, Expect, Listener, News, Readers, TaskStore
from ..events import Events
from . import queries
from .bodies import Bodies
from .changes import Changes
from .commits import surely
from .cursors import TakeBack, one, run
from .database import Cursor, Database, Duplicate
from .event_log import EventLog
from .namespace import Namespace
from .outbox import SQLOutbox
from .queries import Queries
from .records import claim_of, is_same_start, plain, record_of, row_of
from .shared_values import SharedValues
from .statement import Statement
from .statements import CHANNEL, Statements, expectation
from .terms import Terms
from .workers import SQLWorkers

T = TypeVar("T")


class SQLTaskStore(TaskStore):
    """Keeps the tasks of one namespace in a database that other processes share.

    Where a connection is lost in the middle of a commit, the store looks whether it happened, and else writes again.
    """

    def __init__(self, database: Database, namespace: str, create_tables: bool) -> None:
        self._database = database
        self._sql = Statements(database.dialect)
        self._queries = Queries(database.dialect)
        self._namespace = Namespace(database, self._sql, namespace, create_tables)
        self._terms = Terms(database.dialect, self._sql)
        self._event_log = EventLog(self._sql)
        self._changes = Changes(database, self._sql, self._event_log)
        self._values = SharedValues(self._sql)
        self._bodies = Bodies(self._sql)
        self.outbox: SQLOutbox = SQLOutbox(database, self._sql, lambda: self._ns)
        self.workers = SQLWorkers(database, lambda: self._ns, self.outbox)

    @property
    def _ns(self) -> int:
        return self._namespace.key

    def open(self) -> None:
        self._namespace.open()

    def close(self) -> None:
        self._database.close()
        self._changes.forget()

    def add(
        self, task: AsyncRouteTask, request: bytes, body: Body | None, grants: Collection[tuple[str, str]],
        key: StartKey | None = None, quota: int | None = None, delivery: Delivery | None = None,
    ) -> None:  # fmt: skip
        try:
            surely(
                lambda: self._add(task, request, body, grants, key, quota, delivery),
                lambda: is_same_start(self.get(task.id), task) or None,
            )
        except Duplicate:
            raise IdTaken(f"A task with the id {task.id!r} exists.") from None
        if body is not None:
            body.close()

    def _add(
        self, task: AsyncRouteTask, request: bytes, body: Body | None, grants: Collection[tuple[str, str]],
        key: StartKey | None, quota: int | None, delivery: Delivery | None,
    ) -> bool:  # fmt: skip
        sql = self._sql
        values = sql.add.values(ns=self._ns, request=request, **row_of(task))
        if body is None and not grants and key is None and quota is None and delivery is None:
            self._database.write_one(sql.add.sql, values)
            return True

        def add(cursor: Cursor) -> bool:
            if key is not None or quota is not None:
                self._terms.keep(cursor, self._ns, task, key, quota)
            cursor.execute(sql.add.sql, values)
            if delivery is not None:
                self.outbox.put(cursor, task.id, delivery)
            for kind, name in set(grants):
                run(
                    cursor, sql.add_grant, namespace=self._ns, task_id=task.id, reader=queries.reader_key(kind, name),
                    user=task.user or "", state=task.state.value, created_us=task.created_us,
                )  # fmt: skip
            if body is not None:
                self._bodies.add(cursor, self._ns, task.id, body)
            return True

        return self._database.write(add)

    def get(self, task_id: str) -> AsyncRouteTask | None:
        row = self._database.fetch_one(self._sql.get.sql, (self._ns, task_id))
        return None if row is None else record_of(row)

    def started_with(self, key_name: str) -> tuple[AsyncRouteTask, str] | None:
        statement = self._terms.started_with
        row = self._database.fetch_one(statement.sql, statement.values(ns=self._ns, key_name=key_name))
        return None if row is None else (record_of(row[:-1]), row[-1])

    def claim(self, task_id: str, owner: str, now_us: int) -> Claim | None:
        def look() -> Claim | None:
            statement = self._sql.claimed
            found = claim_of(self._database.fetch_one(statement.sql, statement.values(ns=self._ns, task_id=task_id)))
            started_us = None if found is None else max(now_us, found.task.created_us)
            return found if found and (found.task.owner, found.task.started_us) == (owner, started_us) else None

        def claim() -> Claim | None:
            given = {"ns": self._ns, "task_id": task_id, "new_owner": owner, "now": now_us}
            at_once = self._sql.claim_plain
            found = claim_of(self._database.write_one(at_once.sql, at_once.values(**given)))
            if found is not None:
                return found
            # Mostly somebody else was first: then there is nothing to lock anything for.
            task = self.get(task_id)
            if task is None or task.state is not State.NOT_STARTED:
                return None
            return self._database.write(lambda cursor: claim_with_rows(cursor, given))

        def claim_with_rows(cursor: Cursor, given: dict[str, Any]) -> Claim | None:
            found = claim_of(one(cursor, self._sql.claim, **given))
            if found is not None:
                self._move_grants(cursor, found.task)
            return found

        return surely(claim, look)

    def body(self, task_id: str) -> Body:
        return self._database.read(lambda cursor: self._bodies.read(cursor, self._ns, task_id))

    def update(self, task_id: str, expect: Expect, values: dict[str, Any]) -> AsyncRouteTask | None:
        def look() -> AsyncRouteTask | None:
            task = self.get(task_id)
            is_ours = task is not None and all(getattr(task, name) == value for name, value in values.items())
            return task if is_ours else None

        return surely(lambda: self._update(task_id, expect, values), look)

    def _update(self, task_id: str, expect: Expect, values: dict[str, Any]) -> AsyncRouteTask | None:
        state = values.get("state")
        given = {f"new_{name}": plain(value) for name, value in values.items()}
        statement = self._sql.update_of(tuple(values), expect)
        which = {"ns": self._ns, "task_id": task_id, **expectation(expect)}
        parameters = statement.values(**which, **given)
        if state is None:
            row = self._database.write_one(statement.sql, parameters)
            return None if row is None else record_of(row)
        if state.is_terminal:
            # Most tasks have nothing elsewhere; one statement holds the lock that orders all writes for the shortest time.
            row = self._database.write_one(self._sql.update_of(tuple(values), expect, is_plain=True).sql, parameters)
            if row is not None:
                return record_of(row)
            # Mostly it is not as expected, as where two find the same: then there is nothing to lock anything for.
            find = self._sql.find_of(expect)
            if self._database.fetch_one(find.sql, find.values(**which)) is None:
                return None

        def step(cursor: Cursor) -> AsyncRouteTask | None:
            if state is State.NOT_STARTED:
                one(cursor, self._sql.lock_namespace, ns=self._ns)
                before = one(cursor, self._sql.get, ns=self._ns, task_id=task_id)
                if before is not None:
                    self._event_log.keep_states(cursor, self._ns, record_of(before))
            rows = cursor.execute(statement.sql, parameters).fetchall()
            if not rows:
                raise TakeBack
            task = record_of(rows[0])
            self._move_grants(cursor, task)
            if task.body_size and task.state.is_terminal:
                run(cursor, self._bodies.drop, ns=self._ns, task_id=task_id)
            if task.callback_json is not None and task.state.is_terminal:
                self.outbox.make_due(cursor, task_id)
            return task

        return self._unless_taken_back(step)

    def add_events(self, task_id: str, expect: Expect, sent: Sequence[ViewEvent]) -> bool:
        epoch = expect.epoch or 0
        find = self._sql.find_of(expect)

        def add(cursor: Cursor) -> bool:
            one(cursor, self._sql.lock_namespace, ns=self._ns)
            if one(cursor, find, ns=self._ns, task_id=task_id, **expectation(expect)) is None:
                return False
            self._event_log.put(cursor, self._ns, task_id, epoch, sent)
            return True

        # Written twice it is there once.
        return surely(lambda: self._database.write(add), lambda: None)

    def delete(self, task_id: str, expect: Expect) -> bool:
        return surely(lambda: self._delete(task_id, expect), lambda: True if self.get(task_id) is None else None)

    def _delete(self, task_id: str, expect: Expect) -> bool:
        sql = self._sql

        def remove(cursor: Cursor) -> bool:
            run(cursor, sql.note_removed, ns=self._ns)
            removed = run(cursor, sql.delete_of(expect), ns=self._ns, task_id=task_id, **expectation(expect))
            if removed.rowcount == 0:
                raise TakeBack
            for drop in (sql.drop_grants, self._bodies.drop, self._terms.drop_key, self._event_log.drop):
                run(cursor, drop, ns=self._ns, task_id=task_id)
            self.outbox.drop(cursor, task_id)
            return True

        return self._unless_taken_back(remove) or False

    def query(
        self,
        conditions: Sequence[Condition],
        sort: Sort,
        limit: int,
        position: Position | None,
        readers: Readers | None,
    ) -> list[AsyncRouteTask]:
        if readers is not None and readers == Readers():
            return []
        statement, ids_alone = self._queries.statement(conditions, sort, position, readers)
        values = statement.values(ns=self._ns, **queries.values(conditions, limit, position, readers))
        if not ids_alone:
            return [record_of(row) for row in self._database.fetch_all(statement.sql, values)]

        def read(cursor: Cursor) -> list[AsyncRouteTask]:
            ids = [row[0] for row in cursor.execute(statement.sql, values).fetchall()]
            if not ids:
                return []
            listed, given = self._queries.listed(ids)
            rows = cursor.execute(listed.sql, listed.values(ns=self._ns, **given)).fetchall()
            by_id = {row[0]: row for row in rows}
            return [record_of(by_id[task_id]) for task_id in ids]

        return self._database.read(read)

    def waiting(self, most: Mapping[str, int], before_us: int) -> list[tuple[str, str]]:
        self.open()
        statement = self._sql.waiting
        rows = self._database.fetch_all(statement.sql, statement.values(ns=self._ns, before=before_us))
        return oldest(((row[0], row[1]) for row in rows), most)

    def outlived(self, now_us: int, limit: int) -> list[str]:
        return self._ids(self._sql.outlived, now=now_us, most=limit)

    def news(self, since: int) -> News:
        self.open()
        return self._changes.news(self._ns, since)

    def newest(self) -> int:
        self.open()
        return self._changes.newest(self._ns)

    def events(self, since: int, most: int, task_id: str | None = None, group: str | None = None) -> Events:
        self.open()
        return self._changes.events(self._ns, since, most, task_id, group)

    def listen(self, heard: Callable[[], None]) -> Listener | None:
        self.open()
        return self._database.listen(CHANNEL, str(self._ns), heard)

    def secret(self) -> bytes:
        return self._namespace.secret

    def read_value(self, key: str) -> tuple[bytes, int] | None:
        statement = self._values.read
        row = self._database.fetch_one(statement.sql, statement.values(ns=self._ns, value_key=key))
        return None if row is None else (row[0], row[1])

    def write_value(self, key: str, value: bytes | None, version: int | None) -> bool:
        new_version = self._values.new_version()

        def look() -> bool | None:
            held = self.read_value(key)
            return True if (held is None if value is None else held is not None and held[1] == new_version) else None

        def write(cursor: Cursor) -> bool:
            return self._values.write(cursor, self._ns, key, value, version, new_version)

        return surely(lambda: self._database.write(write), look)

    def value_keys(self) -> Iterable[str]:
        return self._ids(self._values.keys)

    def tend(self) -> None:
        self.open()
        self._database.tend()

    def forget(self) -> None:
        self._database.forget()

    def _unless_taken_back(self, work: Callable[[Cursor], T]) -> T | None:
        try:
            return self._database.write(work)
        except TakeBack:
            return None

    def _ids(self, statement: Statement, **given: Any) -> list[str]:
        return [row[0] for row in self._database.fetch_all(statement.sql, statement.values(ns=self._ns, **given))]

    def _move_grants(self, cursor: Cursor, task: AsyncRouteTask) -> None:
        if task.permission_json is not None:
            run(cursor, self._sql.move_grants, ns=self._ns, task_id=task.id, new_state=task.state.value)
