"""The tables, for every SQL store and for Alembic. Columns hold plain integers, texts and bytes, so that no driver converts.

A task's columns come in the order of the record's fields. An empty ``user`` means nobody: SQL compares and orders it
like any other, which NULL it would not.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.types import TypeEngine


def _text(length: int | None = None) -> TypeEngine[str]:
    """Return the type of a text that every database compares by code point, as SQLite does by itself."""
    kind = Text if length is None else String
    return kind(length).with_variant(kind(length, collation="C"), "postgresql")


metadata = MetaData()

schema = Table("asyncroute_schema", metadata, Column("version", Integer, primary_key=True, autoincrement=False))

# Each index costs every start a page of log. So there is none for lists in all states: those merge five ranges.
namespaces = Table(
    "asyncroute_namespaces",
    metadata,
    Column("key", Integer, primary_key=True),
    Column("name", _text(255), nullable=False),
    Column("change", BigInteger, nullable=False),
    Column("secret", LargeBinary, nullable=False),
    UniqueConstraint("name", name="asyncroute_namespace_name"),
)

tasks = Table(
    "asyncroute_tasks",
    metadata,
    Column("namespace", Integer, primary_key=True, autoincrement=False),
    Column("id", _text(128), primary_key=True),
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
    Column("retention_us", BigInteger, nullable=False),
    Column("on_loss", _text(16), nullable=False),
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
    Column("outlived_us", BigInteger),
    Column("request", LargeBinary),
)
Index("asyncroute_task_state", tasks.c.namespace, tasks.c.state, tasks.c.created_us)
Index("asyncroute_task_user", tasks.c.namespace, tasks.c.user, tasks.c.state, tasks.c.created_us)
Index("asyncroute_task_change", tasks.c.namespace, tasks.c.change)
Index(
    "asyncroute_task_outlived",
    tasks.c.namespace,
    tasks.c.outlived_us,
    sqlite_where=tasks.c.outlived_us.is_not(None),
    postgresql_where=tasks.c.outlived_us.is_not(None),
)
Index(
    "asyncroute_task_stopping",
    tasks.c.namespace,
    tasks.c.owner,
    sqlite_where=tasks.c.stopping == 1,
    postgresql_where=tasks.c.stopping == 1,
)
Index(
    "asyncroute_task_bound",
    tasks.c.namespace,
    tasks.c.owner,
    sqlite_where=(tasks.c.state == "NotStarted") & tasks.c.owner.is_not(None),
    postgresql_where=(tasks.c.state == "NotStarted") & tasks.c.owner.is_not(None),
)

grants = Table(
    "asyncroute_grants",
    metadata,
    Column("namespace", Integer, primary_key=True, autoincrement=False),
    Column("task_id", _text(128), primary_key=True),
    Column("reader", _text(264), primary_key=True),
    Column("user", _text(255), nullable=False),
    Column("state", _text(16), nullable=False),
    Column("created_us", BigInteger, nullable=False),
)
"""One row for each (kind, name) that may list a task: what a query needs to find it is here too, so that it is one range."""
Index("asyncroute_grant_state", grants.c.namespace, grants.c.reader, grants.c.state, grants.c.created_us)
Index(
    "asyncroute_grant_user",
    grants.c.namespace,
    grants.c.reader,
    grants.c.user,
    grants.c.state,
    grants.c.created_us,
)

bodies = Table(
    "asyncroute_bodies",
    metadata,
    Column("namespace", Integer, primary_key=True, autoincrement=False),
    Column("task_id", _text(128), primary_key=True),
    Column("part", Integer, primary_key=True, autoincrement=False),
    Column("data", LargeBinary, nullable=False),
)

events = Table(
    "asyncroute_events",
    metadata,
    Column("namespace", Integer, primary_key=True, autoincrement=False),
    Column("task_id", _text(128), primary_key=True),
    Column("change", BigInteger, primary_key=True, autoincrement=False),
    Column("name", _text(255), nullable=False),
    Column("data", LargeBinary, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("number", BigInteger, nullable=False),
)
"""What views have sent, and states of runs that were lost; the states of the present run are in its task."""
Index("asyncroute_event_change", events.c.namespace, events.c.change)

keys = Table(
    "asyncroute_keys",
    metadata,
    Column("namespace", Integer, primary_key=True, autoincrement=False),
    Column("name", _text(64), primary_key=True),
    Column("fingerprint", _text(64), nullable=False),
    Column("task_id", _text(128), nullable=False),
)
"""One row for each task that was started with an ``Idempotency-Key``."""
Index("asyncroute_key_task", keys.c.namespace, keys.c.task_id)

callbacks = Table(
    "asyncroute_callbacks",
    metadata,
    Column("namespace", Integer, primary_key=True, autoincrement=False),
    Column("task_id", _text(128), primary_key=True),
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
)
"""The outbox: one row for each task with a callback. It is due from the task's end until it was sent or given up."""
Index(
    "asyncroute_callback_due",
    callbacks.c.namespace,
    callbacks.c.due_us,
    sqlite_where=callbacks.c.due_us.is_not(None),
    postgresql_where=callbacks.c.due_us.is_not(None),
)
Index(
    "asyncroute_callback_holder",
    callbacks.c.namespace,
    callbacks.c.holder,
    sqlite_where=callbacks.c.holder.is_not(None),
    postgresql_where=callbacks.c.holder.is_not(None),
)

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
    Column("place", _text(64), nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("process", _text(64), nullable=False),
    Column("beat", BigInteger, nullable=False),
    Column("endpoints", _text(), nullable=False),
)

RECORD = [column for column in tasks.columns if column.name not in ("namespace", "outlived_us", "request")]
"""The columns that make a record, in the order of its fields."""
