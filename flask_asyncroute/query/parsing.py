"""Parse requests that list tasks. Conditions have one of three styles.

- JSON, in a request body: ``{"State": {"op": "EQ", "value": "Failed"}}``.
- deepObject, in a query string: ``filter[State][EQ]=Failed``.
- Simple, in a query string: ``State=Failed``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from ..errors import InvalidQuery
from .cursor import MAX_CURSOR, invalid_cursor
from .model import (
    ASCII_LOWER,
    MAX_LIMIT,
    SORTABLE,
    Condition,
    Field,
    Operator,
    Query,
    Sort,
    find_field,
    find_operator,
    shown,
)
from .values import condition_from_text, condition_from_value

MAX_QUERY_STRING = 65_536
MAX_CONDITIONS = 32

_DEEP = re.compile(r"filter\[([^\[\]]*)\]\[([^\[\]]*)\]")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DIGITS = re.compile(r"[0-9]+")
_COMMA_HINT = " Write a comma in a value as %2C."
_SORTS = {
    f"{sign}{field.name.translate(ASCII_LOWER)}": Sort(field, descending=sign == "-")
    for field in SORTABLE
    for sign in ("", "-")
}


def parse_get(query_string: str) -> Query:
    """Parse a query string with conditions, ``limit``, ``sort`` and ``cursor``.

    :param query_string: as in WSGI: not decoded, with one character for each byte (PEP 3333).
    :raises InvalidQuery: if a part is unknown, malformed, repeated or over a limit.
    """
    paging, others = _split_query_string(query_string)
    deep = {name: raw for name, raw in others.items() if name.partition("[")[0] == "filter"}
    simple = {name: raw for name, raw in others.items() if name not in deep}
    if deep and simple:
        one, two = shown(next(iter(deep))), shown(next(iter(simple)))
        raise InvalidQuery(
            f"{one} and {two} use different styles. Use one style for all conditions."
        )
    return _query(_counted(_deep_object(deep) if deep else _simple(simple)), paging)


def parse_post(query_string: str, document: Any) -> Query:
    """Parse conditions in a JSON body, and ``limit``, ``sort`` and ``cursor`` in a query string.

    :param query_string: as for :func:`parse_get`, but without conditions.
    :param document: the decoded body. The caller must have refused duplicate names.
    :raises InvalidQuery: if a part is unknown, malformed, repeated or over a limit.
    """
    paging, others = _split_query_string(query_string)
    for name in others:
        raise InvalidQuery(
            f"The parameter {shown(name)} cannot be combined with a JSON body. Put all conditions "
            f"in the body; the query string may contain {', '.join(_PAGING)}."
        )
    return _query(parse_mapping(document), paging)


def parse_mapping(mapping: Any) -> tuple[Condition, ...]:
    """Parse conditions in the JSON style.

    Each field name maps to ``{"op": …, "value": …}`` or to a list of these. ``op`` defaults to EQ.

    :raises InvalidQuery: if a condition is invalid.
    """
    return _counted(_json(_items(mapping)))


def parse_python(mapping: Any, keywords: Mapping[str, Any]) -> tuple[Condition, ...]:
    """Parse conditions that the app's code passes as a mapping and as keyword arguments.

    The mapping is like that of :func:`parse_mapping`. In addition, a field can map directly to a
    value, which is compared with EQ. Values can also be datetimes or States.

    :raises InvalidQuery: if a condition is invalid, or a field occurs in the mapping and in
        ``keywords``.
    """
    items = _items(mapping)
    given = {find_field(name) for name, _ in items if isinstance(name, str)}
    for name in keywords:
        if find_field(name) in given:
            raise InvalidQuery(
                f"{shown(name)} is both in the mapping and a keyword argument. Put all conditions "
                "on a field into one list."
            )
    return _counted(_json([*items, *keywords.items()], takes_values=True))


def _items(mapping: Any) -> list[tuple[Any, Any]]:
    if not isinstance(mapping, Mapping):
        example = '{"State": {"op": "EQ", "value": "Completed"}}'
        raise InvalidQuery(f"A query must be an object of conditions, such as {example}.")
    return list(mapping.items())


def _json(items: Iterable[tuple[Any, Any]], takes_values: bool = False) -> Iterator[Condition]:
    """Yield the conditions of a mapping in the JSON style.

    :param takes_values: whether a field can map directly to a value, which is compared with EQ.
    """
    seen: set[Field] = set()
    for name, given in items:
        if not isinstance(name, str):
            raise InvalidQuery("The names of fields must be strings.")
        field = find_field(name)
        if field in seen:
            raise _twice(name, f"For several conditions on {field.name}, use a list.")
        seen.add(field)
        conditions = given if isinstance(given, (list, tuple)) else [given]
        if not conditions:
            raise field.error("the list of conditions is empty; omit the field")
        if takes_values:
            conditions = _with_values(field, conditions)
        for one in conditions:
            yield _json_condition(field, one)


def _with_values(field: Field, conditions: Sequence[Any]) -> list[Any]:
    values = [one for one in conditions if not isinstance(one, Mapping)]
    if len(values) > 1:
        # The conditions are joined by AND, but a list of values looks like alternatives.
        raise field.error(
            "the conditions of a list must all be met, so no task matches two values; call query() "
            "once for each value"
        )
    return [one if isinstance(one, Mapping) else {"value": one} for one in conditions]


def _json_condition(field: Field, given: Any) -> Condition:
    if not isinstance(given, Mapping) or "value" not in given:
        problem = 'a condition must be an object with "value", such as {"op": "EQ", "value": …}'
        raise field.error(problem)
    for key in given:
        if key not in ("op", "value"):
            culprit = shown(key) if isinstance(key, str) else "a key that is not a string"
            raise field.error(f'a condition may have only "op" and "value", not {culprit}')
    operator = given.get("op", Operator.EQ)
    if not isinstance(operator, str):
        known = ", ".join(field.operators)
        raise field.error(f'"op" must be a string. The operators are {known}')
    return condition_from_value(field, find_operator(operator, field), given["value"])


def _deep_object(parameters: Mapping[str, str]) -> Iterator[Condition]:
    given: dict[Field, dict[str, str]] = {}
    for name, raw in parameters.items():
        found = _DEEP.fullmatch(name)
        if found is None:
            raise InvalidQuery(
                f"{shown(name)} is invalid. Use filter[Field][GE], with GE or another operator; or "
                "filter[Field][op] together with filter[Field][value]."
            )
        field, key = find_field(found[1]), found[2]
        if key not in ("op", "value"):
            key = find_operator(key, field)
        parts = given.setdefault(field, {})
        if key in parts:
            raise _twice(name)
        parts[key] = _decoded(raw)
    for field, parts in given.items():
        if "op" in parts and "value" not in parts:
            name = f"filter[{field.name}]"
            raise InvalidQuery(f"{name}[op] is set and {name}[value] is missing. Send both.")
        if "value" in parts:
            operator = find_operator(parts.pop("op", "EQ"), field)
            yield condition_from_text(field, operator, parts.pop("value"))
        for key, value in parts.items():
            yield condition_from_text(field, Operator(key), value)


def _simple(parameters: Mapping[str, str]) -> Iterator[Condition]:
    seen: set[Field] = set()
    for first, raw in parameters.items():
        for name, value, hint in _split_at_commas(first, raw):
            field = find_field(name, hint)
            if field in seen:
                other_style = f"deepObject, such as filter[{field.name}][NE]=…"
                raise _twice(name, f"For several conditions on one field, use {other_style}.")
            seen.add(field)
            yield condition_from_text(field, Operator.EQ, _decoded(value))


def _split_at_commas(first: str, raw: str) -> Iterator[tuple[str, str, str]]:
    """Split a parameter such as ``State=Failed,Method=PUT`` into conditions.

    Yields the name, the raw value and a hint for error messages. A comma begins a new condition if
    a name and ``=`` follow. ``%2C`` is always part of the value.
    """
    name, hint = first, ""
    value: list[str] = []
    for piece in raw.split(","):
        before, equals, after = piece.partition("=")
        following = unquote(before, errors="replace") if value and equals else ""
        if _IDENTIFIER.fullmatch(following):
            yield name, ",".join(value), hint
            name, hint, value = following, _COMMA_HINT, [after]
        else:
            value.append(piece)
    yield name, ",".join(value), hint


def _split_query_string(query_string: str) -> tuple[dict[str, str], dict[str, str]]:
    # Return the paging parameters (decoded) and the other parameters (not decoded yet).
    if len(query_string) > MAX_QUERY_STRING:
        raise InvalidQuery(f"The query string has over {MAX_QUERY_STRING} characters; shorten it.")
    paging: dict[str, str] = {}
    others: dict[str, str] = {}
    for parameter in filter(None, query_string.split("&")):
        raw_name, equals, raw_value = parameter.partition("=")
        name = _decoded(raw_name)
        if name in paging or name in others:
            raise _twice(name)
        if not equals:
            raise InvalidQuery(f"The parameter {shown(name)} has no value. Write it as name=value.")
        if name in _PAGING:
            paging[name] = _decoded(raw_value)
        else:
            others[name] = raw_value
    return paging, others


def _decoded(raw: str) -> str:
    try:
        return unquote_to_bytes(raw.replace("+", " ").encode("latin-1")).decode()
    except UnicodeError:
        remedy = "Encode it as UTF-8, then percent-encode it"
        raise InvalidQuery(f"{shown(raw)} is not UTF-8. {remedy}.") from None


def _counted(conditions: Iterable[Condition]) -> tuple[Condition, ...]:
    counted = tuple(islice(conditions, MAX_CONDITIONS + 1))
    if len(counted) > MAX_CONDITIONS:
        next_one = f"(the next is on {counted[-1].field.name})"
        raise InvalidQuery(f"The query has over {MAX_CONDITIONS} conditions {next_one}; use fewer.")
    return counted


def _query(conditions: tuple[Condition, ...], paging: Mapping[str, str]) -> Query:
    return Query(conditions, **{name: _PAGING[name](text) for name, text in paging.items()})


def _limit(text: str) -> int:
    digits = text.lstrip("0") if _DIGITS.fullmatch(text) else ""
    if not digits:
        wanted = f"an integer from 1 to {MAX_LIMIT}"
        raise InvalidQuery(f"limit: {shown(text)} is invalid; use {wanted}.")
    # Check the length first: int() is slow for thousands of digits.
    return MAX_LIMIT if len(digits) > len(str(MAX_LIMIT)) else min(int(digits), MAX_LIMIT)


def _sort(text: str) -> Sort:
    sort = _SORTS.get(text.translate(ASCII_LOWER))
    if sort is None:
        names = ", ".join(field.name for field in SORTABLE)
        wanted = f"one of {names}, with a leading - for newest first"
        raise InvalidQuery(f"sort: {shown(text)} is invalid; use {wanted}.")
    return sort


def _cursor(text: str) -> str:
    if not 0 < len(text) <= MAX_CURSOR:
        raise invalid_cursor()
    return text


_PAGING: dict[str, Callable[[str], Any]] = {"limit": _limit, "sort": _sort, "cursor": _cursor}


def _twice(name: str, remedy: str = "Send it once.") -> InvalidQuery:
    problem = "occurs twice (ignoring letter case and percent-encoding)"
    return InvalidQuery(f"{shown(name)} {problem}. {remedy}")
