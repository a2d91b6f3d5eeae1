"""The three query styles: what each accepts and refuses. Parsing returns a `Query` or raises
`InvalidQuery`.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute.errors import InvalidQuery
from flask_asyncroute.query import (
    FIELDS,
    NEWEST_FIRST,
    Condition,
    Operator,
    Query,
    parse_get,
    parse_mapping,
    parse_post,
)
from flask_asyncroute.task import State
from tests.support.timing import thread_seconds

COMPLETED = Condition(FIELDS["State"], Operator.EQ, "Completed")
CANCELLABLE = Condition(FIELDS["Cancellable"], Operator.EQ, True)


def on(field: str, operator: str, value: str | int | float | bool) -> Condition:
    return Condition(FIELDS[field], Operator(operator), value)


def refused(query_string: str) -> str:
    with pytest.raises(InvalidQuery) as caught:
        parse_get(query_string)
    return caught.value.detail


def refused_mapping(mapping: object) -> str:
    with pytest.raises(InvalidQuery) as caught:
        parse_mapping(mapping)
    return caught.value.detail


# What each style accepts


def test_no_parameters_select_the_newest_50_tasks() -> None:
    assert (
        parse_get("") == parse_get("&&") == parse_post("", {}) == Query((), NEWEST_FIRST, 50, None)
    )


@pytest.mark.parametrize(
    "query_string",
    [
        "State=Completed,Cancellable=True",
        "State=Completed&Cancellable=True",
        "state=COMPLETED,cancellable=true",
        "State=Completed,%43ancellable=True",
        "filter[State][op]=EQ&filter[State][value]=Completed&filter[Cancellable][value]=TRUE",
        "filter%5BState%5D%5Bop%5D=eq&filter%5Bstate%5D%5Bvalue%5D=completed&filter[CANCELLABLE][Eq]=true",
    ],
)
def test_get_styles_are_equivalent(query_string: str) -> None:
    assert set(parse_get(query_string).conditions) == {COMPLETED, CANCELLABLE}


def test_json_style_is_equivalent() -> None:
    document = {
        "State": {"op": "EQ", "value": "Completed"},
        "Cancellable": {"op": "EQ", "value": True},
    }
    assert parse_post("", document).conditions == (COMPLETED, CANCELLABLE)
    assert parse_mapping(
        {"state": {"value": "completed"}, "CANCELLABLE": {"op": "eq", "value": True}}
    ) == (
        COMPLETED,
        CANCELLABLE,
    )


def test_two_conditions_on_one_field() -> None:
    first = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000
    second = int(datetime(2026, 1, 2, tzinfo=UTC).timestamp()) * 1_000_000
    expected = (on("CreationTime", "GE", first), on("CreationTime", "LT", second))
    short = "filter[CreationTime][GE]=2026-01-01T00:00:00Z&filter[CreationTime][LT]=2026-01-02T00:00:00Z"
    assert parse_get(short).conditions == expected
    both = [
        {"op": "GE", "value": "2026-01-01T00:00:00Z"},
        {"op": "LT", "value": "2026-01-02T00:00:00Z"},
    ]
    assert parse_mapping({"CreationTime": both}) == expected


def test_commas_in_simple_values() -> None:
    assert parse_get("User=Smith,John").conditions == (on("User", "EQ", "Smith,John"),)
    assert parse_get("User=a,,State=Completed").conditions == (on("User", "EQ", "a,"), COMPLETED)
    assert parse_get("User=a%2CState=Completed").conditions == (
        on("User", "EQ", "a,State=Completed"),
    )
    assert parse_get("Url=a=b").conditions == (on("Url", "EQ", "a=b"),)
    assert parse_get("User=a,State%3DCompleted").conditions == (
        on("User", "EQ", "a,State=Completed"),
    )
    assert parse_get("User=,1=2, b=c,=").conditions == (on("User", "EQ", ",1=2, b=c,="),)
    detail = refused("User=a,b=c")
    assert "'b'" in detail and "%2C" in detail


def test_values_are_decoded_once_like_form_values() -> None:
    assert parse_get("User=J%C3%BCrgen+M%2B%2525").conditions == (on("User", "EQ", "Jürgen M+%25"),)
    assert parse_get("User=J\xc3\xbcrgen").conditions == (on("User", "EQ", "Jürgen"),)
    assert parse_get("filter[Url][value]=http://a/?b=c").conditions == (
        on("Url", "EQ", "http://a/?b=c"),
    )
    assert parse_get("Error=").conditions == (on("Error", "EQ", ""),)


def test_mappings_of_python_values() -> None:
    at = datetime(2026, 1, 1, 2, tzinfo=timezone(timedelta(hours=2)))
    expected = (
        on("CreationTime", "GE", 1767225600000000),
        on("State", "NE", "Failed"),
        on("Progress", "LT", 50.0),
    )
    mapping = {
        "CreationTime": {"op": Operator.GE, "value": at},
        "State": ({"op": "NE", "value": State.FAILED},),
        "Progress": {"op": "lt", "value": 50},
    }
    assert parse_mapping(mapping) == expected
    assert type(parse_mapping({"State": {"value": State.FAILED}})[0].value) is str
    assert parse_mapping({"CreationTime": {"value": datetime(2026, 1, 1)}}) == (
        on("CreationTime", "EQ", 1767225600000000),
    )


# Paging


def test_limit_sort_and_cursor_work_with_every_style() -> None:
    for query in (
        parse_get("State=Completed&limit=7&sort=startingtime&cursor=abc"),
        parse_get("filter[State][EQ]=Completed&limit=7&sort=startingtime&cursor=abc"),
        parse_post("limit=7&sort=startingtime&cursor=abc", {"State": {"value": "Completed"}}),
    ):
        assert query.conditions == (COMPLETED,)
        assert (query.limit, query.sort.field.name, query.sort.descending, query.cursor) == (
            7,
            "StartingTime",
            False,
            "abc",
        )


@pytest.mark.covers("A28")
@pytest.mark.parametrize("text", ["501", "9223372036854775808", "9" * 5000, "1" + "0" * 60_000])
def test_limit_above_500_is_500(text: str) -> None:
    assert parse_get(f"limit={text}").limit == 500


@pytest.mark.covers("A28")
def test_limit_up_to_500_is_kept() -> None:
    assert [parse_get(f"limit={limit}").limit for limit in (1, 499, 500, "007")] == [1, 499, 500, 7]


@pytest.mark.covers("A28")
@pytest.mark.parametrize(
    "text",
    [
        "-1",
        "0",
        "000",
        "a",
        "NaN",
        "1.5",
        "1e2",
        "",
        "+5",
        "%2B5",
        "1_0",
        "١٢",
        " 1",
        "5,State=Failed",
    ],
)
def test_an_invalid_limit_is_refused(text: str) -> None:
    assert refused(f"limit={quote(text, safe='%,=+')}").startswith("limit: ")


@pytest.mark.covers("A34")
@pytest.mark.parametrize(
    "text",
    [
        "id desc; --",
        "",
        "-",
        "--CreationTime",
        "+CreationTime",
        "ExpireTime",
        "State",
        "CreationTime,CompletedTime",
        ",".join(["CreationTime"] * 1000),
        "__class__",
    ],
)
def test_an_invalid_sort_is_refused(text: str) -> None:
    detail = refused(f"sort={quote(text)}")
    assert detail.startswith("sort: ") and len(detail) < 250


@pytest.mark.parametrize("field", ["CreationTime", "StartingTime", "CompletedTime"])
def test_sort(field: str) -> None:
    sort = parse_get(f"sort=-{field.upper()}").sort
    assert (sort.field, sort.descending) == (FIELDS[field], True)
    assert not parse_get(f"sort={field}").sort.descending


@pytest.mark.covers("A29")
@pytest.mark.parametrize("text", ["", "a" * 513])
def test_a_cursor_of_invalid_length_is_refused(text: str) -> None:
    assert "cursor" in refused(f"cursor={text}")


# What all styles refuse


@pytest.mark.covers("A32")
@pytest.mark.parametrize(
    "name",
    [
        "id; DROP TABLE",
        '"',
        "__class__",
        "user.password",
        "",
        "Id\0",
        "Result",
        "ſtate",
        "Filter[State][op]",
        "wait",
    ],
)
def test_field_names_are_an_allow_list(name: str) -> None:
    shown = ascii(name)
    assert shown in refused_mapping({name: {"value": "1"}})
    assert shown in refused(f"{quote(name)}=1")
    if "[" not in name:
        assert shown in refused(f"filter[{quote(name)}][EQ]=1")


@pytest.mark.covers("A32")
def test_paging_parameters_are_not_fields() -> None:
    for name in ("limit", "sort", "cursor"):
        assert f"'{name}'" in refused_mapping({name: {"value": "1"}})
        assert f"'{name}'" in refused(f"User=x,{name}=1")
    assert "'Limit'" in refused("Limit=1")


@pytest.mark.covers("A33")
@pytest.mark.parametrize(
    "name", ["OR 1=1", "==", "", "=", "EQ ", "l\u0131ke", "LI\u212aE", "__eq__", "\0"]
)
def test_operators_are_an_allow_list(name: str) -> None:
    for detail in (
        refused(f"filter[User][{quote(name)}]=x"),
        refused(f"filter[User][op]={quote(name)}&filter[User][value]=x"),
        refused_mapping({"User": {"op": name, "value": "x"}}),
    ):
        assert ascii(name) in detail and "NOTLIKE" in detail


@pytest.mark.covers("A33")
@pytest.mark.parametrize("operator", [None, 1, True, [], ["EQ"], {"EQ": 1}])
def test_operators_must_be_strings(operator: object) -> None:
    assert "User" in refused_mapping({"User": {"op": operator, "value": "x"}})


@pytest.mark.parametrize(
    ("field", "operator"),
    [
        ("CreationTime", "LIKE"),
        ("Progress", "NOTLIKE"),
        ("IsCompleted", "GT"),
        ("Cancellable", "LIKE"),
    ],
)
def test_operators_that_a_field_does_not_support_are_refused(field: str, operator: str) -> None:
    detail = refused(f"filter[{field}][{operator}]=x")
    assert operator in detail and field in detail


@pytest.mark.covers("A48")
@pytest.mark.parametrize(
    "document", [None, [], "x", 1, True, 1.5, [{"State": {"value": "Failed"}}]]
)
def test_a_query_must_be_an_object(document: object) -> None:
    with pytest.raises(InvalidQuery, match="object"):
        parse_post("", document)


@pytest.mark.parametrize(
    "condition",
    [
        None,
        "Completed",
        1,
        [],
        [[]],
        ["Completed"],
        {},
        {"op": "EQ"},
        {"value": "Failed", "other": 1},
        {"value": "Failed", "Op": "EQ"},
        {"value": None},
        {1: 2, "value": "Failed"},
    ],
)
def test_malformed_json_conditions_are_refused(condition: object) -> None:
    assert "State" in refused_mapping({"State": condition})


def test_json_keys_must_be_strings() -> None:
    refused_mapping({1: {"value": 1}})


@pytest.mark.covers("A37")
@pytest.mark.parametrize(
    ("query_string", "parameter"),
    [
        ("State=Failed&State=Completed", "State"),
        ("State=Failed&state=Failed", "state"),
        ("State=Failed&%53tate=Failed", "State"),
        ("State=Failed,State=Failed", "State"),
        ("State=Failed&User=x,sTATE=Failed", "sTATE"),
        (
            "filter[State][op]=EQ&filter[State][op]=EQ&filter[State][value]=Failed",
            "filter[State][op]",
        ),
        ("filter[State][value]=Failed&filter[STATE][value]=Failed", "filter[STATE][value]"),
        ("filter[State][EQ]=Failed&filter%5BState%5D[eq]=Failed", "filter[State][eq]"),
        ("limit=1&limit=1", "limit"),
        ("limit=1&%6Cimit=1", "limit"),
        ("sort=CreationTime&sort=CreationTime", "sort"),
        ("cursor=a&cursor=a", "cursor"),
    ],
)
def test_duplicate_parameters_are_refused(query_string: str, parameter: str) -> None:
    assert refused(query_string).startswith(f"{parameter!r} occurs twice")


@pytest.mark.covers("A37")
def test_duplicate_json_keys_in_other_letter_case_are_refused() -> None:
    assert "'state' occurs twice" in refused_mapping(
        {"State": {"value": "Failed"}, "state": {"value": "Failed"}}
    )
    with pytest.raises(InvalidQuery, match="'limit' occurs twice"):
        parse_post("limit=1&limit=1", {})


def test_two_styles_in_one_request_are_refused() -> None:
    assert "different styles" in refused("filter[State][EQ]=Failed&User=x")
    assert "different styles" in refused("User=x&filter[State][EQ]=Failed")
    for query_string in ("State=Failed", "filter[State][EQ]=Failed", "wait=1"):
        with pytest.raises(InvalidQuery, match="with a JSON body"):
            parse_post(query_string, {})


@pytest.mark.parametrize(
    "name",
    [
        "filter",
        "filter[State]",
        "filter[]",
        "filter[State][op][x]",
        "filter[State]op",
        "filter[State][op]x",
        "filter[[State]][op]",
        "filter[State",
        "filter[State]][op]",
    ],
)
def test_malformed_deep_object_names_are_refused(name: str) -> None:
    assert ascii(name) in refused(f"{name}=Failed")


def test_a_deep_object_operator_without_a_value_is_refused() -> None:
    assert "filter[State][value]" in refused("filter[State][op]=EQ")


@pytest.mark.parametrize("query_string", ["User", "limit", "filter[User][EQ]", "User&State=Failed"])
def test_parameters_without_a_value_are_refused(query_string: str) -> None:
    assert "no value" in refused(query_string)


def test_more_than_32_conditions_are_refused() -> None:
    some = [{"op": "NE", "value": str(number)} for number in range(33)]
    assert len(parse_mapping({"User": some[:32]})) == 32
    assert "User" in refused_mapping({"User": some})
    strings = ("Id", "AsyncRouteId", "User", "Error", "Url", "Method")
    names = [f"filter[{field}][{operator}]=x" for field in strings for operator in Operator]
    assert len(parse_get("&".join(names[:32])).conditions) == 32
    assert "32" in refused("&".join(names[:33]))


@pytest.mark.parametrize(
    "raw",
    ["User=%ff", "User=%C3", "%ff=x", "User=%ED%A0%80", "User=\xff", "User=\u20ac", "limit=%ff"],
)
def test_invalid_utf_8_is_refused(raw: str) -> None:
    assert "UTF-8" in refused(raw)


def test_names_in_errors_are_cut_and_escaped() -> None:
    for text in ("\x1b[31m\r\n\u202e" + "x" * 10_000, "\U0001f600" * 200, "'" * 200):
        detail = refused(f"{quote(text)}=1")
        assert len(detail) < 350
        assert all(" " <= character <= "~" or character == "…" for character in detail)


# Time and size


def timed(query_string: str) -> float:
    return thread_seconds(lambda: refused(query_string))


@pytest.mark.covers("A35")
def test_many_brackets_are_refused_quickly() -> None:
    assert timed("filter" + "[a]" * 10_000 + "=1") < 0.05
    assert timed("filter" + "[" * 10_000 + "]" * 10_000 + "=1") < 0.05


@pytest.mark.covers("A38")
@pytest.mark.parametrize(
    "query_string",
    [
        "&".join(f"a{number}=1" for number in range(100_000)),
        "User=" + "x" * 1_000_000,
        "User=" + "," * 65_000,
        "User=" + ",a" * 32_000,
        "User=" + ",%41" * 16_000,
        "User=" + "%41" * 21_000,
        "&" * 65_000 + "a",
        "User=x" + ",State=Failed" * 5_000,
        "filter[User][EQ]=" + "*" * 65_000,
    ],
    ids=lambda text: text[:20],
)
def test_oversized_queries_are_refused_quickly(query_string: str) -> None:
    assert timed(query_string) < 0.1


# Any input

names = st.sampled_from(
    [
        *FIELDS,
        "limit",
        "sort",
        "cursor",
        "filter[State][op]",
        "filter[State][value]",
        "filter[User][LIKE]",
    ]
)
values = st.one_of(
    st.sampled_from(
        ["Completed", "true", "1", "2026-01-01T00:00:00Z", "a,State=Failed", "-CreationTime"]
    ),
    st.text(max_size=20).map(lambda text: quote(text.encode("utf-8", "surrogatepass"))),
    st.text(st.characters(max_codepoint=255), max_size=20),
)
likely = st.lists(st.tuples(names, values), max_size=5).map(
    lambda pairs: "&".join(f"{name}={value}" for name, value in pairs)
)
json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from(["EQ", "Completed"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*FIELDS, "op", "value"]) | st.text(max_size=5), inner, max_size=3
        )
    ),
    max_leaves=12,
)


@given(st.one_of(st.text(), st.text("filterStaeop[]=&,%+012.:-TZ"), likely))
def test_any_text_is_parsed_or_refused(query_string: str) -> None:
    try:
        query = parse_get(query_string)
    except InvalidQuery as refusal:
        assert len(refusal.detail) < 400 and refusal.detail.encode()
    else:
        assert 1 <= query.limit <= 500
        assert all(
            condition.operator in condition.field.operators for condition in query.conditions
        )


@given(json)
def test_any_json_is_parsed_or_refused(document: object) -> None:
    try:
        parse_post("", document)
    except InvalidQuery as refusal:
        assert len(refusal.detail) < 400 and refusal.detail.encode()


@given(
    st.sampled_from(["User", "Error", "Url", "Id"]),
    st.sampled_from(Operator),
    st.text(max_size=100),
)
def test_all_styles_parse_to_the_same_condition(name: str, operator: Operator, text: str) -> None:
    mapping = {name: {"op": operator.value, "value": text}}
    try:
        expected = parse_mapping(mapping)
    except InvalidQuery:
        expected = ()
    quoted = quote(text.encode("utf-8", "surrogatepass"), safe="")
    queries = [
        f"filter[{name}][{operator}]={quoted}",
        f"filter[{name}][op]={operator}&filter[{name}][value]={quoted}",
        *([f"{name}={quoted}"] if operator is Operator.EQ else []),
    ]
    for query_string in queries:
        if expected:
            assert parse_get(query_string).conditions == expected
        else:
            refused(query_string)
