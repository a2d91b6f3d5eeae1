"""The cursor: it comes back as it was, or not at all (A29)."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute.errors import InvalidQuery
from flask_asyncroute.query import Position, Query, open_cursor, parse_get, parse_mapping, seal_cursor

KEY = b"k" * 32
QUERY = parse_get("State=Completed&User=bob")
POSITION = Position(1, 2, "a-b")
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"

int64 = st.integers(-(2**63), 2**63 - 1)
positions = st.builds(Position, st.none() | int64, int64, st.text(ALPHABET + ".~", min_size=1, max_size=128))
callers = st.none() | st.text()
queries = st.sampled_from(
    [
        Query(),
        QUERY,
        parse_get("sort=-StartingTime"),
        parse_get("filter[Progress][GT]=1&filter[CreationTime][GE]=2026-01-01T00:00:00Z"),
    ]
)


def refused(cursor: str, query: Query = QUERY, caller_id: str | None = "bob", key: bytes = KEY) -> None:
    with pytest.raises(InvalidQuery, match="cursor"):
        open_cursor(cursor, query, caller_id, key)


@given(positions, queries, callers)
def test_round_trip(position: Position, query: Query, caller_id: str | None) -> None:
    cursor = seal_cursor(position, query, caller_id, KEY)
    assert len(cursor) <= 512
    # As http.operations gets it: with the next request.
    assert parse_get(f"cursor={cursor}").cursor == cursor
    assert open_cursor(cursor, query, caller_id, KEY) == position


@given(positions, st.data())
def test_a29_any_altered_character(position: Position, data: st.DataObject) -> None:
    cursor = seal_cursor(position, QUERY, "bob", KEY)
    at = data.draw(st.integers(0, len(cursor) - 1))
    other = data.draw(
        st.sampled_from(ALPHABET).filter(lambda letter: letter != cursor[at])
        | st.characters(exclude_characters=cursor[at])
    )
    refused(cursor[:at] + other + cursor[at + 1 :])
    refused(cursor[:at] + other + cursor[at:])
    refused(cursor[:at])


def test_a29_the_last_character_has_one_spelling() -> None:
    for size in range(1, 8):
        cursor = seal_cursor(Position(None, 0, "x" * size), QUERY, "bob", KEY)
        for letter in ALPHABET.replace(cursor[-1], ""):
            refused(cursor[:-1] + letter)


@pytest.mark.parametrize(
    "cursor", ["", "a", "=", "AQ==", "ü" * 10, "A" * 512, "A" * 513, "a b", "\0", "abc\n", "+/", "AQ"]
)
def test_a29_what_never_was_a_cursor(cursor: str) -> None:
    refused(cursor)


@given(
    st.text() | st.text(ALPHABET) | st.binary().map(lambda data: urlsafe_b64encode(b"\x01" + data).decode().rstrip("="))
)
def test_a29_any_text(cursor: str) -> None:
    refused(cursor)


def test_a29_of_another_caller() -> None:
    cursor = seal_cursor(POSITION, QUERY, "bob", KEY)
    for caller_id in (None, "", "Bob", "alice", "None"):
        refused(cursor, caller_id=caller_id)
    refused(seal_cursor(POSITION, QUERY, None, KEY), caller_id="None")


def test_a29_of_another_query_or_sort_or_key() -> None:
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


def test_a29_of_another_version() -> None:
    cursor = seal_cursor(POSITION, QUERY, "bob", KEY)
    data = urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
    refused(urlsafe_b64encode(b"\x00" + data[1:]).decode().rstrip("="))


def test_the_same_query_in_other_words() -> None:
    cursor = seal_cursor(POSITION, QUERY, "bob", KEY)
    for query in (
        parse_get("user=bob&State=completed"),
        parse_get("filter[User][op]=eq&filter[User][value]=bob&filter[State][EQ]=COMPLETED&sort=-creationtime"),
        Query(parse_mapping({"User": {"value": "bob"}, "State": {"value": "Completed"}})),
        replace(QUERY, limit=7, cursor="whatever"),
    ):
        assert open_cursor(cursor, query, "bob", KEY) == POSITION
