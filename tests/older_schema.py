"""What makes the tables of version 1 of those of today, in every database."""

from __future__ import annotations

OLDER = (
    "ALTER TABLE asyncroute_namespaces RENAME COLUMN change TO removed_change",
    "DROP INDEX asyncroute_task_stopping",
    "DROP INDEX asyncroute_task_bound",
    "ALTER TABLE asyncroute_tasks DROP COLUMN restarts",
    "DROP TABLE asyncroute_workers",
    "DROP TABLE asyncroute_keys",
    "ALTER TABLE asyncroute_tasks DROP COLUMN waiting_change",
    "ALTER TABLE asyncroute_tasks DROP COLUMN started_change",
    "ALTER TABLE asyncroute_tasks DROP COLUMN completed_change",
    "ALTER TABLE asyncroute_tasks DROP COLUMN sse_group",
    "ALTER TABLE asyncroute_tasks DROP COLUMN sse_url",
    "ALTER TABLE asyncroute_tasks DROP COLUMN sse_result",
    "ALTER TABLE asyncroute_tasks DROP COLUMN callback_json",
    "ALTER TABLE asyncroute_tasks DROP COLUMN callback_state",
    "ALTER TABLE asyncroute_tasks DROP COLUMN callback_attempts",
    "DROP TABLE asyncroute_events",
    "DROP TABLE asyncroute_callbacks",
)
