"""The query plans of PostgreSQL before it has statistics: statements about one task read only the
rows of that task, not all tasks of the namespace.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import psycopg
import pytest
from sqlalchemy.engine import make_url

from flask_asyncroute import metadata
from flask_asyncroute.callbacks.model import Delivery
from flask_asyncroute.permissions import Access, Permission
from flask_asyncroute.snapshot import Body
from flask_asyncroute.stores.base import Expect, StartKey, ViewEvent
from flask_asyncroute.stores.registry import make_store
from flask_asyncroute.stores.sql.statements import Statements
from flask_asyncroute.task import TERMINAL, State
from tests.support.databases import new_postgresql_database
from tests.support.tasks import new_task

TASKS = 2000
T0 = 1_700_000_000_000_000
WAITING = Expect((State.NOT_STARTED,))
RUNNING = Expect((State.RUNNING,), "me", 1)
END = ("state", "completed_us", "result_json", "progress", "progress_message")
STOP = ("state", "completed_us", "error", "stopping")
REQUEUE = (
    "state", "owner", "started_us", "expires_us", "progress", "progress_message", "start_by_us",
    "start_at_us",
)  # fmt: skip
RETRY = (*REQUEUE, "attempt", "last_error")
SQL = Statements("postgresql")
STATEMENTS = {
    **{
        name: text
        for name, text in vars(SQL).items()
        if isinstance(text, str)
        and ("%(task_id)s" in text or name in ("get_key", "get_task_of_key"))
        and not name.startswith(("_", "add_"))
    },
    "finish": SQL.update_task(END, RUNNING),
    "finish plain": SQL.update_task(END, RUNNING, is_plain=True),
    "abort waiting": SQL.update_task(("state", "completed_us", "error"), WAITING),
    "abort plain waiting": SQL.update_task(("state", "completed_us", "error"), WAITING, True),
    "stop": SQL.update_task(STOP, RUNNING),
    "release": SQL.update_task(("stopping",), Expect((State.ABORTED,), "me", 1, stopping=True)),
    "progress": SQL.update_task(("progress", "progress_message"), RUNNING),
    "requeue": SQL.update_task(REQUEUE, RUNNING),
    "retry": SQL.update_task(RETRY, RUNNING),
    "delete unstarted": SQL.delete_task(WAITING),
    "purge": SQL.delete_task(Expect(tuple(TERMINAL), stopping=False)),
    "find": SQL.find_task(RUNNING),
    "lock": SQL.lock_task(RUNNING),
    "events of a task": SQL.events_since(of_task=True, of_group=False),
}
VALUES: dict[str, Any] = {
    "task_id": "task-1000", "name": "key-1000", "now": T0, "owner": "me", "since": 5,
    "newest": 10**9,
    "limit": 100, "part": 0, "holder": "me", "due_us": T0, "headers": "{}", "completed_us": T0,
    "started_us": None, "expires_us": None, "start_by_us": None, "result_json": "1", "progress": 5.0,
    "progress_message": "m", "error": "x", "stopping": 1, "is_owner": "me", "is_epoch": 1,
    "is_stopping": 0, "state": "Aborted", "state_0": "Running", "state_1": "Completed",
    "state_2": "Failed", "unique_key": "key-1000", "attempt": 2, "last_error": "x",
    "start_at_us": T0, "store_now": T0,
    "before": T0, "start_before": T0, "endpoint_0": "work", "limit_0": 2, "endpoint_1": "other",
    "limit_1": 2,
}  # fmt: skip
INDEXES = {f"asyncroute_{name}" for name in (
    "tasks_pkey", "events_pkey", "grants_pkey", "keys_pkey", "callbacks_pkey", "bodies_pkey",
    "key_task",
)}  # fmt: skip
COPIED = ("tasks", "events", "grants", "keys", "callbacks", "bodies")


@pytest.fixture(scope="module")
def connection(postgresql_server: str) -> Iterator[psycopg.Connection[Any]]:
    """Return a connection to a database with tasks in one namespace and without statistics."""
    with new_postgresql_database(postgresql_server) as url:
        store: Any = make_store(url, "", "test", True)
        store.open()
        VALUES["ns"] = store._ns
        conninfo = make_url(url).set(drivername="postgresql")
        with psycopg.connect(
            conninfo.render_as_string(hide_password=False), autocommit=True
        ) as made:
            for table in metadata.tables:
                made.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")  # type: ignore[arg-type]
            add_tasks(store, made)
            store.close()
            found = made.execute("SELECT count(*) FROM pg_stats WHERE tablename ~ '^asyncroute_'")
            assert found.fetchone() == (0,), "there are no statistics"
            made.autocommit = False
            made.prepare_threshold = None
            yield made


def add_tasks(store: Any, connection: psycopg.Connection[Any]) -> None:
    """Store a task with a row in every table, and copy its rows."""
    permission = msgspec.json.encode(Permission(Access(groups=("g",))))
    task = new_task(
        "task-0", user="anna", sse_group="g", body_size=5, permission_json=permission,
        callback_json=b"{}", callback_state="NotStarted",
    )  # fmt: skip
    delivery = Delivery(
        webhook_id="w", url="http://localhost/", host="localhost", method="POST",
        content_type="application/json", headers={}, event_name="e", send_result=True,
        is_trusted=True, depth=0,
    )  # fmt: skip
    store.add(
        task, b"{}", Body([b"12345"]), [("groups", "g")], StartKey("key-0", "f"), None, delivery
    )
    store.claim("task-0", "me", T0)
    store.add_events("task-0", Expect((State.RUNNING,)), [ViewEvent("e", b"1", 1)])
    connection.execute(
        "UPDATE asyncroute_tasks SET state = 'NotStarted', owner = NULL, started_us = NULL, "
        "waiting_change = NULL, started_change = NULL, epoch = 0"
    )
    for name in COPIED:
        table = metadata.tables[f"asyncroute_{name}"]
        copied = {"id": "'task-' || n", "task_id": "'task-' || n", "change": f"{table.name}.change"}
        if name == "keys":
            copied["name"] = "'key-' || n"
        if name in ("tasks", "events"):
            copied["change"] = f"{table.name}.change + 10 + n"
        columns = ", ".join(f'"{column.name}"' for column in table.columns)
        values = ", ".join(
            copied.get(column.name, f'{table.name}."{column.name}"') for column in table.columns
        )
        connection.execute(
            f"INSERT INTO {table.name} ({columns}) SELECT {values} "  # type: ignore[arg-type]
            f"FROM {table.name} CROSS JOIN generate_series(1, {TASKS - 1}) AS n"
        )
        found = connection.execute(f"SELECT count(*) FROM {table.name}").fetchone()  # type: ignore[arg-type]
        assert found is not None and found[0] >= TASKS, name


def prepare(connection: psycopg.Connection[Any], text: str) -> str:
    """Prepare a statement as the driver does; return the command that executes it."""
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", text)))
    types = []
    for name in names:
        value = VALUES[name]
        if isinstance(value, int):  # the driver sends the smallest type
            types.append("smallint" if abs(value) < 2**15 else "bigint")
        else:
            types.append("double precision" if isinstance(value, float) else "unknown")
    for number, name in enumerate(names, 1):
        text = text.replace(f"%({name})s", f"${number}")
    text = text.replace("%%", "%")
    connection.execute(f"PREPARE statement ({', '.join(types)}) AS {text}")  # type: ignore[arg-type]
    literals = [psycopg.sql.Literal(VALUES[name]).as_string(connection) for name in names]
    return f"EXECUTE statement ({', '.join(literals)})"


def scans(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the steps of a plan that read a table or an index."""
    if node["Node Type"].endswith("Scan"):
        yield node
    for child in node.get("Plans", ()):
        yield from scans(child)


def first_column(connection: psycopg.Connection[Any], index: str) -> str:
    """Return the first column of an index. With a condition on a later column only, PostgreSQL
    would read the whole index.
    """
    found = connection.execute("SELECT pg_get_indexdef(%s::regclass, 1, true)", (index,)).fetchone()
    assert found is not None
    return str(found[0])


def assert_reads_one_task(connection: psycopg.Connection[Any], execute: str) -> None:
    found = connection.execute(f"EXPLAIN (FORMAT JSON) {execute}").fetchone()  # type: ignore[arg-type]
    assert found is not None
    plan = found[0][0]["Plan"]
    steps = [
        step
        for step in scans(plan)
        if step.get("Relation Name", step.get("Index Name", "")).startswith("asyncroute_")
        and step.get("Relation Name") != "asyncroute_namespaces"
    ]
    assert steps, plan
    for step in steps:
        if step["Node Type"] == "Bitmap Heap Scan":
            continue  # reads the rows that the index scan below it has found
        assert step.get("Index Name") in INDEXES, step
        condition = re.sub(r"::\w+|[()]", "", step["Index Cond"])
        found_by = re.match(r"(?:\w+\.)?(id|task_id|name) = ", condition)
        assert found_by and found_by[1] == first_column(connection, step["Index Name"]), step


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan", "auto"])
@pytest.mark.parametrize("name", STATEMENTS)
def test_a_statement_about_one_task_reads_only_its_rows(
    connection: psycopg.Connection[Any], name: str, mode: str
) -> None:
    """With "auto", PostgreSQL may change the plan after five executions."""
    try:
        connection.execute(f"SET LOCAL plan_cache_mode = {mode}")  # type: ignore[arg-type]
        execute = prepare(connection, STATEMENTS[name])
        assert_reads_one_task(connection, execute)
        for _ in range(10):
            connection.execute("SAVEPOINT before")
            connection.execute(execute)  # type: ignore[arg-type]
            connection.execute("ROLLBACK TO before")
            assert_reads_one_task(connection, execute)
    finally:
        connection.rollback()
        connection.execute("DEALLOCATE ALL")
        connection.rollback()


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize("has_statistics", [False, True])
def test_the_check_of_start_timeouts_reads_only_its_index(
    connection: psycopg.Connection[Any], mode: str, has_statistics: bool
) -> None:
    """2,000 tasks wait without a limit, and ten have one."""
    try:
        connection.execute(
            "UPDATE asyncroute_tasks SET start_by_us = %s WHERE id LIKE 'task-100_'", (2 * T0,)
        )
        if has_statistics:
            connection.execute("ANALYZE asyncroute_tasks")
        connection.execute(f"SET LOCAL plan_cache_mode = {mode}")  # type: ignore[arg-type]
        execute = prepare(connection, SQL.not_started_in_time)
        found = connection.execute(f"EXPLAIN (FORMAT JSON) {execute}").fetchone()  # type: ignore[arg-type]
        assert found is not None
        indexes = [step.get("Index Name") for step in scans(found[0][0]["Plan"])]
        assert {*indexes, None} == {"asyncroute_task_start_by", None}
        assert "start_by_us <= " in str(found)
    finally:
        connection.rollback()
        connection.execute("DEALLOCATE ALL")
        connection.rollback()


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize("has_statistics", [False, True])
def test_the_poll_for_waiting_tasks_reads_only_ranges_of_their_indexes(
    connection: psycopg.Connection[Any], mode: str, has_statistics: bool
) -> None:
    """Half of 2,000 waiting tasks wait for a retry."""
    try:
        connection.execute(
            "UPDATE asyncroute_tasks SET start_at_us = %s + change WHERE change %% 2 = 0", (T0,)
        )
        if has_statistics:
            connection.execute("ANALYZE asyncroute_tasks")
        connection.execute(f"SET LOCAL plan_cache_mode = {mode}")  # type: ignore[arg-type]
        execute = prepare(connection, SQL.waiting_tasks(2))
        found = connection.execute(f"EXPLAIN (FORMAT JSON) {execute}").fetchone()  # type: ignore[arg-type]
        assert found is not None
        read = [
            (
                step.get("Index Name"),
                re.findall(r"(\w+)\)?(?:::\w+)? [<>=]", step.get("Index Cond", "")),
            )
            for step in scans(found[0][0]["Plan"])
            if step["Node Type"] != "Subquery Scan"
        ]
        created = ("asyncroute_task_waiting", ["namespace", "endpoint", "created_us"])
        retried = ("asyncroute_task_delayed", ["namespace", "endpoint", "start_at_us"])
        assert sorted(read) == sorted([created, created, retried] * 2)
    finally:
        connection.rollback()
        connection.execute("DEALLOCATE ALL")
        connection.rollback()


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize("has_statistics", [False, True])
def test_the_poll_for_unpublished_tasks_reads_only_their_range(
    connection: psycopg.Connection[Any], mode: str, has_statistics: bool
) -> None:
    """2,000 tasks are published, and ten are not."""
    try:
        connection.execute("UPDATE asyncroute_tasks SET change = 0 WHERE id LIKE 'task-100_'")
        if has_statistics:
            connection.execute("ANALYZE asyncroute_tasks")
        connection.execute(f"SET LOCAL plan_cache_mode = {mode}")  # type: ignore[arg-type]
        execute = prepare(connection, SQL.unpublished_tasks)
        found = connection.execute(f"EXPLAIN (FORMAT JSON) {execute}").fetchone()  # type: ignore[arg-type]
        assert found is not None
        steps = list(scans(found[0][0]["Plan"]))
        assert {step.get("Index Name") for step in steps} <= {"asyncroute_task_change", None}
        assert any("change = 0" in step.get("Index Cond", "") for step in steps), steps
    finally:
        connection.rollback()
        connection.execute("DEALLOCATE ALL")
        connection.rollback()


def test_the_statements_about_one_task_are_complete() -> None:
    names = {
        "get_task", "get_request", "get_locked_task", "claim_plain_task", "claim_task", "get_key", "get_task_of_key",
        "get_callback", "set_grant_state", "get_body_part", "get_last_event", "delete_events",
        "delete_grants", "delete_keys", "release_unique_key", "delete_callback", "delete_body", "begin_sending",
        "publish_task",
    }  # fmt: skip
    assert names <= set(STATEMENTS)
