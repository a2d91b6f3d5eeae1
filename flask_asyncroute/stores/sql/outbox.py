"""Store callbacks in an SQL database, with one row per task that has a callback."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from ...callbacks.model import NOT_STARTED, PENDING, Delivery
from ...task import AsyncRouteTask
from ..outbox import AT_ONCE, LONGEST_US, PER_HOST, Due, Outbox
from .database import Cursor, Database, ensure_written
from .migrations import Namespace
from .rows import record_of
from .statements import DUE_PAGE, Statements


class SQLOutbox(Outbox):
    def __init__(self, database: Database, sql: Statements, namespace: Namespace) -> None:
        self._database = database
        self._sql = sql
        self._namespace = namespace

    def put(self, cursor: Cursor, task_id: str, delivery: Delivery) -> None:
        """Store the callback of a new task. Call this in the transaction that stores the task."""
        row = msgspec.structs.asdict(delivery)
        row.update(
            ns=self._namespace.key,
            task_id=task_id,
            headers=msgspec.json.encode(delivery.headers),
            send_result=int(delivery.send_result),
            is_trusted=int(delivery.is_trusted),
            attempts=0,
            due_us=None,
        )
        cursor.execute(self._sql.add_callback, row)

    def next_due(self, now_us: int) -> int | None:
        row = self._database.fetch_one(self._sql.first_and_last_due, {"ns": self._namespace.key})
        if row.first_us is None:
            return None
        is_due = row.first_us <= now_us or row.last_us > now_us + LONGEST_US
        return AT_ONCE if is_due else int(row.first_us)

    def claim(self, holder: str, now_us: int, limit: int) -> list[Due]:
        values = {"ns": self._namespace.key, "now": now_us}

        def claim(cursor: Cursor) -> list[Due]:
            # Block other claims until the commit, so that the counts per host stay correct.
            cursor.execute(self._sql.lock_namespace, values)
            rows = cursor.execute(self._sql.count_held_callbacks, values).fetchall()
            held = Counter({row.host: row.held for row in rows})
            claimed: list[Due] = []
            while True:
                before = len(claimed)
                rows = cursor.execute(self._sql.due_callbacks, values).fetchall()
                for row in rows:
                    if len(claimed) < limit and held[row.host] < PER_HOST:
                        held[row.host] += 1
                        claimed.append(self._claim_one(cursor, row.task_id, holder))
                # Read another page: callbacks to hosts at their limit can have filled this one.
                if len(rows) < DUE_PAGE or not before < len(claimed) < limit:
                    return claimed

        return self._database.write(claim)

    def _claim_one(self, cursor: Cursor, task_id: str, holder: str) -> Due:
        which = {**self._which(task_id), "holder": holder}
        row = cursor.execute(self._sql.hold_callback, which).fetchone()
        task = record_of(cursor.execute(self._sql.get_task, which).fetchone())
        if task.callback_state == NOT_STARTED:
            task = record_of(cursor.execute(self._sql.begin_sending, which).fetchone())
        return Due(task, _delivery_of(row), row.attempts)

    def record_attempt(
        self, task_id: str, holder: str, state: str, due_us: int | None
    ) -> AsyncRouteTask | None:
        values = {**self._which(task_id), "holder": holder, "state": state, "due_us": due_us}
        values["headers"] = b"{}"
        statement = self._sql.retry_callback if state in PENDING else self._sql.finish_callback

        def record_attempt(cursor: Cursor) -> AsyncRouteTask | None:
            cursor.execute(self._sql.lock_namespace, values)
            if cursor.execute(statement, values).rowcount == 0:
                return None
            return record_of(cursor.execute(self._sql.count_attempt, values).fetchone())

        def find() -> AsyncRouteTask | None:
            row = self._database.fetch_one(self._sql.get_callback, values)
            if row is None or row.holder == holder:
                return None
            found = self._database.fetch_one(self._sql.get_task, values)
            return None if found is None else record_of(found)

        return ensure_written(lambda: self._database.write(record_attempt), find)

    def release(self, holder: str, keep: Collection[str] = ()) -> None:
        self._database.write(lambda cursor: self.release_held(cursor, holder, keep))

    def release_held(self, cursor: Cursor, holder: str, keep: Collection[str] = ()) -> None:
        """Release callbacks like :meth:`release`, but in the transaction of ``cursor``."""
        values: dict[str, Any] = {"ns": self._namespace.key, "holder": holder}
        for row in cursor.execute(self._sql.held_callbacks, values).fetchall():
            if row.task_id not in keep:
                cursor.execute(self._sql.release_callback, {**values, "task_id": row.task_id})

    def redeliver(self, task_id: str, headers: Mapping[str, str]) -> AsyncRouteTask | None:
        which = self._which(task_id)

        def renew(cursor: Cursor) -> AsyncRouteTask | None:
            cursor.execute(self._sql.lock_namespace, which)
            row = cursor.execute(self._sql.get_callback, which).fetchone()
            found = cursor.execute(self._sql.get_task, which).fetchone()
            if row is None or found is None:
                return None
            task = record_of(found)
            if not task.state.is_terminal:
                return None
            if row.holder is not None:
                return task
            is_pending = task.callback_state in PENDING
            new_headers = row.headers if is_pending else msgspec.json.encode(dict(headers))
            cursor.execute(self._sql.renew_callback, {**which, "headers": new_headers})
            return record_of(cursor.execute(self._sql.restart_sending, which).fetchone())

        # Do not check whether the first write succeeded: a second write has the same result.
        return ensure_written(lambda: self._database.write(renew), lambda: None)

    def _which(self, task_id: str) -> dict[str, Any]:
        return {"ns": self._namespace.key, "task_id": task_id}


def _delivery_of(row: Any) -> Delivery:
    values = {name: getattr(row, name) for name in Delivery.__struct_fields__}
    values.update(
        headers=msgspec.json.decode(row.headers),
        send_result=row.send_result == 1,
        is_trusted=row.is_trusted == 1,
    )
    return Delivery(**values)
