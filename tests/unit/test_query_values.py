"""Values of conditions must have the type of their field, in text and in JSON."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute.errors import InvalidQuery
from flask_asyncroute.query import FIELDS, parse_get, parse_mapping
from flask_asyncroute.task import State, moment, rfc3339

NEW_YEAR = 1_767_225_600_000_000


def from_text(field: str, text: str, operator: str = "EQ") -> object:
    (condition,) = parse_get(f"filter[{field}][{operator}]={quote(text, safe='')}").conditions
    return condition.value


def from_json(field: str, value: object, operator: str = "EQ") -> object:
    (condition,) = parse_mapping({field: {"op": operator, "value": value}})
    return condition.value


def refused_text(field: str, text: str, operator: str = "EQ") -> str:
    with pytest.raises(InvalidQuery) as caught:
        from_text(field, text, operator)
    assert field in caught.value.detail
    return caught.value.detail


def refused_json(field: str, value: object, operator: str = "EQ") -> str:
    with pytest.raises(InvalidQuery) as caught:
        from_json(field, value, operator)
    assert field in caught.value.detail
    return caught.value.detail


@pytest.mark.covers("A39")
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [None, [], {}, [1], {"a": 1}, ["Completed"]])
def test_containers_and_null_are_refused(field: str, value: object) -> None:
    refused_json(field, value)


@pytest.mark.covers("A39")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("Progress", True),
        ("Progress", "1"),
        ("CreationTime", 1),
        ("CreationTime", 1.5),
        ("CreationTime", True),
        ("CreationTime", date(2026, 1, 1)),
        ("Cancellable", 1),
        ("Cancellable", "true"),
        ("IsCompleted", 0),
        ("State", 1),
        ("State", True),
        ("User", 1),
        ("Id", 1.0),
        ("Method", False),
        ("User", b"x"),
    ],
)
def test_json_values_of_another_type_are_refused(field: str, value: object) -> None:
    refused_json(field, value)


@pytest.mark.covers("A40")
@pytest.mark.parametrize(
    "text",
    [
        "١٢",
        "1_000",
        " 1",
        "1 ",
        "1e999",
        "-1e999",
        "9" * 5000,
        "",
        "+1",
        "0x10",
        "01",
        "1.",
        ".5",
        "NaN",
        "Infinity",
        "inf",
        "1,5",
        "1\n",
        "--1",
        "true",
    ],
)
def test_invalid_numbers_are_refused(text: str) -> None:
    refused_text("Progress", text)


@pytest.mark.covers("A40")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400, -(10**400)])
def test_json_numbers_out_of_range_are_refused(value: float) -> None:
    refused_json("Progress", value)


@pytest.mark.covers("A40")
def test_the_error_for_a_json_number_of_5000_digits_is_short() -> None:
    assert len(refused_json("Progress", 10**5000)) < 250


def test_numbers() -> None:
    assert [from_text("Progress", text) for text in ("0", "-1", "33.30", "1e2", "1E-2")] == [
        0.0,
        -1.0,
        33.3,
        100.0,
        0.01,
    ]
    assert [from_json("Progress", number) for number in (0, 33.3, 2**63)] == [0.0, 33.3, 2.0**63]


@pytest.mark.covers("A42")
@pytest.mark.parametrize(
    "text",
    [
        "1e18",
        "NaN",
        "-1",
        "0",
        "1767225600",
        "",
        "2026",
        "2026-01-01",
        "2026-01-01T00:00Z",
        "2026-1-1T00:00:00Z",
        "2026-02-30T00:00:00Z",
        "2026-13-01T00:00:00Z",
        "2026-01-01T24:00:00Z",
        "2026-01-01T00:60:00Z",
        "2016-12-31T23:59:60Z",
        "0000-01-01T00:00:00Z",
        "10000-01-01T00:00:00Z",
        "2026-01-01T00:00:00.Z",
        "2026-01-01T00:00:00,5Z",
        "2026-01-01T00:00:00+24:00",
        "2026-01-01T00:00:00+00:60",
        "2026-01-01T00:00:00+0200",
        "2026-01-01T00:00:00 Z",
        "２０２６-01-01T00:00:00Z",
        "2026-01-01T00:00:00Z\n",
        "20260101T000000Z",
        "2026-01-01_00:00:00Z",
        "2026-01-01T00:00:00\u221202:00",
        "now",
    ],
)
def test_invalid_times_are_refused(text: str) -> None:
    assert "RFC 3339" in refused_text("CreationTime", text)
    assert "RFC 3339" in refused_json("CreationTime", text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-01T00:00:00Z", NEW_YEAR),
        ("2026-01-01t00:00:00z", NEW_YEAR),
        ("2026-01-01T00:00:00", NEW_YEAR),
        ("2026-01-01 00:00:00", NEW_YEAR),
        ("2026-01-01T02:00:00+02:00", NEW_YEAR),
        ("2026-01-01T02:00:00 02:00", NEW_YEAR),
        ("2025-12-31T22:30:00-01:30", NEW_YEAR),
        ("2026-01-01T00:00:00-00:00", NEW_YEAR),
        ("2026-01-01T00:00:00.5Z", NEW_YEAR + 500_000),
        ("2026-01-01T00:00:00.000001999999999Z", NEW_YEAR + 1),
        ("1969-12-31T23:59:59.999999Z", -1),
        ("0001-01-01T00:00:00+23:59", -62_135_683_140_000_000),
        ("9999-12-31T23:59:59-23:59", 253_402_387_139_000_000),
    ],
)
def test_times(text: str, expected: int) -> None:
    assert from_text("CreationTime", text) == from_json("CreationTime", text) == expected


def test_an_unencoded_plus_in_an_offset_is_accepted() -> None:
    (condition,) = parse_get("CreationTime=2026-01-01T02:00:00+02:00").conditions
    assert condition.value == NEW_YEAR


@given(st.integers(-62_135_596_800_000_000, 253_402_300_799_999_999), st.integers(-1439, 1439))
def test_any_time_round_trips(instant: int, offset: int) -> None:
    assert from_text("CreationTime", rfc3339(instant)) == instant
    assert from_json("CreationTime", moment(instant)) == instant
    try:
        elsewhere = moment(instant).astimezone(timezone(timedelta(minutes=offset)))
    except OverflowError:
        return
    assert (
        from_text("CreationTime", elsewhere.isoformat())
        == from_json("CreationTime", elsewhere)
        == instant
    )


def test_datetimes_without_a_zone_are_utc() -> None:
    assert from_json("CreationTime", datetime(2026, 1, 1)) == from_json(
        "CreationTime", datetime(2026, 1, 1, tzinfo=UTC)
    )


@pytest.mark.parametrize("text", ["1", "0", "yes", "", "True ", "tru", "null", "ｔｒｕｅ"])
def test_other_boolean_texts_are_refused(text: str) -> None:
    refused_text("Cancellable", text)


def test_booleans() -> None:
    assert [from_text("IsCompleted", text) for text in ("true", "TRUE", "False")] == [
        True,
        True,
        False,
    ]
    assert from_json("IsCompleted", False) is False


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("operator", ["EQ", "NE", "GT", "GE", "LT", "LE"])
def test_states_match_in_any_letter_case(state: State, operator: str) -> None:
    assert (
        from_text("State", state.value.upper(), operator)
        == from_json("State", state.value.lower(), operator)
        == state.value
    )


@pytest.mark.parametrize(
    "text", ["", "Done", "Complete", "Completed ", "State.COMPLETED", "\u017ftopped"]
)
def test_the_error_for_an_unknown_state_lists_all_states(text: str) -> None:
    detail = refused_text("State", text)
    assert all(state.value in detail for state in State)


def test_like_on_a_state_accepts_any_text() -> None:
    assert from_text("State", "*ed", "LIKE") == "*ed"


def test_methods_match_in_any_letter_case() -> None:
    assert from_text("Method", "put") == from_json("Method", "Put") == "PUT"
    assert from_text("Method", "ſ") == "ſ"


def test_other_strings_are_unchanged() -> None:
    for text in ("put", "", " x ", "Ünï\u0301", "*?%_\\", "\t\r\n\x1b", "true", "1"):
        assert from_text("User", text) == from_json("User", text) == text


@pytest.mark.covers("A44")
@pytest.mark.parametrize("field", ["User", "State", "Method", "CreationTime"])
@pytest.mark.parametrize("text", ["a\0", "\0", "\ud800", "x\udfff"])
def test_nul_and_lone_surrogates_are_refused(field: str, text: str) -> None:
    refused_json(field, text)


@pytest.mark.covers("A44")
def test_nul_in_a_query_string_is_refused() -> None:
    refused_text("User", "a\0b")


def test_more_than_256_characters_are_refused() -> None:
    assert from_text("User", "ü" * 256) == from_json("User", "ü" * 256)
    for field in ("User", "Progress", "Cancellable", "CreationTime", "State"):
        refused_text(field, "1" * 257)
    refused_json("User", "x" * 257)
    refused_json("CreationTime", "x" * 257)


def test_more_than_8_wildcards_are_refused() -> None:
    assert from_text("Url", "*?" * 4, "LIKE") == "*?" * 4
    for operator in ("LIKE", "NOTLIKE"):
        assert "8 wildcards" in refused_text("Url", "*?" * 4 + "*", operator)
        refused_json("Url", "?" * 9, operator)
    assert from_text("Url", "*" * 9) == "*" * 9
