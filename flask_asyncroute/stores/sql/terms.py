"""What a start depends on beside its id, in SQL: that its key is new, and that its user has not too many tasks.

`store` calls it inside the transaction that adds the task; no start without key and quota comes here.
"""

from __future__ import annotations

from sqlalchemy import bindparam, delete, func, insert, select
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.elements import CompilerElement

from ...errors import KeyTaken, TooManyTasks
from ...start_key import StartKey
from ...states import UNFINISHED
from ...task import AsyncRouteTask
from .database import Cursor
from .statement import Statement
from .statements import Statements
from .tables import RECORD, keys, tasks


class Terms:
    """The statements for keys and quotas, for one dialect."""

    def __init__(self, dialect: Dialect, statements: Statements) -> None:
        self._dialect = dialect
        self._lock = statements.lock_namespace
        is_key = (keys.c.namespace == bindparam("ns")) & (keys.c.name == bindparam("key_name"))
        self._taken = self._compiled(select(keys.c.task_id).where(is_key))
        self._add = self._compiled(
            insert(keys).values({column.name: bindparam(column.name) for column in keys.columns})
        )
        unfinished = (
            select(tasks.c.id)
            .where(
                tasks.c.namespace == bindparam("ns"),
                tasks.c.user == bindparam("owner"),
                tasks.c.state.in_(
                    [bindparam(f"state_{number}", state.value) for number, state in enumerate(UNFINISHED)]
                ),
            )
            .limit(bindparam("most"))
        )
        self._unfinished = self._compiled(select(func.count()).select_from(unfinished.subquery()))
        self.started_with = self._compiled(
            select(*RECORD, keys.c.fingerprint)
            .join_from(keys, tasks, (tasks.c.namespace == keys.c.namespace) & (tasks.c.id == keys.c.task_id))
            .where(is_key)
        )
        self.drop_key = self._compiled(
            delete(keys).where(keys.c.namespace == bindparam("ns"), keys.c.task_id == bindparam("task_id"))
        )

    def keep(self, cursor: Cursor, ns: int, task: AsyncRouteTask, key: StartKey | None, quota: int | None) -> None:
        """Check what a start depends on and keep its key; nobody else writes from here to the commit."""
        cursor.execute(self._lock.sql, self._lock.values(ns=ns)).fetchall()
        if key is not None and cursor.execute(self._taken.sql, self._taken.values(ns=ns, key_name=key.name)).fetchall():
            raise KeyTaken("A task was started with this key.")
        if quota is not None:
            counted = self._unfinished.values(ns=ns, owner=task.user or "", most=quota)
            if cursor.execute(self._unfinished.sql, counted).fetchall()[0][0] >= quota:
                raise TooManyTasks.of(quota)
        if key is not None:
            values = self._add.values(namespace=ns, name=key.name, fingerprint=key.fingerprint, task_id=task.id)
            cursor.execute(self._add.sql, values)

    def _compiled(self, clause: CompilerElement) -> Statement:
        return Statement(clause, self._dialect)
