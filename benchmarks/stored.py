"""A store with many tasks, written directly into its tables. Through the package this would take an
hour.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import bindparam
from sqlalchemy.dialects import sqlite

from flask_asyncroute.stores.sql.queries import reader_key
from flask_asyncroute.stores.sql.sqlite import SQLiteDatabase
from flask_asyncroute.stores.sql.store import SQLTaskStore
from flask_asyncroute.stores.sql.tables import grants, tasks

FIRST_US = 1_700_000_000_000_000
STEP_US = 1_000_000
"""One task is created per second."""
YEAR_US = 365 * 86_400_000_000
CHUNK = 20_000
USERS = 200
GROUPS = 20
SOME_USER = "user7"
SOME_GROUP = "group7"
PERMISSION = (
    b'{"Read":{"Users":[],"Groups":["%s"],"Roles":[],"Scopes":[]},'
    b'"Write":{"Users":[],"Groups":[],"Roles":[],"Scopes":[]}}'
)


def fill(path: Path, namespace: str, count: int) -> None:
    """Create a store in a new file with ``count`` tasks.

    One in ten tasks has no owner; the others belong to 200 users. One in five of those is readable
    by one of 20 groups. Nearly all tasks have ended. The others have endpoints without a route, so
    that no worker runs them.
    """
    store = SQLTaskStore(SQLiteDatabase(path), namespace, True)
    store.open()
    store.close()
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("PRAGMA cache_size=-200000")
        (key,) = connection.execute(
            "SELECT key FROM asyncroute_namespaces WHERE name = ?", (namespace,)
        ).fetchone()
        chance = random.Random(1)
        connection.execute("BEGIN")
        rows_and_grants = _rows(key, count, chance)
        while rows := list(islice(rows_and_grants, CHUNK)):
            connection.executemany(_insert(tasks), (row for row, _ in rows))
            connection.executemany(
                _insert(grants), (grant for _, grant in rows if grant is not None)
            )
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        connection.close()


def moment_us(count: int, share: float) -> int:
    """Return the time before which ``share`` of ``count`` tasks were created."""
    return FIRST_US + int(count * share) * STEP_US


def _insert(table: Any) -> str:
    """Return the INSERT with named parameters for sqlite3."""
    statement = table.insert().values(
        {column.name: bindparam(column.name) for column in table.columns}
    )
    return str(statement.compile(dialect=sqlite.dialect(paramstyle="named")))


def _rows(
    key: int, count: int, chance: random.Random
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Yield the row of each task, and the row of its grant, if any."""
    empty = dict.fromkeys(column.name for column in tasks.columns)
    for number in range(count):
        user = "" if chance.random() < 0.1 else f"user{chance.randrange(USERS)}"
        group = f"group{chance.randrange(GROUPS)}" if user and chance.random() < 0.2 else None
        created = FIRST_US + number * STEP_US
        draw = chance.random()
        state = "Completed" if draw < 0.9 else "Failed" if draw < 0.97 else "Aborted"
        if number % 10_000 == 0:
            state = chance.choice(("NotStarted", "Running"))
        is_over = state not in ("NotStarted", "Running")
        permission = None if group is None else PERMISSION % group.encode()
        task: dict[str, Any] = {
            **empty, "namespace": key, "id": f"{chance.getrandbits(128):032x}",
            "async_route_id": "[Put]/archive", "endpoint": "archive", "state": state,
            "cancellable": 1, "user": user, "url": "http://127.0.0.1:8000/archive", "method": "PUT",
            "created_us": created, "started_us": None if state == "NotStarted" else created + 1000,
            "completed_us": created + 900_000 if is_over else None,
            "result_json": b'{"InnerValue":"Hello"}' if state == "Completed" else None,
            "error": "ValueError: no" if state == "Failed" else None,
            "stopping": 0, "permission_json": permission,
            "retention_us": 100 * YEAR_US, "on_loss": "abort", "body_size": 0,
            "owner": None if state == "NotStarted" else "1-somewhere", "restarts": 0,
            "epoch": int(state != "NotStarted"), "revision": 3 if is_over else 2,
            "change": number + 1, "completed_change": number + 1 if is_over else None,
            "callback_attempts": 0, "sse_group": "/archive", "sse_result": 0,
            "remove_after_us": created + 100 * YEAR_US if is_over else None,
        }  # fmt: skip
        grant = None
        if group is not None:
            grant = {
                "namespace": key, "task_id": task["id"], "reader": reader_key("groups", group),
                "user": user, "state": state, "created_us": created,
            }  # fmt: skip
        yield task, grant
