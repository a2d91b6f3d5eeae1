"""The workers of one namespace in SQL. Reads and writes are single statements; none raises a change number."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from sqlalchemy import bindparam, delete, insert, literal_column, select, union, union_all, update
from sqlalchemy.sql.elements import CompilerElement

from ...states import State
from ...task import AsyncRouteTask
from ..base import Worker, Workers
from .database import Cursor, Database
from .outbox import SQLOutbox
from .records import record_of
from .statement import Statement
from .tables import RECORD, callbacks, tasks, workers


class SQLWorkers(Workers):
    """Keeps a row for each worker.

    :param key: gives the namespace's key, which is known once the store is open.
    :param outbox: of which a worker that leaves lets go.
    """

    def __init__(self, database: Database, key: Callable[[], int], outbox: SQLOutbox) -> None:
        self._database = database
        self._key = key
        self._outbox = outbox
        self.lock_path = database.lock_path
        is_worker = (workers.c.namespace == bindparam("ns")) & (workers.c.name == bindparam("worker"))
        runs = (tasks.c.namespace == bindparam("ns")) & (tasks.c.state == State.RUNNING.value)
        # Written out, so that these are seen to be the conditions of the indexes.
        stops = (tasks.c.namespace == bindparam("ns")) & (tasks.c.stopping == literal_column("1"))
        bound = (
            (tasks.c.namespace == bindparam("ns"))
            & (tasks.c.state == literal_column("'NotStarted'"))
            & tasks.c.owner.is_not(None)
        )
        waits = (tasks.c.namespace == bindparam("ns")) & (tasks.c.state == State.NOT_STARTED.value)
        is_held = tasks.c.owner == bindparam("worker")
        self._drop = self._compiled(delete(workers).where(is_worker))
        self._add = self._compiled(
            insert(workers).values(
                namespace=bindparam("ns"), name=bindparam("worker"), place=bindparam("place"),
                number=bindparam("number"), process=bindparam("process"), beat=0, endpoints=bindparam("endpoints"),
            )
        )  # fmt: skip
        self._beat = self._compiled(update(workers).where(is_worker).values(beat=workers.c.beat + 1))
        listed = [workers.c[name] for name in ("name", "place", "number", "process", "endpoints", "beat")]
        self._listed = self._compiled(select(*listed).where(workers.c.namespace == bindparam("ns")))
        sends = (callbacks.c.namespace == bindparam("ns")) & callbacks.c.holder.is_not(None)
        owners = [select(tasks.c.owner).where(part) for part in (runs, stops, bound)]
        self._owners = self._compiled(union(*owners, select(callbacks.c.holder).where(sends)))
        held = (select(*RECORD).where(part, is_held) for part in (runs, stops, bound))
        self._held = self._compiled(union_all(*held))  # no task is among two of these
        self._wanted = self._compiled(select(tasks.c.endpoint).where(waits).distinct())

    def enter(self, worker: Worker) -> None:
        ns = self._key()
        endpoints = json.dumps(sorted(worker.endpoints))
        values = self._add.values(
            ns=ns,
            worker=worker.name,
            place=worker.place,
            number=worker.number,
            process=worker.process,
            endpoints=endpoints,
        )

        def enter(cursor: Cursor) -> None:
            cursor.execute(self._drop.sql, self._drop.values(ns=ns, worker=worker.name))
            cursor.execute(self._add.sql, values)

        self._database.write(enter)

    def beat(self, name: str) -> bool:
        return self._database.write_apart(self._beat.sql, self._beat.values(ns=self._key(), worker=name)) > 0

    def listed(self) -> list[Worker]:
        return [
            Worker(name, place, number, process, frozenset(json.loads(endpoints)), beat)
            for name, place, number, process, endpoints, beat in self._rows(self._listed)
        ]

    def leave(self, name: str) -> None:
        def leave(cursor: Cursor) -> None:
            self._outbox.let_go(cursor, name)
            cursor.execute(self._drop.sql, self._drop.values(ns=self._key(), worker=name))

        self._database.write(leave)

    def owners(self) -> list[str]:
        return [row[0] for row in self._rows(self._owners) if row[0] is not None]

    def held(self, name: str) -> list[AsyncRouteTask]:
        return [record_of(row) for row in self._rows(self._held, worker=name)]

    def wanted(self) -> list[str]:
        return [row[0] for row in self._rows(self._wanted)]

    def _compiled(self, clause: CompilerElement) -> Statement:
        return Statement(clause, self._database.dialect)

    def _rows(self, statement: Statement, **given: Any) -> Any:
        return self._database.fetch_all(statement.sql, statement.values(ns=self._key(), **given))
