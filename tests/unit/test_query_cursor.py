"""The cursor: an unmodified cursor returns its position; any other cursor is refused."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute.errors import InvalidQuery
from flask_asyncroute.query import (
    Position,
    Query,
    open_cursor,
    parse_get,
    parse_mapping,
    seal_cursor,
)

KEY = b"k" * 32
QUERY = parse_get("State=Completed&User=bob")
POSITION = Position(1, 2, "a-b")
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_."

int64 = st.integers(-(2**63), 2**63 - 1)
positions = st.builds(
    Position, st.none() | int64, int64, st.text(ALPHABET + "~", min_size=1, max_size=128)
)
callers = st.none() | st.text()
queries = st.sampled_from(
    [
        Query(),
        QUERY,
        parse_get("sort=-StartingTime"),
        parse_get("filter[Progress][GT]=1&filter[CreationTime][GE]=2026-01-01T00:00:00Z"),
    ]
)


def refused(
    cursor: str, query: Query = QUERY, caller_id: str | None = "bob", key: bytes = KEY
) -> None:
    with pytest.raises(InvalidQuery, match="cursor"):
        open_cursor(cursor, query, caller_id, key)


@given(positions, queries, callers)
def test_a_cursor_returns_its_position(
    position: Position, query: Query, caller_id: str | None
) -> None:
    cursor = seal_cursor(position, query, caller_id, KEY)
    assert len(cursor) <= 512
    assert parse_get(f"cursor={cursor}").cursor == cursor
    assert open_cursor(cursor, query, caller_id, KEY) == position


@pytest.mark.covers("A29")
@given(positions, st.data())
def test_any_altered_character_is_refused(position: Position, data: st.DataObject) -> None:
    cursor = seal_cursor(position, QUERY, "bob", KEY)
    at = data.draw(st.integers(0, len(cursor) - 1))
    other = data.draw(
        st.sampled_from(ALPHABET).filter(lambda letter: letter != cursor[at])
        | st.characters(exclude_characters=cursor[at])
    )
    refused(cursor[:at] + other + cursor[at + 1 :])
    refused(cursor[:at] + other + cursor[at:])
    refused(cursor[:at])


@pytest.mark.covers("A29")
def test_only_one_last_character_is_valid() -> None:
    for size in range(1, 8):
        cursor = seal_cursor(Position(None, 0, "x" * size), QUERY, "bob", KEY)
        for letter in ALPHABET.replace(cursor[-1], ""):
            refused(cursor[:-1] + letter)


@pytest.mark.covers("A29")
@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "a",
        "=",
        "AQ==",
        "ü" * 10,
        "A" * 512,
        "A" * 513,
        "a b",
        "\0",
        "abc\n",
        "+/",
        "AQ",
        ".",
        "AQ.",
        ".AQ",
        "\ud800",
    ],
)
def test_text_that_is_not_a_cursor_is_refused(cursor: str) -> None:
    refused(cursor)


@pytest.mark.covers("A29")
@given(
    st.text()
    | st.text(ALPHABET)
    | st.binary().map(lambda data: urlsafe_b64encode(b"\x01" + data).decode().rstrip("="))
)
def test_any_text_is_refused(cursor: str) -> None:
    refused(cursor)


@pytest.mark.covers("A29")
def test_a_cursor_of_another_caller_is_refused() -> None:
    cursor = seal_cursor(POSITION, QUERY, "bob", KEY)
    for caller_id in (None, "", "Bob", "alice", "None"):
        refused(cursor, caller_id=caller_id)
    refused(seal_cursor(POSITION, QUERY, None, KEY), caller_id="None")


@pytest.mark.covers("A29")
def test_a_cursor_of_another_query_sort_or_key_is_refused() -> None:
    cursor = seal_cursor(POSITION, QUERY, "bob", KEY)
    for query_string in (
        "",
        "State=Completed",
        "State=Failed&User=bob",
        "State=Completed&User=bob&sort=CreationTime",
        "filter[State][NE]=Completed&filter[User][EQ]=bob",
        "State=Completed&Id=bob",
    ):
        refused(cursor, parse_get(query_string))
    refused(cursor, key=b"l" * 32)


@pytest.mark.covers("A29")
def test_a_cursor_of_another_version_is_refused() -> None:
    """A cursor of the previous format for the same position, query, caller and key."""
    refused("AQxWD5vraUegwE4ZYtzPK1QBAAAAAAAAAAEAAAAAAAAAAmEtYg")


def test_a_cursor_is_valid_for_the_same_query_in_another_style() -> None:
    cursor = seal_cursor(POSITION, QUERY, "bob", KEY)
    for query in (
        parse_get("user=bob&State=completed"),
        parse_get(
            "filter[User][op]=eq&filter[User][value]=bob&filter[State][EQ]=COMPLETED&sort=-creationtime"
        ),
        Query(parse_mapping({"User": {"value": "bob"}, "State": {"value": "Completed"}})),
        replace(QUERY, limit=7, cursor="whatever"),
    ):
        assert open_cursor(cursor, query, "bob", KEY) == POSITION
