"""What brings the tables of an older release up to date, step by step, as SQL that each database understands.

A step is never changed once it is released: it says what a database of that time lacks. ``{text}`` and ``{bytes}`` stand
for the types that each database has for them, see :func:`steps`.
"""

from __future__ import annotations

VERSION = 4
"""Of the schema in `tables`; raised with every change to it."""

UPGRADES: dict[int, tuple[str, ...]] = {
    2: (
        "ALTER TABLE asyncroute_namespaces RENAME COLUMN removed_change TO change",
    ),
    3: (
        "ALTER TABLE asyncroute_tasks ADD COLUMN restarts INTEGER NOT NULL DEFAULT 0",
        "CREATE INDEX asyncroute_task_stopping ON asyncroute_tasks (namespace, owner) WHERE stopping = 1",
        "CREATE INDEX asyncroute_task_bound ON asyncroute_tasks (namespace, owner) "
        "WHERE state = 'NotStarted' AND owner IS NOT NULL",
        "CREATE TABLE asyncroute_workers (namespace INTEGER NOT NULL, name {text} NOT NULL, place {text} NOT NULL, "
        "number BIGINT NOT NULL, process {text} NOT NULL, beat BIGINT NOT NULL, endpoints {text} NOT NULL, "
        "PRIMARY KEY (namespace, name))",
        "CREATE TABLE asyncroute_keys (namespace INTEGER NOT NULL, name {text} NOT NULL, fingerprint {text} NOT NULL, "
        "task_id {text} NOT NULL, PRIMARY KEY (namespace, name))",
        "CREATE INDEX asyncroute_key_task ON asyncroute_keys (namespace, task_id)",
    ),
    4: (
        "ALTER TABLE asyncroute_tasks ADD COLUMN callback_json {bytes}",
        "ALTER TABLE asyncroute_tasks ADD COLUMN callback_state {text}",
        "ALTER TABLE asyncroute_tasks ADD COLUMN callback_attempts INTEGER NOT NULL DEFAULT 0",
        "CREATE TABLE asyncroute_callbacks (namespace INTEGER NOT NULL, task_id {text} NOT NULL, webhook_id {text} NOT NULL, "
        "url {text} NOT NULL, host {text} NOT NULL, method {text} NOT NULL, content_type {text} NOT NULL, "
        "headers {bytes} NOT NULL, event_name {text} NOT NULL, send_result INTEGER NOT NULL, is_trusted INTEGER NOT NULL, "
        "depth INTEGER NOT NULL, attempts INTEGER NOT NULL, due_us BIGINT, holder {text}, PRIMARY KEY (namespace, task_id))",
        "CREATE INDEX asyncroute_callback_due ON asyncroute_callbacks (namespace, due_us) WHERE due_us IS NOT NULL",
        "CREATE INDEX asyncroute_callback_holder ON asyncroute_callbacks (namespace, holder) WHERE holder IS NOT NULL",
        "ALTER TABLE asyncroute_tasks ADD COLUMN waiting_change BIGINT",
        "ALTER TABLE asyncroute_tasks ADD COLUMN started_change BIGINT",
        "ALTER TABLE asyncroute_tasks ADD COLUMN completed_change BIGINT",
        "ALTER TABLE asyncroute_tasks ADD COLUMN sse_group {text}",
        "ALTER TABLE asyncroute_tasks ADD COLUMN sse_url {text}",
        "ALTER TABLE asyncroute_tasks ADD COLUMN sse_result INTEGER NOT NULL DEFAULT 0",
        "UPDATE asyncroute_tasks SET completed_change = change WHERE completed_us IS NOT NULL",
        "UPDATE asyncroute_tasks SET started_change = change WHERE state = 'Running'",
        "CREATE TABLE asyncroute_events (namespace INTEGER NOT NULL, task_id {text} NOT NULL, change BIGINT NOT NULL, "
        "name {text} NOT NULL, data {bytes} NOT NULL, epoch INTEGER NOT NULL, number BIGINT NOT NULL, "
        "PRIMARY KEY (namespace, task_id, change))",
        "CREATE INDEX asyncroute_event_change ON asyncroute_events (namespace, change)",
    ),
}  # fmt: skip
"""By the version that a step leads to."""

_TYPES = {
    "sqlite": {"text": "TEXT", "bytes": "BLOB"},
    "postgresql": {"text": 'TEXT COLLATE "C"', "bytes": "BYTEA"},
}


def steps(version: int, dialect: str) -> list[str]:
    """Return the statements that lead to ``version`` from the one before."""
    return [statement.format_map(_TYPES[dialect]) for statement in UPGRADES[version]]
