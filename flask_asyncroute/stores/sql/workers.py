"""Store the worker processes of one namespace (the part of the tables that one app uses)."""

# Writes to their rows have no change numbers, because no client needs them.

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from ...task import AsyncRouteTask
from ..base import Worker, Workers
from .database import Cursor, Database
from .migrations import Namespace
from .outbox import SQLOutbox
from .rows import record_of
from .statements import Statements


class SQLWorkers(Workers):
    """Stores one row for each worker process.

    :param outbox: releases the callbacks of a worker that is removed.
    """

    def __init__(
        self, database: Database, sql: Statements, namespace: Namespace, outbox: SQLOutbox
    ) -> None:
        self._database = database
        self._sql = sql
        self._namespace = namespace
        self._outbox = outbox
        self.lock_path = database.lock_path

    def enter(self, worker: Worker) -> None:
        row = asdict(worker)
        endpoints = json.dumps({"endpoints": sorted(worker.endpoints), "views": worker.views})
        row.update(ns=self._namespace.key, beat=0, endpoints=endpoints)

        def enter(cursor: Cursor) -> None:
            cursor.execute(self._sql.delete_worker, row)
            cursor.execute(self._sql.add_worker, row)

        self._database.write(enter)

    def beat(self, name: str) -> bool:
        which = {"ns": self._namespace.key, "name": name}
        return self._database.write_unpooled(self._sql.count_beat, which) > 0

    def listed(self) -> list[Worker]:
        return [_worker_of(row) for row in self._rows(self._sql.list_workers)]

    def leave(self, name: str) -> None:
        def leave(cursor: Cursor) -> None:
            self._outbox.release_held(cursor, name)
            cursor.execute(self._sql.delete_worker, {"ns": self._namespace.key, "name": name})

        self._database.write(leave)

    def owners(self) -> list[str]:
        return [row.owner for row in self._rows(self._sql.owners) if row.owner is not None]

    def held(self, name: str) -> list[AsyncRouteTask]:
        return [record_of(row) for row in self._rows(self._sql.held_tasks, owner=name)]

    def wanted(self) -> list[str]:
        return [row.endpoint for row in self._rows(self._sql.waiting_endpoints)]

    def _rows(self, statement: str, **values: Any) -> Any:
        return self._database.fetch_all(statement, {"ns": self._namespace.key, **values})


def _worker_of(row: Any) -> Worker:
    held = json.loads(row.endpoints)
    if not isinstance(held, dict) or held.keys() != {"endpoints", "views"}:
        held = {"endpoints": held, "views": {}}  # a worker of an earlier release
    return Worker(
        row.name, row.lock_file, row.number, row.process, frozenset(held["endpoints"]), row.beat,
        held["views"],
    )  # fmt: skip
