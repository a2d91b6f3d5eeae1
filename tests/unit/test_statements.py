"""The SQL statements: each dialect gets its own text, and SQLite uses the partial indexes."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from flask_asyncroute.stores.base import Expect, TaskStore
from flask_asyncroute.stores.sql.statements import Statements
from flask_asyncroute.task import State

EXPECT = Expect((State.RUNNING, State.ABORTED), owner="me", epoch=1, stopping=False)


def texts(sql: Statements) -> dict[str, str]:
    """Return the fixed statements by name, and one example of each statement built per call."""
    fixed = {name: text for name, text in vars(sql).items() if not name.startswith("_")}
    return {
        **fixed,
        "update_task": sql.update_task(("state", "completed_us"), EXPECT, is_plain=True),
        "delete_task": sql.delete_task(EXPECT),
        "find_task": sql.find_task(EXPECT),
        "lock_task": sql.lock_task(EXPECT),
        "events_since": sql.events_since(True, True),
        "waiting_tasks": sql.waiting_tasks(3),
        "delayed_tasks": sql.waiting_tasks(3, only_delayed=True),
    }


POSTGRESQL_ONLY = {"keep_notifying": {"ns", "us"}}
"""The parameters of statements that are empty for SQLite, by statement."""

MAY_USE = {"owners": {"task_bound"}}
"""Further indexes that SQLite 3.53 uses and 3.40 does not, by statement."""


@pytest.fixture
def connection(
    make_sqlite_store: Callable[..., TaskStore], sqlite_path: Path
) -> Iterator[sqlite3.Connection]:
    make_sqlite_store().open()
    with closing(sqlite3.connect(sqlite_path)) as made:
        yield made


def plan(connection: sqlite3.Connection, text: str) -> str:
    values = dict.fromkeys(re.findall(r":(\w+)", text), 1)
    rows = connection.execute(f"EXPLAIN QUERY PLAN {text}", values).fetchall()
    return "\n".join(row[3] for row in rows)


def test_sqlite_compiles_every_statement(connection: sqlite3.Connection) -> None:
    for name, text in texts(Statements("sqlite")).items():
        if name in POSTGRESQL_ONLY:
            assert text == ""
            continue
        assert text, name
        assert not re.search(r"%\(|\[|FOR UPDATE|pg_notify", text), name
        plan(connection, text)


def test_postgresql_statements_use_the_parameter_style_of_the_driver() -> None:
    sqlite_texts = texts(Statements("sqlite"))
    for name, text in texts(Statements("postgresql")).items():
        assert not re.search(r":\w|\[", text), name
        allowed = POSTGRESQL_ONLY.get(name) or set(re.findall(r":(\w+)", sqlite_texts[name]))
        assert set(re.findall(r"%\((\w+)\)s", text)) <= allowed, name


@pytest.mark.parametrize(
    "name, indexes",
    [
        ("owners", {"task_state", "task_stopping", "callback_holder"}),
        ("held_tasks", {"task_state", "task_stopping"}),
        ("tasks_past_retention", {"task_remove_after"}),
        ("not_started_in_time", {"task_start_by"}),
        ("first_and_last_due", {"callback_due"}),
        ("due_callbacks", {"callback_due", "callback_holder"}),
        ("held_callbacks", {"callback_holder"}),
        ("changed_tasks", {"task_change"}),
        ("ended_tasks", {"task_change"}),
        ("waiting_endpoints", {"task_waiting", "task_delayed"}),
        ("count_unfinished", {"task_user"}),
        ("tasks_with_events", {"event_change"}),
    ],
)
def test_a_statement_uses_only_its_indexes(
    connection: sqlite3.Connection, name: str, indexes: set[str]
) -> None:
    steps = plan(connection, getattr(Statements("sqlite"), name))
    used = set(re.findall(r"INDEX asyncroute_(\w+)", steps))
    assert used in (indexes, indexes | MAY_USE.get(name, set()))
    assert not re.search(r"SCAN asyncroute_(?!\w+ USING)", steps), steps


def test_the_check_of_start_timeouts_reads_one_range(connection: sqlite3.Connection) -> None:
    steps = plan(connection, Statements("sqlite").not_started_in_time)
    assert steps == (
        "SEARCH asyncroute_tasks USING INDEX asyncroute_task_start_by "
        "(namespace=? AND start_by_us<?)"
    )


def test_the_poll_for_waiting_tasks_reads_ranges_of_indexes(
    connection: sqlite3.Connection,
) -> None:
    steps = plan(connection, Statements("sqlite").waiting_tasks(3))
    used = re.findall(r"SEARCH asyncroute_tasks USING INDEX asyncroute_(\w+) \((.*)\)", steps)
    due, ahead = (f"namespace=? AND endpoint=? AND created_us{sign}?" for sign in "<>")
    started = "namespace=? AND endpoint=? AND start_at_us>? AND start_at_us<?"
    ranges = [("task_waiting", due), ("task_waiting", ahead), ("task_delayed", started)]
    assert used == ranges * 3
    assert "TEMP B-TREE" not in steps
    steps = plan(connection, Statements("sqlite").waiting_tasks(3, only_delayed=True))
    assert re.findall(r"SEARCH asyncroute_tasks USING INDEX asyncroute_(\w+)", steps) == (
        ["task_delayed"] * 3
    )
    assert "TEMP B-TREE" not in steps
