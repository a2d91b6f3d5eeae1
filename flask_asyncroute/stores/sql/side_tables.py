"""Read and write request bodies, idempotency keys and shared values, and check quotas.

The functions use the cursor of a transaction of the store. ``ns`` is the key of the app's
namespace.
"""

from __future__ import annotations

from typing import Any

from ...errors import KeyTaken, TooManyTasks
from ...snapshot import Body
from ...task import AsyncRouteTask
from ..base import StartKey
from .database import Cursor
from .statements import Statements


def add_body(cursor: Cursor, sql: Statements, ns: int, task_id: str, body: Body) -> None:
    """Store a request body, with one row per piece of the body."""
    for part, data in enumerate(body.pieces()):
        values = {"ns": ns, "task_id": task_id, "part": part, "data": data}
        cursor.execute(sql.add_body_part, values)


def read_body(cursor: Cursor, sql: Statements, which: dict[str, Any]) -> Body:
    """Return the request body of a task. The caller must close it."""
    body = Body()
    try:
        part = 0
        while row := cursor.execute(sql.get_body_part, {**which, "part": part}).fetchone():
            body.write(row.data)
            part += 1
    except BaseException:
        body.close()
        raise
    return body


def add_key(
    cursor: Cursor, sql: Statements, ns: int, task: AsyncRouteTask, key: StartKey | None,
    quota: int | None,
) -> None:  # fmt: skip
    """Check the idempotency key and the quota of a new task, and store the key.

    :raises KeyTaken: if another task has this key.
    :raises TooManyTasks: if the user has ``quota`` unfinished tasks.
    """
    # This locks the namespace until the commit, so that concurrent requests cannot all pass the
    # check.
    cursor.execute(sql.lock_namespace, {"ns": ns})
    if key is not None and cursor.execute(sql.get_key, {"ns": ns, "name": key.name}).fetchone():
        raise KeyTaken("Another task has this Idempotency-Key.")
    if quota is not None:
        values = {"ns": ns, "user": task.user or "", "limit": quota}
        if cursor.execute(sql.count_unfinished, values).fetchone().unfinished >= quota:
            raise TooManyTasks.of(quota)
    if key is not None:
        values = {"ns": ns, "name": key.name, "fingerprint": key.fingerprint, "task_id": task.id}
        cursor.execute(sql.add_key, values)


def write_value(cursor: Cursor, sql: Statements, new: dict[str, Any], version: int | None) -> bool:
    cursor.execute(sql.lock_namespace, new)
    present = cursor.execute(sql.get_value, new).fetchone()
    if version is not None and version != (0 if present is None else present.version):
        return False
    if new["value"] is None:
        if present is not None:
            cursor.execute(sql.delete_value, new)
        return present is not None
    cursor.execute(sql.add_value if present is None else sql.set_value, new)
    return True
