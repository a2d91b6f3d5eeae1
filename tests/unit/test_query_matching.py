"""Conditions and order on records in memory, and LIKE as the SQL store uses it."""

from __future__ import annotations

import sqlite3
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute.query import (
    ESCAPE,
    FIELDS,
    Condition,
    Operator,
    Sort,
    is_after,
    matches,
    ordered,
    parse_mapping,
    position_of,
    sql_like,
)
from flask_asyncroute.query.matching import holds
from flask_asyncroute.task import AsyncRouteTask, State
from tests.support.timing import thread_seconds

SECOND = 1_000_000


def record(**values: Any) -> AsyncRouteTask:
    defaults: dict[str, Any] = {
        "id": "a",
        "async_route_id": "[Put]/x",
        "endpoint": "x",
        "state": State.RUNNING,
        "cancellable": True,
        "user": None,
        "url": "http://localhost/x",
        "method": "PUT",
        "created_us": 0,
    }
    return AsyncRouteTask(**(defaults | values))


def found(task: AsyncRouteTask, field: str, operator: str, value: object) -> bool:
    return matches(task, parse_mapping({field: {"op": operator, "value": value}}))


def test_every_field_is_an_attribute_of_a_record() -> None:
    for field in FIELDS.values():
        assert hasattr(record(), field.attribute)


def test_all_conditions_must_hold() -> None:
    task = record()
    assert matches(task, ())
    assert matches(task, parse_mapping({"State": {"value": "Running"}, "Method": {"value": "put"}}))
    assert not matches(
        task, parse_mapping({"State": {"value": "Running"}, "Method": {"value": "get"}})
    )


@pytest.mark.parametrize(
    ("operator", "expected"),
    [("EQ", "FTF"), ("NE", "TFT"), ("GT", "FFT"), ("LT", "TFF"), ("GE", "FTT"), ("LE", "TTF")],
)
def test_comparison_operators(operator: str, expected: str) -> None:
    for attribute, field, values, middle in (
        ("progress", "Progress", (1.0, 33.33, 100.0), 33.33),
        ("started_us", "StartingTime", (-1, 0, 1), "1970-01-01T00:00:00Z"),
        ("user", "User", ("a", "b", "c"), "b"),
        ("state", "State", (State.FAILED, State.NOT_STARTED, State.RUNNING), "NotStarted"),
    ):
        assert [
            found(record(**{attribute: value}), field, operator, middle) for value in values
        ] == [letter == "T" for letter in expected]


def test_booleans() -> None:
    for state in State:
        assert found(record(state=state), "IsCompleted", "EQ", True) is state.is_terminal
        assert found(record(state=state), "IsCompleted", "NE", True) is not state.is_terminal
    assert found(record(cancellable=False), "Cancellable", "EQ", False)


def test_strings_compare_exactly_by_code_point() -> None:
    assert not found(record(user="Bob"), "User", "EQ", "bob")
    assert not found(record(user="é"), "User", "EQ", "e\u0301")
    assert not found(record(user="x "), "User", "EQ", "x")
    assert found(record(user="\U0001f600"), "User", "GT", "\uffff")
    assert found(record(user="Z"), "User", "LT", "a")


@pytest.mark.parametrize("operator", Operator)
def test_a_condition_on_a_missing_value_is_false(operator: Operator) -> None:
    for field in FIELDS.values():
        if operator in field.operators:
            assert not holds(Condition(field, operator, "x"), None)
    assert not found(record(), "User", "NE", "x")
    assert not found(record(), "User", "NOTLIKE", "x")
    assert not found(record(), "Progress", "NE", 1)


# LIKE


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("", "", True),
        ("*", "", True),
        ("?", "", False),
        ("b", "abc", True),
        ("B", "abc", True),
        ("b", "ABC", True),
        ("a*c", "xabcx", True),
        ("c*a", "abc", False),
        ("a?c", "abc", True),
        ("a?c", "ac", False),
        ("a?c", "a\nc", True),
        ("a*c", "a\n\nc", True),
        ("aa*aa", "aaa", False),
        ("a**b", "ab", True),
        ("?*?", "x", False),
        ("?", "\U0001f600", True),
        ("??", "\U0001f600", False),
        ("ü", "Ü", False),
        ("k", "\u212a", False),
        ("100%", "100", False),
        ("a_c", "abc", False),
        ("a\\", "a\\b", True),
    ],
)
def test_like(pattern: str, text: str, expected: bool) -> None:
    assert found(record(user=text), "User", "LIKE", pattern) is expected
    assert found(record(user=text), "User", "NOTLIKE", pattern) is not expected


@pytest.mark.covers("A31")
@pytest.mark.parametrize("pattern", [".*(a+)+$", "[abc]", "^a", "a|b", "\\d", "(?i)a", "a{2}", "$"])
def test_regex_characters_are_literal(pattern: str) -> None:
    literal = pattern.replace("*", "").replace("?", "q")
    assert not found(record(user="aaaa b 1"), "User", "LIKE", pattern)
    assert found(record(user=f"<{literal}>"), "User", "LIKE", pattern)


@pytest.mark.covers("A31")
def test_patterns_with_many_wildcards_are_matched_quickly() -> None:
    task = record(error="a" * 2000)
    patterns = (
        "a*" * 8 + "b",
        "a?" * 8 + "b",
        "a" * 100 + "*" + "a" * 100 + "?" * 6 + "b",
        "*?" * 4 + "b",
    )

    def match() -> None:
        for pattern in patterns:
            assert not found(task, "Error", "LIKE", pattern)

    assert thread_seconds(match) < 0.1


def test_like_on_state_and_method() -> None:
    assert found(record(state=State.ABORTED), "State", "LIKE", "BORT")
    assert found(record(), "Method", "LIKE", "p?t")
    assert found(record(), "State", "NOTLIKE", "completed")


def test_sql_like() -> None:
    assert sql_like("a*B?") == "%a%b_%"
    assert sql_like("100%_\\!") == "%100!%!_\\!!%"
    assert sql_like("") == sql_like("**") == "%"


def naive(text: str, pattern: str) -> bool:
    """Return whether ``*pattern*`` matches, by a simple state machine."""
    pattern, text = (
        "".join(letter.lower() if letter.isascii() else letter for letter in one)
        for one in (f"*{pattern}*", text)
    )
    reachable = {0}
    for sign in pattern:
        if sign == "*":
            reachable = set(range(min(reachable), len(text) + 1)) if reachable else reachable
        else:
            reachable = {at + 1 for at in reachable if at < len(text) and sign in ("?", text[at])}
    return len(text) in reachable


letters = "abAB%_\\.ÜüK\u212a\n"


@given(st.text(letters, max_size=12), st.text(letters + "*?", max_size=8))
def test_like_agrees_with_a_simple_matcher_and_with_sqlite(text: str, pattern: str) -> None:
    expected = naive(text, pattern)
    assert holds(Condition(FIELDS["User"], Operator.LIKE, pattern), text) is expected
    connection = sqlite3.connect(":memory:")
    try:
        (answer,) = connection.execute(
            "SELECT ? LIKE ? ESCAPE ?", (text, sql_like(pattern), ESCAPE)
        ).fetchone()
    finally:
        connection.close()
    assert bool(answer) is expected


# Order

small = st.integers(0, 3)
tasks = st.lists(st.tuples(small, st.none() | small, st.none() | small), max_size=12).map(
    lambda times: [
        record(
            id=f"{number * 7 % 13:02}",
            created_us=created,
            started_us=started,
            completed_us=completed,
        )
        for number, (created, started, completed) in enumerate(times)
    ]
)
sorts = st.builds(
    Sort,
    st.sampled_from([FIELDS["CreationTime"], FIELDS["StartingTime"], FIELDS["CompletedTime"]]),
    st.booleans(),
)


def test_missing_times_are_last_in_both_directions() -> None:
    some = [
        record(id="a", created_us=1),
        record(id="b", created_us=2, started_us=5),
        record(id="c", created_us=3, started_us=0),
        record(id="d", created_us=1),
    ]

    def ids(descending: bool) -> str:
        return "".join(task.id for task in ordered(some, Sort(FIELDS["StartingTime"], descending)))

    assert ids(descending=False) == "cbad"
    assert ids(descending=True) == "bcda"


def test_ties_are_sorted_by_creation_time_then_id_in_the_same_direction() -> None:
    some = [
        record(id="b", created_us=1, started_us=5),
        record(id="a", created_us=1, started_us=5),
        record(id="A", created_us=1, started_us=5),
        record(id="c", created_us=0, started_us=5),
    ]
    assert "".join(task.id for task in ordered(some, Sort(FIELDS["StartingTime"], False))) == "cAab"
    assert "".join(task.id for task in ordered(some, Sort(FIELDS["StartingTime"], True))) == "baAc"


@given(tasks, sorts, st.integers(1, 5))
def test_all_pages_together_are_the_sorted_list(
    some: list[AsyncRouteTask], sort: Sort, limit: int
) -> None:
    whole = ordered(some, sort)
    assert all(
        is_after(second, sort, position_of(first, sort)) for first, second in pairwise(whole)
    )
    assert all(
        not is_after(first, sort, position_of(second, sort)) for first, second in pairwise(whole)
    )
    paged, rest = [], some
    while page := ordered(rest, sort)[:limit]:
        paged += page
        position = position_of(page[-1], sort)
        rest = [task for task in some if is_after(task, sort, position)]
    assert paged == whole
