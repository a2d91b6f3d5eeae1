"""The tables of the SQL stores, also for Alembic. Columns contain numbers, text and bytes, which
drivers do not convert.

Primary keys begin with the column that a statement looks up, not with the namespace. PostgreSQL
without statistics of a table takes all indexes that begin with a column of the condition for
equally good. So PostgreSQL could search all tasks of the namespace for an id; see
`statements._IN_NAMESPACE`.

The columns of a task are in the order of the record's fields. An empty ``user`` means no user.
Unlike NULL, the empty text is compared and sorted like other text.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.types import TypeEngine


def _text(length: int | None = None) -> TypeEngine[str]:
    """Return a text type whose values every database compares by code point, as SQLite does."""
    kind = Text if length is None else String
    return kind(length).with_variant(kind(length, collation="C"), "postgresql")


metadata = MetaData()


def _index(name: str, table: Table, *columns: str, where: str | None = None) -> None:
    condition = None if where is None else text(where)
    Index(
        name, table.c.namespace, *(table.c[column] for column in columns),
        sqlite_where=condition, postgresql_where=condition,
    )  # fmt: skip


schema = Table(
    "asyncroute_schema", metadata, Column("version", Integer, primary_key=True, autoincrement=False)
)

namespaces = Table(
    "asyncroute_namespaces",
    metadata,
    Column("key", Integer, primary_key=True),
    Column("name", _text(255), nullable=False),
    # On PostgreSQL, only the sequence of this column is used; see `statements`.
    Column("change", BigInteger, Identity(), nullable=False),
    Column("notify_until_us", BigInteger, nullable=False, server_default="0"),
    Column("secret", LargeBinary, nullable=False),
    UniqueConstraint("name", name="asyncroute_namespace_name"),
)

tasks = Table(
    "asyncroute_tasks",
    metadata,
    Column("namespace", Integer, nullable=False),
    Column("id", _text(128), nullable=False),
    Column("async_route_id", _text(255), nullable=False),
    Column("endpoint", _text(255), nullable=False),
    Column("state", _text(16), nullable=False),
    Column("cancellable", Integer, nullable=False),
    Column("user", _text(255), nullable=False),
    Column("url", _text(), nullable=False),
    Column("method", _text(32), nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("started_us", BigInteger),
    Column("completed_us", BigInteger),
    Column("expires_us", BigInteger),
    Column("progress", Float),
    Column("progress_message", _text()),
    Column("result_json", LargeBinary),
    Column("error", _text()),
    Column("error_status", Integer),
    Column("stopping", Integer, nullable=False),
    Column("permission_json", LargeBinary),
    Column("timeout_us", BigInteger),
    Column("start_by_us", BigInteger),
    Column("start_at_us", BigInteger),
    Column("retention_us", BigInteger, nullable=False),
    Column("on_loss", _text(16), nullable=False),
    Column("retry_json", LargeBinary),
    Column("attempt", Integer),
    Column("last_error", _text()),
    Column("unique_key", _text(64)),
    Column("body_size", BigInteger, nullable=False),
    Column("callback_json", LargeBinary),
    Column("callback_state", _text(16)),
    Column("callback_attempts", Integer, nullable=False, server_default="0"),
    Column("owner", _text(64)),
    Column("epoch", Integer, nullable=False),
    Column("restarts", Integer, nullable=False, server_default="0"),
    Column("revision", Integer, nullable=False),
    Column("change", BigInteger, nullable=False),
    Column("waiting_change", BigInteger),
    Column("started_change", BigInteger),
    Column("completed_change", BigInteger),
    Column("sse_group", _text(255)),
    Column("sse_url", _text()),
    Column("sse_result", Integer, nullable=False, server_default="0"),
    Column("remove_after_us", BigInteger),
    Column("request", LargeBinary),
    PrimaryKeyConstraint("id", "namespace"),
)
# For each index, storing a task adds a page to the log. So lists over all states have no index of
# their own, but merge five ranges.
_index("asyncroute_task_state", tasks, "state", "created_us")
_index(
    "asyncroute_task_waiting", tasks, "endpoint", "created_us",
    where="state = 'NotStarted' AND start_at_us IS NULL",
)  # fmt: skip
_index(
    "asyncroute_task_delayed", tasks, "endpoint", "start_at_us",
    where="state = 'NotStarted' AND start_at_us IS NOT NULL",
)  # fmt: skip
_index("asyncroute_task_user", tasks, "user", "state", "created_us")
_index("asyncroute_task_change", tasks, "change")
_index(
    "asyncroute_task_remove_after", tasks, "remove_after_us", where="remove_after_us IS NOT NULL"
)
_index(
    "asyncroute_task_start_by", tasks, "start_by_us",
    where="state = 'NotStarted' AND start_by_us IS NOT NULL",
)  # fmt: skip
_index("asyncroute_task_stopping", tasks, "owner", where="stopping = 1")
_index("asyncroute_task_bound", tasks, "owner", where="state = 'NotStarted' AND owner IS NOT NULL")

grants = Table(
    "asyncroute_grants",
    metadata,
    Column("namespace", Integer, nullable=False),
    Column("task_id", _text(128), nullable=False),
    Column("reader", _text(264), nullable=False),
    Column("user", _text(255), nullable=False),
    Column("state", _text(16), nullable=False),
    Column("created_us", BigInteger, nullable=False),
    PrimaryKeyConstraint("task_id", "reader", "namespace"),
)
"""One row per (kind, name) that may list a task. It repeats columns of the task, so that a query
reads one index range.
"""
_index("asyncroute_grant_state", grants, "reader", "state", "created_us")
_index("asyncroute_grant_user", grants, "reader", "user", "state", "created_us")

bodies = Table(
    "asyncroute_bodies",
    metadata,
    Column("namespace", Integer, nullable=False),
    Column("task_id", _text(128), nullable=False),
    Column("part", Integer, nullable=False),
    Column("data", LargeBinary, nullable=False),
    PrimaryKeyConstraint("task_id", "part", "namespace"),
)

events = Table(
    "asyncroute_events",
    metadata,
    Column("namespace", Integer, nullable=False),
    Column("task_id", _text(128), nullable=False),
    Column("change", BigInteger, nullable=False),
    Column("name", _text(255), nullable=False),
    Column("data", LargeBinary, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("number", BigInteger, nullable=False),
    PrimaryKeyConstraint("task_id", "change", "namespace"),
)
"""View events, and the states of earlier runs. The states of the current run are in the task's
row.
"""
_index("asyncroute_event_change", events, "change")

keys = Table(
    "asyncroute_keys",
    metadata,
    Column("namespace", Integer, nullable=False),
    Column("name", _text(64), nullable=False),
    Column("fingerprint", _text(64), nullable=False),
    Column("task_id", _text(128), nullable=False),
    PrimaryKeyConstraint("name", "namespace"),
)
"""One row per ``Idempotency-Key`` of a task, and per unfinished task with a ``unique`` key."""
Index("asyncroute_key_task", keys.c.task_id, keys.c.namespace)

callbacks = Table(
    "asyncroute_callbacks",
    metadata,
    Column("namespace", Integer, nullable=False),
    Column("task_id", _text(128), nullable=False),
    Column("webhook_id", _text(64), nullable=False),
    Column("url", _text(), nullable=False),
    Column("host", _text(255), nullable=False),
    Column("method", _text(32), nullable=False),
    Column("content_type", _text(32), nullable=False),
    Column("headers", LargeBinary, nullable=False),
    Column("event_name", _text(), nullable=False),
    Column("send_result", Integer, nullable=False),
    Column("is_trusted", Integer, nullable=False),
    Column("depth", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("due_us", BigInteger),
    Column("holder", _text(64)),
    PrimaryKeyConstraint("task_id", "namespace"),
)
"""The outbox: one row per task with a callback. ``due_us`` is NULL before the task ends, and after
the callback has succeeded or failed.
"""
_index("asyncroute_callback_due", callbacks, "due_us", where="due_us IS NOT NULL")
_index("asyncroute_callback_holder", callbacks, "holder", where="holder IS NOT NULL")

shared_values = Table(
    "asyncroute_values",
    metadata,
    Column("namespace", Integer, primary_key=True, autoincrement=False),
    Column("key", _text(255), primary_key=True),
    Column("value", LargeBinary, nullable=False),
    Column("version", BigInteger, nullable=False),
)

workers = Table(
    "asyncroute_workers",
    metadata,
    Column("namespace", Integer, primary_key=True, autoincrement=False),
    Column("name", _text(64), primary_key=True),
    Column("lock_file", _text(64), nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("process", _text(64), nullable=False),
    Column("beat", BigInteger, nullable=False),
    Column("endpoints", _text(), nullable=False),
)

RECORD = [
    column
    for column in tasks.columns
    if column.name not in ("namespace", "remove_after_us", "request")
]
"""The columns of a record, in field order."""
