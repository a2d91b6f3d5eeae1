"""The fixed SQL statements, by subject. List queries are composed at run time; see `queries`.

Parameters are named; ``:ns`` is the key of the namespace. ``[sqlite: …]`` and ``[postgresql: …]``
enclose text for one database only.

Conditions of partial indexes are literals, such as ``stopping = 1``, because planners do not use
such an index with a parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from sqlalchemy import Table

from ...callbacks.model import NOT_STARTED, PENDING, RUNNING, Delivery
from ...task import UNFINISHED, AsyncRouteTask
from ..base import AHEAD_US, MAX_EVENTS, PROGRESS, Expect
from ..outbox import AT_ONCE, LONGEST_US, PER_HOST
from . import tables

CHANNEL = "asyncroute"
"""The PostgreSQL channel on which commits send notifications. Their payload is the namespace's
key, followed by :data:`SUBMITTED` for unpublished tasks, or by :data:`DELAYED` for new tasks with a
start time.
"""
SUBMITTED = " submitted"
DELAYED = " delayed"

NOW = "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS BIGINT)"
"""The time of a PostgreSQL server in microseconds since the epoch."""
DUE_PAGE = 100  # Maximum number of due callbacks read at once.


def _names(columns: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in columns)


def _literals(values: Iterable[str]) -> str:
    return ", ".join(f"'{value}'" for value in sorted(values))


def _later(first: str, second: str) -> str:
    return f"CASE WHEN {first} > {second} THEN {first} ELSE {second} END"


def _insert(table: Table, *omitted: str) -> str:
    names = [column.name for column in table.columns if column.name not in omitted]
    values = ", ".join(":ns" if name == "namespace" else f":{name}" for name in names)
    return f"INSERT INTO {table.name} ({_names(names)}) VALUES ({values})"


RECORD = _names(AsyncRouteTask.__struct_fields__)
"""The columns of a record, in field order. They are the last columns of each statement that returns
records; see `rows.record_of`.
"""
_RECORD_WITHOUT_RESULT = RECORD.replace('"result_json"', "NULL AS result_json")

_IN_NAMESPACE = "namespace [postgresql: + 0] = :ns"
"""The condition beside a condition on the first column of a primary key. PostgreSQL cannot use an
index that begins with the namespace for it; see `tables`.
"""
_IS_TASK = f"id = :task_id AND {_IN_NAMESPACE}"
_OF_TASK = f"task_id = :task_id AND {_IN_NAMESPACE}"
_STATE = "state [postgresql: || '']"
"""The state beside a condition on the id. PostgreSQL cannot use an index of the state for it."""
_CAN_START = (
    f"{_IS_TASK} AND {_STATE} = 'NotStarted' AND change [postgresql: + 0] > 0 "
    "AND (start_by_us IS NULL OR start_by_us > :now) "
    "AND (start_at_us IS NULL OR start_at_us <= :store_now)"
)
_IS_UNPUBLISHED = f"{_IS_TASK} AND change [postgresql: + 0] = 0"
_IS_VALUE = "namespace = :ns AND key = :key"
_IS_STOPPING = "namespace = :ns AND stopping = 1 AND owner IS NOT NULL"
_IS_BOUND = "namespace = :ns AND state = 'NotStarted' AND owner IS NOT NULL"
# Without these index hints, newer SQLite versions can read all waiting tasks in order of creation.
_WAITING = "asyncroute_tasks [sqlite: INDEXED BY asyncroute_task_waiting]"
_IS_WAITING = "namespace = :ns AND state = 'NotStarted' AND start_at_us IS NULL"
_DELAYED = "asyncroute_tasks [sqlite: INDEXED BY asyncroute_task_delayed]"
_IS_DELAYED = "namespace = :ns AND state = 'NotStarted' AND start_at_us IS NOT NULL"
_IS_PLAIN = """permission_json IS NULL AND callback_json IS NULL AND body_size = 0
    AND unique_key IS NULL"""
"""Matches tasks whose state one statement can change: no other table has rows that depend on it."""

# Change numbers follow the commit order. SQLite allows one writer at a time, so the next number is
# the highest number plus one.
#
# PostgreSQL commits several writes at once. Each acquires a shared lock of the namespace, locks the
# row of its task, takes its number from a sequence, and releases the locks at its commit. A reader
# reads the last number, then acquires the lock of the namespace exclusively for a moment: then all
# writes up to this number are committed. So a write waits for other writes only while a reader
# needs this lock. To avoid deadlocks, the lock of the namespace always comes before locks of rows.
_HIGHEST = """max(change, coalesce(
    (SELECT max(change) FROM asyncroute_tasks WHERE namespace = :ns), 0))"""
_SQLITE_NEWEST = f"""
    [sqlite: SELECT {_HIGHEST} AS change FROM asyncroute_namespaces WHERE key = :ns]"""
LOCK_CLASS = 0x61737963
"""The first key of the namespaces' advisory locks."""
UNIQUE_WAIT_MS = 5000
"""Maximum milliseconds that a start waits for an open transaction with the same ``unique`` key."""
FROZEN_MS = 10_000
"""Milliseconds after which PostgreSQL ends a transaction whose client sends nothing."""
_LAST_NUMBER = """
    SELECT last_value - CASE WHEN is_called THEN 0 ELSE 1 END AS change
    FROM asyncroute_namespaces_change_seq"""
_NEXT_NUMBER = "nextval('asyncroute_namespaces_change_seq')"
# A process can freeze or lose its network within a transaction. Its locks must not block the other
# processes until TCP notices that.
_LOCKED = f"""locked AS MATERIALIZED (
    SELECT set_config('idle_in_transaction_session_timeout', '{FROZEN_MS}', true),
        pg_advisory_xact_lock_shared({LOCK_CLASS}, CAST(:ns AS INTEGER)))"""
_NOTIFY = f"pg_notify('{CHANNEL}', CAST(key AS TEXT))"
# A notification wakes all processes of the app, so most writes send one only if a process has asked
# for it.
_NOTIFY_IF_ASKED = f"CASE WHEN notify_until_us > {NOW} THEN {_NOTIFY} END"
_NOTIFY_IF_DELAYED = f"""CASE WHEN CAST(:start_at_us AS BIGINT) IS NOT NULL
    THEN pg_notify('{CHANNEL}', CAST(key AS TEXT) || '{DELAYED}') END"""
_NEXT = "(SELECT change FROM counter)"
# Another process can have changed the task after this statement began.
_IF_LOCKED = "[postgresql: AND EXISTS (SELECT 1 FROM counter)]"


def _counter(where: str = "", is_urgent: bool = False, more: str = "") -> str:
    """Return the WITH clause of a statement that changes a task. :data:`_NEXT` reads the change
    number from it.

    :param is_urgent: whether to send a notification even if no process has asked for it.
    :param where: the condition of the statement. If no task meets the condition, nothing is locked,
        and no notification is sent.
    :param more: further columns of the counter for PostgreSQL.
    """
    notify = _NOTIFY if is_urgent else _NOTIFY_IF_ASKED
    found = f"""
        , found AS MATERIALIZED (
            SELECT id FROM asyncroute_tasks, locked WHERE {where} FOR UPDATE OF asyncroute_tasks)"""
    return f"""
        WITH [postgresql: {_LOCKED} {found if where else ""},]
        counter AS [postgresql: MATERIALIZED] (
            [sqlite: SELECT {_HIGHEST} + 1 AS change FROM asyncroute_namespaces WHERE key = :ns]
            [postgresql: SELECT {_NEXT_NUMBER} AS change, {notify} {more}
                FROM asyncroute_namespaces, {"found" if where else "locked"} WHERE key = :ns])"""


def _add_unique_key(has_idle_limit: bool) -> str:
    """Return the statement that stores a ``unique`` key, and returns no row if a task has it.

    It waits for an open transaction with the same key, but not for long.

    :param has_idle_limit: whether the transaction ends if the client is idle, so that a frozen
        process does not hold the key; see :data:`_LOCKED`.
    """
    idle = f", set_config('idle_in_transaction_session_timeout', '{FROZEN_MS}', true)"
    return f"""
        [postgresql: WITH before AS MATERIALIZED (
            SELECT current_setting('lock_timeout') AS lock_timeout),
        waiting AS MATERIALIZED (
            SELECT set_config('lock_timeout', '{UNIQUE_WAIT_MS}', true) {idle * has_idle_limit}
            FROM before)]
        INSERT INTO asyncroute_keys (namespace, name, fingerprint, task_id)
        SELECT CAST(:ns AS INTEGER), :unique_key, '', :id [postgresql: FROM waiting] WHERE true
        ON CONFLICT DO NOTHING RETURNING task_id
            [postgresql: , (SELECT set_config('lock_timeout', lock_timeout, true) FROM before)]"""


def _lock_task(columns: str, where: str) -> str:
    return f"""
        [postgresql: WITH {_LOCKED}]
        SELECT {columns} FROM asyncroute_tasks [postgresql: , locked] WHERE {where}
        [postgresql: FOR UPDATE OF asyncroute_tasks]"""


def _claim(where: str) -> str:
    started = _later("created_us", ":now")
    return f"""
        {_counter(where)}
        UPDATE asyncroute_tasks SET state = 'Running', owner = :owner, epoch = epoch + 1,
            started_us = {started}, expires_us = {started} + timeout_us,
            attempt = CASE WHEN retry_json IS NOT NULL THEN coalesce(attempt, 1) END,
            revision = revision + 1, change = {_NEXT},
            waiting_change = coalesce(waiting_change, change), started_change = {_NEXT}
        WHERE {where} {_IF_LOCKED} RETURNING request, {RECORD}"""


def _endpoints(name: str, table: str, where: str) -> str:
    """Return a CTE of the endpoints in one index. It takes one step per endpoint; DISTINCT would
    read the whole index.
    """
    return f"""{name} (endpoint) AS (
        SELECT min(endpoint) FROM {table} WHERE {where}
        UNION ALL SELECT (
            SELECT min(endpoint) FROM {table} WHERE {where} AND endpoint > {name}.endpoint)
        FROM {name} WHERE {name}.endpoint IS NOT NULL)"""


def _set_callback(state: str, attempts: str) -> str:
    return f"""
        {_counter(_IS_TASK)}
        UPDATE asyncroute_tasks SET callback_state = {state}, callback_attempts = {attempts},
            revision = revision + 1, change = {_NEXT}
        WHERE {_IS_TASK} {_IF_LOCKED} RETURNING {RECORD}"""


def _as_expected(expect: Expect) -> str:
    states = ", ".join(f":state_{number}" for number in range(len(expect.states)))
    where = f"{_IS_TASK} AND {_STATE} IN ({states})"
    for name in ("owner", "epoch", "stopping"):
        if getattr(expect, name) is not None:
            where += f" AND {name} = :is_{name}"
    return where


def expectation(expect: Expect) -> dict[str, Any]:
    """Return the parameters of a statement built for ``expect``."""
    states = {f"state_{number}": state.value for number, state in enumerate(expect.states)}
    stopping = None if expect.stopping is None else int(expect.stopping)
    return {**states, "is_owner": expect.owner, "is_epoch": expect.epoch, "is_stopping": stopping}


class Statements:
    """The statements in the dialect of one database.

    :param dialect_name: ``sqlite`` or ``postgresql``.
    """

    # --- Namespaces and change numbers

    get_namespace = "SELECT key, secret FROM asyncroute_namespaces WHERE name = :name"
    get_secret = "SELECT secret FROM asyncroute_namespaces WHERE key = :ns"
    add_namespace = """
        INSERT INTO asyncroute_namespaces (key, name, change, secret)
        VALUES (:key, :name, 0, :secret)"""
    # Blocks other transactions that execute this until the commit. SQLite has only one writer, so
    # it needs no lock.
    lock_namespace = f"""
        [postgresql: WITH {_LOCKED}]
        SELECT key FROM asyncroute_namespaces [postgresql: , locked] WHERE key = :ns
        [postgresql: FOR UPDATE OF asyncroute_namespaces]"""
    get_change = f"""
        {_SQLITE_NEWEST}
        [postgresql:
            WITH newest AS MATERIALIZED ({_LAST_NUMBER})
            SELECT change, pg_advisory_xact_lock({LOCK_CLASS}, CAST(:ns AS INTEGER))
            FROM newest]"""
    get_assigned_change = f"""
        {_SQLITE_NEWEST}
        [postgresql: {_LAST_NUMBER}]"""
    take_changes = f"""
        [sqlite: UPDATE asyncroute_namespaces SET change = {_HIGHEST} + :count WHERE key = :ns
            RETURNING change]
        [postgresql: SELECT {_NEXT_NUMBER} AS change, {_NOTIFY_IF_ASKED}
            FROM asyncroute_namespaces, generate_series(1, CAST(:count AS INTEGER))
            WHERE key = :ns]"""
    """Execute this after `lock_task`. SQLite returns only the last number."""
    keep_notifying = f"""[postgresql: UPDATE asyncroute_namespaces
        SET notify_until_us = {NOW} + :us WHERE key = :ns]"""
    # Execute this before a task is removed, so that its change number is never assigned again.
    skip_change = f"""
        [sqlite: UPDATE asyncroute_namespaces SET change = {_HIGHEST} + 1 WHERE key = :ns]
        [postgresql: SELECT {_NEXT_NUMBER}]"""

    # --- Tasks

    _new_task = _insert(
        tables.tasks, "waiting_change", "started_change", "completed_change", "remove_after_us"
    )
    add_task = f"{_counter(more=f', {_NOTIFY_IF_DELAYED}')} {_new_task.replace(':change', _NEXT)}"
    # Without a change number: the number of an open transaction would stop all readers of changes.
    add_unpublished_task = f"{_new_task} ON CONFLICT DO NOTHING RETURNING id"
    unpublished_tasks = f"""
        SELECT {RECORD} FROM asyncroute_tasks WHERE namespace = :ns AND change = 0
        ORDER BY created_us LIMIT :limit"""
    publish_task = f"""
        {_counter(_IS_UNPUBLISHED)}
        UPDATE asyncroute_tasks SET change = {_NEXT}
        WHERE {_IS_UNPUBLISHED} {_IF_LOCKED} RETURNING {RECORD}"""
    notify_submitted = f"""
        [postgresql: SELECT pg_notify(
            '{CHANNEL}', CAST(CAST(:ns AS INTEGER) AS TEXT) || '{SUBMITTED}')]"""
    get_task = f"SELECT {RECORD} FROM asyncroute_tasks WHERE {_IS_TASK}"
    get_request = f"SELECT request, {RECORD} FROM asyncroute_tasks WHERE {_IS_TASK}"
    get_locked_task = _lock_task(RECORD, _IS_TASK)
    claim_task = _claim(_CAN_START)
    claim_plain_task = _claim(f"{_CAN_START} AND permission_json IS NULL")
    tasks_past_retention = f"""
        SELECT id FROM asyncroute_tasks
        WHERE namespace = :ns AND remove_after_us < :now AND stopping = 0
            AND (callback_state IS NULL OR callback_state NOT IN ({_literals(PENDING)}))
        ORDER BY remove_after_us LIMIT :limit"""
    not_started_in_time = f"""
        SELECT {RECORD} FROM asyncroute_tasks
        WHERE namespace = :ns AND state = 'NotStarted' AND start_by_us <= :now
            AND (owner IS NULL OR owner = :owner)
        ORDER BY start_by_us LIMIT :limit"""
    changed_tasks = f"""
        SELECT {RECORD} FROM asyncroute_tasks
        WHERE namespace = :ns AND change > :since AND change <= :newest
        ORDER BY change LIMIT :limit"""
    ended_tasks = f"""
        SELECT {RECORD} FROM asyncroute_tasks
        WHERE namespace = :ns AND change > :since AND change <= :newest
            AND (owner IS NULL OR owner != :worker OR state = 'Aborted')
            AND (completed_us IS NOT NULL OR epoch > CASE state WHEN 'NotStarted' THEN 0 ELSE 1 END)
        ORDER BY change LIMIT :limit"""

    # --- Grants, bodies, idempotency keys, quotas, shared values

    add_grant = _insert(tables.grants)
    set_grant_state = f"UPDATE asyncroute_grants SET state = :state WHERE {_OF_TASK}"
    delete_grants = f"DELETE FROM asyncroute_grants WHERE {_OF_TASK}"

    add_body_part = _insert(tables.bodies)
    get_body_part = f"SELECT data FROM asyncroute_bodies WHERE {_OF_TASK} AND part = :part"
    delete_body = f"DELETE FROM asyncroute_bodies WHERE {_OF_TASK}"

    add_key = _insert(tables.keys)
    get_key = f"SELECT task_id FROM asyncroute_keys WHERE name = :name AND {_IN_NAMESPACE}"
    get_task_of_key = f"""
        SELECT fingerprint, {RECORD}
        FROM asyncroute_keys AS keys JOIN asyncroute_tasks AS tasks
            ON tasks.id = keys.task_id AND tasks.{_IN_NAMESPACE}
        WHERE keys.name = :name AND keys.{_IN_NAMESPACE}"""
    delete_keys = f"DELETE FROM asyncroute_keys WHERE {_OF_TASK}"
    add_unique_key = _add_unique_key(has_idle_limit=True)
    add_key_of_app = _add_unique_key(has_idle_limit=False)
    """The same in a transaction of the app, which can be idle as long as the app wants."""
    release_unique_key = f"""
        DELETE FROM asyncroute_keys
        WHERE name = :unique_key AND {_IN_NAMESPACE} AND task_id = :task_id"""
    count_unfinished = f"""
        SELECT count(*) AS unfinished FROM (
            SELECT id FROM asyncroute_tasks
            WHERE namespace = :ns AND "user" = :user AND state IN ({_literals(UNFINISHED)})
            LIMIT :limit) AS found"""

    add_value = _insert(tables.shared_values)
    get_value = f"SELECT value, version FROM asyncroute_values WHERE {_IS_VALUE}"
    set_value = f"UPDATE asyncroute_values SET value = :value, version = :version WHERE {_IS_VALUE}"
    delete_value = f"DELETE FROM asyncroute_values WHERE {_IS_VALUE}"
    value_keys = "SELECT key FROM asyncroute_values WHERE namespace = :ns ORDER BY key"

    # --- Events

    add_event = _insert(tables.events)
    get_last_event = f"""
        SELECT change, epoch, number FROM asyncroute_events WHERE {_OF_TASK}
        ORDER BY change DESC LIMIT 1"""
    trim_events = f"""
        DELETE FROM asyncroute_events WHERE {_OF_TASK} AND change <= (
            SELECT change FROM asyncroute_events WHERE {_OF_TASK}
            ORDER BY change DESC LIMIT 1 OFFSET {MAX_EVENTS})"""
    delete_events = f"DELETE FROM asyncroute_events WHERE {_OF_TASK}"
    # With DISTINCT, SQLite would read all events of the namespace.
    tasks_with_events = """
        SELECT task_id FROM asyncroute_events
        WHERE namespace = :ns AND change > :since AND change <= :newest"""

    # --- The outbox

    _waits = "namespace = :ns AND due_us IS NOT NULL AND holder IS NULL"
    _is_held = "namespace = :ns AND holder IS NOT NULL"
    _mine = f"{_OF_TASK} AND holder = :holder"

    add_callback = _insert(tables.callbacks, "holder")
    get_callback = f"SELECT holder, headers FROM asyncroute_callbacks WHERE {_OF_TASK}"
    delete_callback = f"DELETE FROM asyncroute_callbacks WHERE {_OF_TASK}"
    make_callback_due = f"UPDATE asyncroute_callbacks SET due_us = {AT_ONCE} WHERE {_OF_TASK}"
    # Each subquery reads only one end of the index.
    first_and_last_due = f"""
        SELECT (SELECT min(due_us) FROM asyncroute_callbacks WHERE {_waits}) AS first_us,
            (SELECT max(due_us) FROM asyncroute_callbacks WHERE {_waits}) AS last_us"""
    count_held_callbacks = f"""
        SELECT host, count(*) AS held FROM asyncroute_callbacks WHERE {_is_held} GROUP BY host"""
    due_callbacks = f"""
        SELECT task_id, host FROM asyncroute_callbacks
        WHERE {_waits} AND (due_us <= :now OR due_us > :now + {LONGEST_US})
            AND host NOT IN (
                SELECT host FROM asyncroute_callbacks WHERE {_is_held}
                GROUP BY host HAVING count(*) >= {PER_HOST})
        ORDER BY due_us LIMIT {DUE_PAGE}"""
    hold_callback = f"""
        UPDATE asyncroute_callbacks SET holder = :holder WHERE {_OF_TASK}
        RETURNING attempts, {_names(Delivery.__struct_fields__)}"""
    held_callbacks = """
        SELECT task_id FROM asyncroute_callbacks WHERE namespace = :ns AND holder = :holder"""
    release_callback = f"UPDATE asyncroute_callbacks SET holder = NULL WHERE {_mine}"
    retry_callback = f"""
        UPDATE asyncroute_callbacks
        SET holder = NULL, attempts = attempts + 1, due_us = :due_us WHERE {_mine}"""
    finish_callback = f"""
        UPDATE asyncroute_callbacks
        SET holder = NULL, attempts = attempts + 1, due_us = NULL, headers = :headers
        WHERE {_mine}"""
    renew_callback = f"""
        UPDATE asyncroute_callbacks SET due_us = {AT_ONCE}, attempts = 0, headers = :headers
        WHERE {_OF_TASK}"""
    # These statements change the callback's state in the task's row.
    begin_sending = _set_callback(f"'{RUNNING}'", "callback_attempts")
    count_attempt = _set_callback(":state", "callback_attempts + 1")
    restart_sending = _set_callback(f"'{NOT_STARTED}'", "0")

    # --- Workers

    add_worker = _insert(tables.workers)
    count_beat = """
        UPDATE asyncroute_workers SET beat = beat + 1 WHERE namespace = :ns AND name = :name"""
    list_workers = f"""
        SELECT {_names(column.name for column in tables.workers.columns)}
        FROM asyncroute_workers WHERE namespace = :ns"""
    delete_worker = "DELETE FROM asyncroute_workers WHERE namespace = :ns AND name = :name"
    owners = f"""
        SELECT owner FROM asyncroute_tasks WHERE namespace = :ns AND state = 'Running'
        UNION SELECT owner FROM asyncroute_tasks WHERE {_IS_STOPPING}
        UNION SELECT owner FROM asyncroute_tasks WHERE {_IS_BOUND}
        UNION SELECT holder FROM asyncroute_callbacks WHERE {_is_held}"""
    # UNION ALL is enough: no task occurs in two of these parts.
    held_tasks = f"""
        SELECT {RECORD} FROM asyncroute_tasks
        WHERE namespace = :ns AND state = 'Running' AND owner = :owner
        UNION ALL SELECT {RECORD} FROM asyncroute_tasks WHERE {_IS_STOPPING} AND owner = :owner
        UNION ALL SELECT {RECORD} FROM asyncroute_tasks WHERE {_IS_BOUND} AND owner = :owner"""
    waiting_endpoints = f"""
        WITH RECURSIVE {_endpoints("waiting", _WAITING, _IS_WAITING)},
            {_endpoints("delayed", _DELAYED, _IS_DELAYED)}
        SELECT endpoint FROM waiting WHERE endpoint IS NOT NULL
        UNION SELECT endpoint FROM delayed WHERE endpoint IS NOT NULL"""

    def __init__(self, dialect_name: str) -> None:
        self._dialect_name = dialect_name
        for name, text in vars(Statements).items():
            if isinstance(text, str) and not name.startswith("_"):
                setattr(self, name, _in_dialect(dialect_name, text))

    def update_task(self, fields: tuple[str, ...], expect: Expect, is_plain: bool = False) -> str:
        """Return the compare-and-set statement that writes these fields and returns the new record.

        :param is_plain: match only a task that needs no change in other tables.
        """
        where = _as_expected(expect)
        if is_plain:
            where += f" AND {_IS_PLAIN}"
        return _update_task(self._dialect_name, fields, where)

    def delete_task(self, expect: Expect) -> str:
        """Return the statement that removes a task if it matches ``expect``, and returns its
        endpoint.
        """
        text = f"DELETE FROM asyncroute_tasks WHERE {_as_expected(expect)} RETURNING endpoint"
        return _in_dialect(self._dialect_name, text)

    def find_task(self, expect: Expect) -> str:
        """Return the statement that finds a task if it matches ``expect``."""
        text = f"SELECT id FROM asyncroute_tasks WHERE {_as_expected(expect)}"
        return _in_dialect(self._dialect_name, text)

    def lock_task(self, expect: Expect) -> str:
        """Return the statement that finds a task if it matches ``expect``, and locks it."""
        return _in_dialect(self._dialect_name, _lock_task("id", _as_expected(expect)))

    def waiting_tasks(self, endpoints: int, only_delayed: bool = False) -> str:
        """Return the statement that finds the next waiting tasks of ``endpoints`` endpoints. The
        statement is a UNION of three SELECTs for each endpoint. Each SELECT reads one range of an
        index up to its limit, even if many tasks are waiting.
        """
        is_free = "(owner IS NULL OR owner = :owner) AND change [postgresql: + 0] > 0"
        ranges = (
            (_WAITING, f"{_IS_WAITING} AND created_us < :before", "created_us"),
            # Tasks from far in the future are due: the clock was set back after their creation.
            (_WAITING, f"{_IS_WAITING} AND created_us > :before + {AHEAD_US}", "created_us"),
            (_DELAYED, f"{_IS_DELAYED} AND start_at_us < :start_before", "start_at_us"),
        )
        parts = [
            f"""
            SELECT * FROM (
                SELECT id, endpoint, {due} AS due_us FROM {table}
                WHERE {where} AND endpoint = :endpoint_{number} AND {is_free}
                ORDER BY {due} LIMIT :limit_{number}) AS part_{number}_{part}"""
            for number in range(endpoints)
            for part, (table, where, due) in enumerate(ranges)
            if table is _DELAYED or not only_delayed
        ]
        return _in_dialect(self._dialect_name, " UNION ALL ".join(parts))

    def events_since(self, of_task: bool, of_group: bool) -> str:
        """Return the statement that reads the events after a change number in order. Each row also
        contains the current task record without its result.

        :param of_task: read only the events of one task.
        :param of_group: read only the events of one Sse group.
        """
        events = changed = "namespace = :ns AND change > :since"
        if of_task:
            events = f"{_OF_TASK} AND change > :since"
            changed = f"{_IS_TASK} AND change > :since"
        # Without MATERIALIZED, PostgreSQL without statistics would repeat the search for each task.
        text = f"""
            WITH happened AS MATERIALIZED (
                SELECT change AS number, task_id, name, data
                FROM asyncroute_events WHERE {events}
                UNION ALL SELECT coalesce(waiting_change, change), id, 'NotStarted', NULL
                FROM asyncroute_tasks WHERE {changed} AND coalesce(waiting_change, change) > :since
                    AND (state = 'NotStarted' OR waiting_change IS NOT NULL)
                UNION ALL SELECT started_change, id, 'Running', NULL
                FROM asyncroute_tasks WHERE {changed} AND started_change > :since
                UNION ALL SELECT completed_change, id, state, NULL
                FROM asyncroute_tasks WHERE {changed} AND completed_change > :since
                UNION ALL SELECT change, id, '{PROGRESS}', NULL
                FROM asyncroute_tasks
                WHERE {changed} AND state = 'Running' AND change != started_change)
            SELECT number, name, data, {_RECORD_WITHOUT_RESULT}
            FROM happened JOIN asyncroute_tasks ON id = task_id AND {_IN_NAMESPACE}
            WHERE number <= :newest AND sse_group IS NOT NULL {"AND sse_group = :group" * of_group}
            ORDER BY number LIMIT :limit"""
        return _in_dialect(self._dialect_name, text)


@lru_cache(256)
def _update_task(dialect_name: str, fields: tuple[str, ...], where: str) -> str:
    values = {name: f":{name}" for name in fields}
    values.update(revision="revision + 1", change=_NEXT)
    if "completed_us" in fields:
        completed = _later("coalesce(started_us, created_us)", ":completed_us")
        values.update(
            completed_us=completed,
            remove_after_us=f"{completed} + retention_us",
            request="NULL",
            waiting_change="coalesce(waiting_change, change)",
            completed_change=_NEXT,
        )
    elif "state" in fields:
        values.update(waiting_change="NULL", started_change="NULL")
    setting = ", ".join(f'"{name}" = {value}' for name, value in values.items())
    text = f"""
        UPDATE asyncroute_tasks SET {setting} WHERE {where} {_IF_LOCKED} RETURNING {RECORD}"""
    # These fields are written only when a task is stopped or begins again.
    is_urgent = "stopping" in fields or ("state" in fields and "completed_us" not in fields)
    return _in_dialect(dialect_name, f"{_counter(where, is_urgent)} {text}")


@lru_cache(512)
def _in_dialect(dialect_name: str, text: str) -> str:
    """Return the SQL text for one database, with parameters in the style of its driver."""

    def choose(part: re.Match[str]) -> str:
        return part[2] if part[1] == dialect_name else ""

    count = 1
    while count:  # the innermost brackets first
        text, count = re.subn(r"\[(\w+):([^][]*)\]", choose, text)
    text = " ".join(text.split())
    if dialect_name == "sqlite":
        return text
    return re.sub(r":(\w+)", r"%(\1)s", text.replace("%", "%%"))
