"""List queries: memory, SQLite and `query.matches` return the same results for every query."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flask_asyncroute.query import (
    FIELDS,
    NEWEST_FIRST,
    Condition,
    Operator,
    Position,
    Sort,
    is_after,
    matches,
    ordered,
    position_of,
)
from flask_asyncroute.query.model import SORTABLE
from flask_asyncroute.stores.base import LARGE_RESULT, Expect, Readers, TaskStore
from flask_asyncroute.stores.memory import MemoryTaskStore
from flask_asyncroute.task import AsyncRouteTask, State
from tests.support.databases import new_sqlite_store
from tests.support.tasks import new_task

NewTask = Callable[..., AsyncRouteTask]
Grants = frozenset[tuple[str, str]]
Stored = tuple[AsyncRouteTask, Grants]
T0 = 1_700_000_000_000_000
ALL = 10**6
EVERY_SORT = [Sort(field, descending) for field in SORTABLE for descending in (True, False)]

# Letters with case folding or lookalikes, special characters of SQL and patterns, and characters
# outside the BMP.
texts = st.text("aAkK\u212a\u0131İß%_\\*?.+(é'\n\U0001f600\uffff ", max_size=6)
times = st.integers(T0 - 3, T0 + 3)
percents = st.sampled_from([0.0, 0.01, 33.33, 50.0, 99.99, 100.0])
users = st.sampled_from(["anna", "Anna", "ben", "%", "5", "\U0001f600"])
names = st.tuples(
    st.sampled_from(["users", "groups", "roles", "scopes"]),
    st.sampled_from(["x", "X", "ben", "u:x", "%"]),
)


@st.composite
def tasks(draw: st.DrawFn) -> list[Stored]:
    """Draw some stored tasks, and who else may list each."""
    made = []
    ids = draw(st.lists(texts.filter(bool), unique=True, max_size=8))
    for task_id in ids:
        user = draw(st.none() | users)
        permission = draw(st.none() | st.just(b"{}"))
        task = new_task(
            task_id,
            async_route_id=draw(texts),
            state=draw(st.sampled_from(list(State))),
            cancellable=draw(st.booleans()),
            user=user,
            url=draw(texts),
            method=draw(st.sampled_from(["GET", "PUT", "POST", "K%"])),
            created_us=draw(times),
            started_us=draw(st.none() | times),
            completed_us=draw(st.none() | times),
            expires_us=draw(st.none() | times),
            progress=draw(st.none() | percents),
            error=draw(st.none() | texts),
            permission_json=permission,
        )
        is_anonymous = user is None and permission is None
        made.append((task, frozenset() if is_anonymous else draw(st.frozensets(names, max_size=3))))
    return made


@st.composite
def conditions(draw: st.DrawFn) -> Condition:
    """Draw a condition as the query parser creates it."""
    field = draw(st.sampled_from(list(FIELDS.values())))
    operator = draw(st.sampled_from(field.operators))
    values: dict[str, st.SearchStrategy[Any]] = {
        "string": texts,
        "state": st.sampled_from([state.value for state in State]),
        "boolean": st.booleans(),
        "time": times | st.just(0),
        "number": percents | st.sampled_from([-1.0, 50.004, 1e300, 33.0]),
    }
    if operator in (Operator.LIKE, Operator.NOTLIKE):
        patterns = texts | st.sampled_from(
            ["", "*", "?", "**", "a*k", "?a", "a?", "com*D", "R?nn", "%", "_", "\\%", "*_*"]
        )
        return Condition(field, operator, draw(patterns))
    if field.upper:
        return Condition(field, operator, draw(st.sampled_from(["GET", "PUT", "K", "K%"])))
    return Condition(
        field,
        operator,
        draw(values[field.kind] | users if field.name == "User" else values[field.kind]),
    )


readers_of = st.none() | st.builds(
    Readers,
    user=st.none() | users,
    granted=st.lists(names, unique=True, max_size=4).map(tuple),
    anonymous=st.booleans(),
)
sorts = st.sampled_from(EVERY_SORT)
positions = st.none() | st.builds(Position, value=st.none() | times, created_us=times, id=texts)


def may_list(task: AsyncRouteTask, grants: Grants, readers: Readers | None) -> bool:
    if readers is None:
        return True
    if task.user is None and task.permission_json is None:
        return readers.anonymous
    is_owner = task.user is not None and task.user == readers.user
    return is_owner or not grants.isdisjoint(readers.granted)


def expected(
    stored: Sequence[Stored],
    filters: Sequence[Condition],
    sort: Sort,
    limit: int,
    position: Position | None,
    readers: Readers | None,
) -> list[str]:
    """Return the ids of a list, computed in the simplest way."""
    fit = [
        task
        for task, grants in stored
        if matches(task, filters) and may_list(task, grants, readers)
    ]
    return [
        task.id for task in ordered(fit, sort) if position is None or is_after(task, sort, position)
    ][:limit]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, TaskStore]]:
    stores: dict[str, TaskStore] = {
        "memory": MemoryTaskStore(),
        "sqlite": new_sqlite_store(tmp_path_factory.mktemp("both") / "asyncroute.db"),
    }
    for store in stores.values():
        store.open()
    yield stores
    for store in stores.values():
        store.close()


def fill(store: TaskStore, stored: Sequence[Stored]) -> None:
    for task, grants in stored:
        store.add(task, b"", None, grants)


def clear(store: TaskStore) -> None:
    for task in store.query((), NEWEST_FIRST, ALL, None, None):
        assert store.delete(task.id, Expect(tuple(State)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(
    stored=tasks(),
    queries=st.lists(
        st.tuples(
            st.lists(conditions(), max_size=3), sorts, st.integers(1, 9), positions, readers_of
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_all_stores_agree(
    both: dict[str, TaskStore], stored: list[Stored], queries: list[Any]
) -> None:
    for store in both.values():
        fill(store, stored)
    try:
        for filters, sort, limit, position, readers in queries:
            if position is not None and sort.field.name == "CreationTime":
                position = Position(position.created_us, position.created_us, position.id)
            expected_ids = expected(stored, filters, sort, limit, position, readers)
            for name, store in both.items():
                found = [task.id for task in store.query(filters, sort, limit, position, readers)]
                assert found == expected_ids, (name, filters, sort, limit, position, readers)
    finally:
        for store in both.values():
            clear(store)


@pytest.mark.parametrize(
    ("field", "operator"),
    [
        pytest.param(field, operator, id=f"{field.name}-{operator}")
        for field in FIELDS.values()
        for operator in field.operators
    ],
)
def test_every_field_with_every_operator(
    both: dict[str, TaskStore], field: Any, operator: Operator
) -> None:
    """Each pair is tested with tasks below, at and above the value, and a task without the field."""
    samples: dict[str, list[Any]] = {
        "string": ["a", "B", "b", "bé", "c"],
        "state": list(State),
        "boolean": [True, False],
        "time": [T0 - 1, T0, T0 + 1],
        "number": [0.0, 50.0, 99.99],
    }
    missing = (
        [None]
        if field.name
        in ("User", "StartingTime", "CompletedTime", "ExpireTime", "Error", "Progress")
        else []
    )
    stored: list[Stored] = []
    for number, value in enumerate([*samples[field.kind], *missing]):
        if field.name == "IsCompleted":
            task = new_task(
                f"t{number}", state=State.FAILED if value else State.RUNNING, created_us=T0 + number
            )
        elif field.name == "Id":
            task = new_task(value, created_us=T0 + number)
        else:
            task = new_task(f"t{number}", **{"created_us": T0 + number, field.attribute: value})
        stored.append((task, frozenset()))
    for store in both.values():
        fill(store, stored)
    try:
        for value in samples[field.kind]:
            filters = [
                Condition(field, operator, value.value if isinstance(value, State) else value)
            ]
            expected_ids = expected(stored, filters, NEWEST_FIRST, ALL, None, None)
            for name, store in both.items():
                assert [
                    task.id for task in store.query(filters, NEWEST_FIRST, ALL, None, None)
                ] == expected_ids, (name, value)
    finally:
        for store in both.values():
            clear(store)


@pytest.mark.parametrize(
    "sort", EVERY_SORT, ids=lambda sort: ("-" if sort.descending else "") + sort.field.name
)
@pytest.mark.parametrize(
    "readers",
    [
        None,
        Readers(user="anna"),
        Readers(anonymous=True),
        Readers(granted=(("groups", "g"),)),
        Readers("anna", (("users", "anna"), ("groups", "g"), ("roles", "r")), True),
    ],
    ids=["all", "owner", "anonymous", "granted", "every kind"],
)
@pytest.mark.parametrize("limit", [1, 3])
def test_pages_contain_every_task_once(
    store: TaskStore, sort: Sort, readers: Readers | None, limit: int
) -> None:
    """Includes ties, missing values and tasks that are readable for several reasons."""
    stored: list[Stored] = []
    for number in range(18):
        task = new_task(
            f"t{number:02}",
            user=[None, "anna", "ben"][number % 3],
            created_us=T0 + number // 6,
            started_us=None if number % 4 == 0 else T0 + number % 2,
            completed_us=None if number % 5 else T0 + number,
        )
        grants = (
            {("groups", "g"), ("roles", "r"), ("users", "anna")}
            if task.user and number % 2
            else set()
        )
        stored.append((task, frozenset(grants)))
    fill(store, stored)
    expected_ids = expected(stored, (), sort, ALL, None, readers)
    assert len(expected_ids) >= 5
    found: list[str] = []
    position = None
    while page := store.query((), sort, limit, position, readers):
        assert len(page) <= limit
        found += [task.id for task in page]
        position = position_of(page[-1], sort)
    assert found == expected_ids


@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize(
    "field",
    [field for field in SORTABLE if field.name != "CreationTime"],
    ids=lambda field: field.name,
)
def test_missing_times_come_last_in_both_directions(
    store: TaskStore, field: Any, descending: bool
) -> None:
    for number, value in enumerate([None, T0 + 1, None, T0 + 2]):
        store.add(
            new_task(f"t{number}", **{field.attribute: value, "created_us": T0 + number}),
            b"",
            None,
            (),
        )
    found = [task.id for task in store.query((), Sort(field, descending), ALL, None, None)]
    assert found == (["t3", "t1", "t2", "t0"] if descending else ["t1", "t3", "t0", "t2"])


@pytest.mark.covers("A25")
def test_a_caller_without_permission_gets_an_empty_list(store: TaskStore) -> None:
    store.add(new_task("owned", user="anna"), b"", None, [("groups", "g")])
    store.add(new_task("free"), b"", None, ())
    assert store.query((), NEWEST_FIRST, ALL, None, Readers()) == []
    assert (
        store.query(
            (),
            NEWEST_FIRST,
            ALL,
            None,
            Readers(user="ben", granted=(("groups", "G"), ("roles", "g"))),
        )
        == []
    )


@pytest.mark.parametrize(
    ("readers", "expected_ids"),
    [
        (Readers(user="anna"), ["a"]),
        (Readers(user="Anna"), []),
        (Readers(anonymous=True), ["n"]),
        (Readers(granted=(("groups", "g"),)), ["a", "b", "p"]),
        (Readers(granted=(("roles", "g"),)), ["b"]),
        (Readers("anna", (("groups", "g"),), True), ["a", "b", "n", "p"]),
        (Readers("nobody", (("scopes", "s"),), True), ["c", "n"]),
        (None, ["a", "b", "c", "n", "p"]),
    ],
)
def test_a_list_contains_the_tasks_that_the_caller_may_read(
    store: TaskStore, readers: Readers | None, expected_ids: list[str]
) -> None:
    fill(
        store,
        [
            (new_task("a", user="anna"), frozenset({("groups", "g")})),
            (new_task("b", user="ben"), frozenset({("groups", "g"), ("roles", "g")})),
            (new_task("c", user="carl"), frozenset({("scopes", "s"), ("users", "anna2")})),
            (new_task("n"), frozenset()),
            (new_task("p", permission_json=b"{}"), frozenset({("groups", "g")})),
        ],
    )
    assert (
        sorted(task.id for task in store.query((), NEWEST_FIRST, ALL, None, readers))
        == expected_ids
    )


def test_a_grant_applies_in_every_state_of_its_task(store: TaskStore) -> None:
    readers = Readers(granted=(("groups", "g"),))
    store.add(new_task("t", user="anna"), b"", None, [("groups", "g")])

    def in_state(state: State) -> list[str]:
        filters = [Condition(FIELDS["State"], Operator.EQ, state.value)]
        return [task.id for task in store.query(filters, NEWEST_FIRST, ALL, None, readers)]

    # As in the dispatcher, the permission itself is in the record.
    store.update(
        "t", Expect((State.NOT_STARTED,)), {"permission_json": b'{"Read":{"Groups":["g"]}}'}
    )
    assert in_state(State.NOT_STARTED) == ["t"]
    store.claim("t", "me", T0)
    assert (in_state(State.NOT_STARTED), in_state(State.RUNNING)) == ([], ["t"])
    store.update("t", Expect((State.RUNNING,)), {"state": State.FAILED, "completed_us": T0})
    assert (in_state(State.RUNNING), in_state(State.FAILED)) == ([], ["t"])


def test_a_caller_in_a_thousand_groups_gets_a_list(store: TaskStore) -> None:
    """Directory services return hundreds of groups, more than the parts that a compound SQL
    statement allows.
    """
    fill(
        store,
        [
            (new_task("t", user="anna"), frozenset({("groups", "g777")})),
            (new_task("n"), frozenset()),
        ],
    )
    granted = tuple(("groups", f"g{number}") for number in range(1000))
    filters = [Condition(FIELDS["State"], Operator.EQ, "NotStarted")]
    found = store.query(filters, NEWEST_FIRST, ALL, None, Readers("ben", granted, True))
    assert sorted(task.id for task in found) == ["n", "t"]


@pytest.mark.parametrize(
    "readers", [None, Readers(user="anna"), Readers("anna", (("groups", "g"),), True)]
)
def test_a_list_omits_large_results(store: TaskStore, readers: Readers | None) -> None:
    large, small = b'"' + b"x" * (LARGE_RESULT - 1) + b'"', b'"' + b"x" * (LARGE_RESULT - 2) + b'"'
    for name, result in (("a-large", large), ("b-small", small), ("c-none", None)):
        store.add(
            new_task(name, user="anna", result_json=result, state=State.COMPLETED),
            b"",
            None,
            [("groups", "g")],
        )
    found = {
        task.id: task.result_json for task in store.query((), NEWEST_FIRST, ALL, None, readers)
    }
    assert found == {"a-large": None, "b-small": small, "c-none": None}
    stored_task = store.get("a-large")
    assert stored_task is not None and stored_task.result_json == large


def test_a_list_returns_complete_records(store: TaskStore) -> None:
    store.add(
        new_task("t", user="anna", error="e", progress=1.5, result_json=b"1"),
        b"",
        None,
        [("groups", "g")],
    )
    complete = store.get("t")
    for readers in (None, Readers(user="anna"), Readers("anna", (("groups", "g"),), True)):
        assert store.query((), NEWEST_FIRST, ALL, None, readers) == [complete]


@pytest.mark.covers("A31")
@pytest.mark.parametrize(
    "text", ["%", "_", "\\", "' OR 1=1 --", ".*(a+)+$", "[a-z]", 'x"; DROP TABLE asyncroute_tasks']
)
@pytest.mark.parametrize("operator", [Operator.EQ, Operator.LIKE])
def test_special_characters_are_literal(store: TaskStore, text: str, operator: Operator) -> None:
    for number, error in enumerate([text, "a", "aaaa", "", None]):
        store.add(new_task(f"t{number}", error=error), b"", None, ())
    filters = [Condition(FIELDS["Error"], operator, text)]
    assert [task.id for task in store.query(filters, NEWEST_FIRST, ALL, None, None)] == ["t0"]
