"""The outbox in SQL: a row for each task with a callback."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec
from sqlalchemy import bindparam, delete, func, insert, literal_column, null, select, update
from sqlalchemy.sql.elements import ColumnElement

from ...delivery import NOT_STARTED, PENDING, RUNNING, Delivery
from ...errors import CommitUnknown
from ...states import TERMINAL
from ...task import AsyncRouteTask
from ..outbox import AT_ONCE, LONGEST_US, PER_HOST, Due, Outbox
from .cursors import one, run
from .database import Cursor, Database
from .records import record_of
from .statements import Statements
from .tables import RECORD, callbacks, tasks

PAGE = 100
"""Due rows that are looked at for one claim; a host that has its share is left out before."""

_DELIVERY = [callbacks.c[name] for name in Delivery.__struct_fields__]
_headers = msgspec.json.Decoder(dict[str, str])


class SQLOutbox(Outbox):
    """Keeps the callbacks. What is done in a transaction of the store's own takes its cursor.

    :param key: gives the namespace's key, which is known once the store is open.
    """

    def __init__(self, database: Database, sql: Statements, key: Callable[[], int]) -> None:
        self._database = database
        self._sql = sql
        self._key = key
        ns: Any = bindparam("ns")
        in_namespace = callbacks.c.namespace == ns
        is_row = in_namespace & (callbacks.c.task_id == bindparam("task_id"))
        is_mine = callbacks.c.holder == bindparam("worker")
        is_held = callbacks.c.holder.is_not(None)
        is_task = (tasks.c.namespace == ns) & (tasks.c.id == bindparam("task_id"))
        waits = in_namespace & callbacks.c.due_us.is_not(None) & callbacks.c.holder.is_(None)
        # Numbers that are written out, so that they are seen to be the conditions of the indexes.
        is_due = waits & (
            (callbacks.c.due_us <= bindparam("now"))
            | (callbacks.c.due_us > bindparam("now") + literal_column(str(LONGEST_US)))
        )
        busy = (
            select(callbacks.c.host).where(in_namespace, is_held).group_by(callbacks.c.host)
            .having(func.count() >= literal_column(str(PER_HOST)))
        )  # fmt: skip
        compiled = sql.compiled
        self._add = compiled(
            insert(callbacks).values({"namespace": ns, **{column.name: bindparam(column.name) for column in callbacks.columns
                                                          if column.name not in ("namespace", "holder")}})
        )  # fmt: skip
        self._make_due = compiled(update(callbacks).where(is_row).values(due_us=AT_ONCE))
        self._drop = compiled(delete(callbacks).where(is_row))
        # Either end of the index, however many there are.
        self._ends = compiled(
            select(*(select(end(callbacks.c.due_us)).where(waits).scalar_subquery() for end in (func.min, func.max)))
        )
        self._held = compiled(
            select(callbacks.c.host, func.count()).where(in_namespace, is_held).group_by(callbacks.c.host)
        )
        self._due = compiled(
            select(callbacks.c.task_id, callbacks.c.host)
            .where(is_due, callbacks.c.host.not_in(busy))
            .order_by(callbacks.c.due_us)
            .limit(PAGE)
        )
        self._hold = compiled(
            update(callbacks)
            .where(is_row)
            .values(holder=bindparam("worker"))
            .returning(*_DELIVERY, callbacks.c.attempts)
        )
        self._over = compiled(
            update(callbacks)
            .where(is_row, is_mine)
            .values(holder=null(), attempts=callbacks.c.attempts + 1, due_us=null(), headers=b"{}")
        )
        self._again = compiled(
            update(callbacks)
            .where(is_row, is_mine)
            .values(holder=null(), attempts=callbacks.c.attempts + 1, due_us=bindparam("new_due"))
        )
        self._mine = compiled(select(callbacks.c.task_id).where(in_namespace, is_mine))
        self._free = compiled(update(callbacks).where(is_row, is_mine).values(holder=null()))
        self._task = compiled(select(*RECORD).where(is_task))
        self._row = compiled(select(callbacks.c.holder, callbacks.c.headers).where(is_row))
        self._renew = compiled(
            update(callbacks).where(is_row).values(due_us=AT_ONCE, attempts=0, headers=bindparam("new_headers"))
        )
        self._begin = self._change(is_task, state=RUNNING)
        self._counted = self._change(is_task, state=None, attempts=tasks.c.callback_attempts + 1)
        self._anew = self._change(is_task, state=NOT_STARTED, attempts=literal_column("0"))

    def _change(
        self, is_task: ColumnElement[bool], state: str | None, attempts: Any = tasks.c.callback_attempts
    ) -> Any:
        values: dict[str, Any] = {
            "callback_state": bindparam("new_state") if state is None else state,
            "callback_attempts": attempts,
            "revision": tasks.c.revision + 1,
            "change": self._sql.next_change(),
        }
        return self._sql.compiled(update(tasks).where(is_task).values(values).returning(*RECORD))

    def put(self, cursor: Cursor, task_id: str, delivery: Delivery) -> None:
        """Store a callback with its task."""
        values = msgspec.structs.asdict(delivery)
        values.update(
            headers=msgspec.json.encode(delivery.headers),
            send_result=int(delivery.send_result),
            is_trusted=int(delivery.is_trusted),
        )
        run(cursor, self._add, ns=self._key(), task_id=task_id, attempts=0, due_us=None, **values)

    def make_due(self, cursor: Cursor, task_id: str) -> None:
        """Have the callback of a task sent: it has ended."""
        run(cursor, self._make_due, ns=self._key(), task_id=task_id)

    def drop(self, cursor: Cursor, task_id: str) -> None:
        """Remove the callback of a task."""
        run(cursor, self._drop, ns=self._key(), task_id=task_id)

    def next_due(self, now_us: int) -> int | None:
        first, last = self._database.fetch_one(self._ends.sql, self._ends.values(ns=self._key()))
        if first is None:
            return None
        return AT_ONCE if first <= now_us or last > now_us + LONGEST_US else int(first)

    def claim(self, holder: str, now_us: int, limit: int) -> list[Due]:
        ns = self._key()

        def claim(cursor: Cursor) -> list[Due]:
            # Nobody else claims until the commit, so the numbers of each host are right.
            run(cursor, self._sql.lock_namespace, ns=ns)
            held = Counter(dict(run(cursor, self._held, ns=ns).fetchall()))
            taken: list[Due] = []
            rows, before = PAGE, -1
            # Again where hosts that have their share by now filled the page: others may be behind them.
            while rows == PAGE and before < len(taken) < limit:
                before = len(taken)
                page = run(cursor, self._due, ns=ns, now=now_us).fetchall()
                rows = len(page)
                for task_id, host in page:
                    if len(taken) < limit and held[host] < PER_HOST:
                        held[host] += 1
                        taken.append(self._take(cursor, task_id, holder))
            return taken

        return self._database.write(claim)

    def _take(self, cursor: Cursor, task_id: str, holder: str) -> Due:
        ns = self._key()
        row = one(cursor, self._hold, ns=ns, task_id=task_id, worker=holder)
        task = record_of(one(cursor, self._task, ns=ns, task_id=task_id))
        if task.callback_state == NOT_STARTED:
            task = record_of(one(cursor, self._begin, ns=ns, task_id=task_id))
        return Due(task, _delivery_of(row[:-1]), row[-1])

    def settle(self, task_id: str, holder: str, state: str, due_us: int | None) -> AsyncRouteTask | None:
        ns = self._key()
        statement = self._again if state in PENDING else self._over

        def settle(cursor: Cursor) -> AsyncRouteTask | None:
            run(cursor, self._sql.lock_namespace, ns=ns)
            written = run(cursor, statement, ns=ns, task_id=task_id, worker=holder, new_due=due_us)
            if written.rowcount == 0:
                return None
            return record_of(one(cursor, self._counted, ns=ns, task_id=task_id, new_state=state))

        try:
            return self._database.write(settle)
        except CommitUnknown:
            row = self._database.fetch_one(self._row.sql, self._row.values(ns=ns, task_id=task_id))
            if row is None or row[0] == holder:
                return self._database.write(settle)
            found = self._database.fetch_one(self._task.sql, self._task.values(ns=ns, task_id=task_id))
            return None if found is None else record_of(found)

    def release(self, holder: str, keep: Collection[str] = ()) -> None:
        self._database.write(lambda cursor: self.let_go(cursor, holder, keep))

    def let_go(self, cursor: Cursor, holder: str, keep: Collection[str] = ()) -> None:
        """As :meth:`release`, in a transaction of the caller's."""
        for (task_id,) in run(cursor, self._mine, ns=self._key(), worker=holder).fetchall():
            if task_id not in keep:
                run(cursor, self._free, ns=self._key(), task_id=task_id, worker=holder)

    def redeliver(self, task_id: str, headers: Mapping[str, str]) -> AsyncRouteTask | None:
        ns = self._key()

        def renew(cursor: Cursor) -> AsyncRouteTask | None:
            run(cursor, self._sql.lock_namespace, ns=ns)
            row = one(cursor, self._row, ns=ns, task_id=task_id)
            found = one(cursor, self._task, ns=ns, task_id=task_id)
            if row is None or found is None or record_of(found).state not in TERMINAL:
                return None
            if row[0] is not None:
                return record_of(found)
            is_pending = record_of(found).callback_state in PENDING
            new = row[1] if is_pending else msgspec.json.encode(dict(headers))
            run(cursor, self._renew, ns=ns, task_id=task_id, new_headers=new)
            return record_of(one(cursor, self._anew, ns=ns, task_id=task_id))

        try:
            return self._database.write(renew)
        except CommitUnknown:
            return self._database.write(renew)  # twice does no harm


def _delivery_of(row: Any) -> Delivery:
    values = dict(zip(Delivery.__struct_fields__, row, strict=True))
    values.update(
        headers=_headers.decode(values["headers"]),
        send_result=values["send_result"] == 1,
        is_trusted=values["is_trusted"] == 1,
    )
    return Delivery(**values)
