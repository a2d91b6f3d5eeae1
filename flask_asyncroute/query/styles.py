"""The three ways to write a query, and one query out of each: JSON, deepObject, Simple.

`http.operations` calls it with what a request holds, `AsyncRoute.query` with a mapping. Pure: whatever comes in, a
`Query` goes out or `InvalidQuery` is raised. It must never let a part of the text pass that it has not understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from ..errors import InvalidQuery
from .fields import Field, Operator, find_field, find_operator, shown
from .paging import read_cursor, read_limit, read_sort
from .terms import Condition, Query
from .values import condition_from_text, condition_from_value

MAX_QUERY_STRING = 65_536
MAX_CONDITIONS = 32

_PAGING = ("limit", "sort", "cursor")
_DEEP = re.compile(r"filter\[([^\[\]]*)\]\[([^\[\]]*)\]")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_COMMA_HINT = " A comma that belongs to a value is written %2C."


def parse_get(query_string: str) -> Query:
    """Read the query string of a GET: deepObject or Simple conditions, ``limit``, ``sort``, ``cursor``.

    :param query_string: raw, not decoded, as WSGI has it: one character for each byte (PEP 3333).
    :raises InvalidQuery: anything in it is unknown, malformed, given twice or too much; the detail names it.
    """
    paging, others = _divided(query_string)
    deep = {name: value for name, value in others.items() if name == "filter" or name.startswith("filter[")}
    conditions = [*_deep_object(deep), *_simple({name: value for name, value in others.items() if name not in deep})]
    if deep and len(deep) < len(others):
        one, two = next(iter(deep)), next(name for name in others if name not in deep)
        raise InvalidQuery(f"{shown(one)} and {shown(two)} are two styles. Write all conditions in one.")
    return _query(_counted(conditions), paging)


def parse_post(query_string: str, document: Any) -> Query:
    """Read a JSON query and the ``limit``, ``sort`` and ``cursor`` that go with it.

    :param query_string: as for :func:`parse_get`; conditions in it would be a second style.
    :param document: the body, decoded by a decoder that refuses a key given twice.
    :raises InvalidQuery: as :func:`parse_get`.
    """
    paging, others = _divided(query_string)
    for name in others:
        raise InvalidQuery(
            f"The parameter {shown(name)} does not go with a JSON body, which holds all conditions: two styles at once "
            f"are refused. Beside the body there are {', '.join(_PAGING)}."
        )
    return _query(parse_mapping(document), paging)


def parse_mapping(mapping: Any) -> tuple[Condition, ...]:
    """Read conditions in the JSON style: ``{field: {"op": …, "value": …}}``, or a list of such for one field.

    ``op`` may be left out: EQ. From Python a value may also be a datetime or a State, an ``op`` an Operator.

    :raises InvalidQuery: anything in it is unknown, of the wrong type, given twice or too much.
    """
    if not isinstance(mapping, Mapping):
        raise InvalidQuery('A query is an object of conditions, such as {"State": {"op": "EQ", "value": "Completed"}}.')
    return _counted(_json(mapping))


def _json(mapping: Mapping[Any, Any]) -> Iterator[Condition]:
    seen: set[Field] = set()
    for name, given in mapping.items():
        if not isinstance(name, str):
            raise InvalidQuery("The names of fields are strings.")
        field = find_field(name)
        if field in seen:
            raise _twice(name, f"For two conditions on {field.name} give a list of them.")
        seen.add(field)
        if isinstance(given, (list, tuple)):
            if not given:
                raise InvalidQuery(f"{field.name}: the list of conditions is empty. Leave the field out.")
            for one in given:
                yield _json_condition(field, one)
        else:
            yield _json_condition(field, given)


def _json_condition(field: Field, given: Any) -> Condition:
    if not isinstance(given, Mapping) or "value" not in given:
        raise InvalidQuery(
            f'{field.name}: a condition is an object such as {{"op": "EQ", "value": …}}; "value" is needed.'
        )
    for key in given:
        if key not in ("op", "value"):
            culprit = shown(key) if isinstance(key, str) else "a key that is no string"
            raise InvalidQuery(f'{field.name}: a condition has "op" and "value" only, not {culprit}.')
    operator = given.get("op", Operator.EQ)
    if not isinstance(operator, str):
        raise InvalidQuery(f'{field.name}: "op" is a string. The operators for it are {", ".join(field.operators)}.')
    return condition_from_value(field, find_operator(operator, field), given["value"])


def _deep_object(parameters: Mapping[str, str]) -> Iterator[Condition]:
    long: dict[Field, dict[str, str]] = {}
    short: dict[tuple[Field, Operator], str] = {}
    for name, raw in parameters.items():
        found = _DEEP.fullmatch(name)
        if found is None:
            raise InvalidQuery(
                f"{shown(name)} is none of filter[Field][op], filter[Field][value], and filter[Field][GE] or the like."
            )
        field, key, value = find_field(found[1]), found[2], _decoded(raw)
        if key in ("op", "value"):
            parts = long.setdefault(field, {})
            if key in parts:
                raise _twice(name)
            parts[key] = value
        else:
            operator = find_operator(key, field)
            if (field, operator) in short:
                raise _twice(name)
            short[field, operator] = value
    for field, parts in long.items():
        operator = find_operator(parts.get("op", "EQ"), field)
        if "value" not in parts:
            raise InvalidQuery(f"filter[{field.name}][op] is there and filter[{field.name}][value] is not. Give both.")
        yield condition_from_text(field, operator, parts["value"])
    for (field, operator), value in short.items():
        yield condition_from_text(field, operator, value)


def _simple(parameters: Mapping[str, str]) -> Iterator[Condition]:
    seen: set[Field] = set()
    for first, raw in parameters.items():
        for name, value, hint in _split_at_commas(first, raw):
            field = find_field(name, hint)
            if field in seen:
                raise _twice(name, f"For two conditions on one field write filter[{field.name}][NE]=… and the like.")
            seen.add(field)
            yield condition_from_text(field, Operator.EQ, _decoded(value))


def _split_at_commas(first: str, raw: str) -> Iterator[tuple[str, str, str]]:
    """Yield name, raw value and hint of each condition that one parameter holds.

    A comma begins a condition where a name and ``=`` follow, and is a part of the value elsewhere. The raw text is
    split, since ``%2C`` is always a part of the value.
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


def _divided(query_string: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the parameters for paging, decoded, and all others, the values still raw."""
    if len(query_string) > MAX_QUERY_STRING:
        raise InvalidQuery(f"The query string is over {MAX_QUERY_STRING} characters; ask for less.")
    paging: dict[str, str] = {}
    others: dict[str, str] = {}
    for parameter in query_string.split("&"):
        if not parameter:
            continue
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
        raise InvalidQuery(f"{shown(raw)} is not UTF-8. Encode it as UTF-8, then percent-encode it.") from None


def _counted(conditions: Iterable[Condition]) -> tuple[Condition, ...]:
    counted: list[Condition] = []
    for condition in conditions:
        if len(counted) == MAX_CONDITIONS:
            raise InvalidQuery(f"Over {MAX_CONDITIONS} conditions, the next one on {condition.field.name}; use fewer.")
        counted.append(condition)
    return tuple(counted)


def _query(conditions: tuple[Condition, ...], paging: Mapping[str, str]) -> Query:
    query = Query(conditions)
    if "limit" in paging:
        query = replace(query, limit=read_limit(paging["limit"]))
    if "sort" in paging:
        query = replace(query, sort=read_sort(paging["sort"]))
    if "cursor" in paging:
        query = replace(query, cursor=read_cursor(paging["cursor"]))
    return query


def _twice(name: str, remedy: str = "Give it once.") -> InvalidQuery:
    return InvalidQuery(f"{shown(name)} is given twice, letter case and percent-encoding aside. {remedy}")
