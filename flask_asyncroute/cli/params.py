"""Parse the parameters of the commands, and complete them in the shell."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

import click
from flask.cli import ScriptInfo

from ..errors import AsyncRouteError
from ..query import FIELDS, Query, parse_get
from ..query.model import shown
from ..runtime import runtime_of
from ..task import State
from .base import USAGE, fail

PAGING = ("limit", "sort", "cursor")
BOOLEANS = ("true", "false")
MOST_VALUES = 100
MOST_IN_VALUE = 8000  # characters; servers and proxies refuse longer URLs


def complete_filter(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    """Complete the name of a field, or the value of a field that has few values."""
    before = [word for word in context.params.get(str(parameter.name)) or () if word != "="]
    field, equals, start = incomplete.partition("=")
    if before and before[-1].lower() in map(str.lower, FIELDS):
        # bash splits words at "=", so the field is the word before, and only the value is replaced.
        return [value for value in _values_of(before[-1]) if _begins(value, incomplete)]
    if equals:
        return [f"{field}={value}" for value in _values_of(field) if _begins(value, start)]
    return [f"{name}=" for name in FIELDS if _begins(name, incomplete)]


def _values_of(field: str) -> Sequence[str]:
    values: dict[str, Sequence[str]] = {
        "state": list(State), "iscompleted": BOOLEANS, "cancellable": BOOLEANS
    }  # fmt: skip
    return values.get(field.lower(), ())


def complete_endpoint(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    """Complete the endpoint of an async route."""
    script = context.find_object(ScriptInfo)
    if script is None:
        return []
    try:
        runtime = runtime_of(script.load_app())
        runtime.prepare()
    except AsyncRouteError:
        return []  # the command will show the error
    return [name for name in runtime.routes if _begins(name, incomplete)]


def _begins(text: str, start: str) -> bool:
    return text.lower().startswith(start.lower())


def parse_filters(filters: Sequence[str], sort: str | None = None) -> Query:
    """Parse conditions in the simple or the deepObject query style.

    :param sort: a field for the order, such as ``-CreationTime``.
    :raises click.ClickException: for a condition without ``=``.
    :raises InvalidQuery: for any other invalid condition.
    """
    parameters = []
    for each in filters:
        name, equals, value = each.partition("=")
        if not name or not equals:
            raise fail(
                f"{shown(each)} is not a condition. Write FIELD=VALUE, such as State=Failed.",
                USAGE,
            )
        if name in PAGING:
            raise fail(f"{name} is not a field. Use the options --limit and --sort.", USAGE)
        # In a URL, "+" would be a space. "%" is not quoted, so that %2C is a comma.
        raw = quote(value.encode("utf-8", "surrogateescape"), safe=",=%")
        parameters.append(f"{quote(name.encode('utf-8', 'surrogateescape'), safe='[],')}={raw}")
    if sort is not None:
        parameters.append(f"sort={quote(sort.encode('utf-8', 'surrogateescape'))}")
    return parse_get("&".join(parameters))


def parse_values(given: Sequence[str]) -> dict[str, str]:
    """Parse the URL variables of ``submit``.

    :raises click.ClickException: if a value is malformed, repeated or over a limit.
    """
    if len(given) > MOST_VALUES:
        raise fail(f"--value: at most {MOST_VALUES} values are allowed.", USAGE)
    values: dict[str, str] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not name or not equals:
            raise fail(
                f"--value: {shown(each)} is invalid. Write NAME=VALUE, such as year=2026.",
                USAGE,
            )
        if name in values:
            raise fail(f"--value: {shown(name)} is given twice. Give it once.", USAGE)
        if len(value) > MOST_IN_VALUE:
            raise fail(
                f"--value: the value of {shown(name)} has {len(value)} characters; the limit is "
                f"{MOST_IN_VALUE}. Send long values with --json.",
                USAGE,
            )
        if not value.isprintable():
            raise fail(
                f"--value: the value of {shown(name)} contains a character that cannot be printed: "
                f"{shown(value)}. Remove it, or send the value with --json.",
                USAGE,
            )
        values[name] = value
    return values
