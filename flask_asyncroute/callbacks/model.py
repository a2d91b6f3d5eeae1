"""Callbacks as developers declare them, as the store keeps them, and as clients see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ..errors import ConfigurationError
from ..validators import boolean, optional, text
from . import expressions, validation

NOT_STARTED = "NotStarted"
RUNNING = "Running"
COMPLETED = "Completed"
FAILED = "Failed"
PENDING = (NOT_STARTED, RUNNING)  # the states of an unfinished callback


@dataclass(frozen=True, slots=True)
class Callback:
    """The request with which the server reports the outcome of an ended task.

    The URL, method, content type and header values can be OpenAPI runtime expressions, or contain
    expressions in braces. Expressions are resolved when the task is created.

    :param url: an absolute URL, or an expression that reads it from the task's request.
    :param method: the request method.
    :param content_type: the media type of the body: JSON, XML or YAML.
    :param headers: additional headers.
    :param send_result: whether the body contains the task's Result.
    :param event_name: the body's ``EventName``; None: the ``AsyncRouteId``.
    """

    url: str = "$request.body#/callbackUrl"
    method: str = "POST"
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    send_result: bool = False
    event_name: str | None = None

    def __post_init__(self) -> None:
        validation.check_url("Callback(url=…)", self.url)
        validation.check_term("Callback(method=…)", self.method, validation.method_of)
        term = "Callback(content_type=…)"
        validation.check_term(term, self.content_type, validation.content_type_of)
        label = "Callback(headers=…)"
        if not isinstance(self.headers, Mapping):
            raise ConfigurationError(
                f"{label} must be a mapping of header names to values, not {self.headers!r}."
            )
        for name, value in self.headers.items():
            validation.check_header_name(f"a name in {label}", name)
            term = f"Callback(headers={{{name!r}: …}})"
            validation.check_term(term, value, validation.header_value)
        if len({name.lower() for name in self.headers}) < len(self.headers):
            problem = "has a name twice, in different letter case; remove one"
            raise ConfigurationError(f"{label} {problem}.")
        boolean("Callback(send_result=…)", self.send_result)
        optional(text)("Callback(event_name=…)", self.event_name)

    @property
    def url_field(self) -> str:
        """The declared URL without its query, which can contain a secret."""
        return self.url if expressions.parse(self.url).is_alone else self.url.partition("?")[0]

    @property
    def is_trusted(self) -> bool:
        """Whether the developer chose the host: no expression comes before or inside the host."""
        template = expressions.parse(self.url)
        return template.is_literal or validation.has_authority(template)

    @property
    def literal_headers(self) -> dict[str, str]:
        """The headers without expressions. Only these can be sent again, because stored headers are
        deleted after the last attempt.
        """
        headers = self.headers.items()
        return {name: value for name, value in headers if expressions.parse(value).is_literal}


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """The callback of one task, with all expressions resolved.

    :param webhook_id: the ``webhook-id`` header of all attempts.
    :param url: the absolute URL, normalized by `parse_url`; ``host`` is its host.
    :param is_trusted: whether the developer chose the host.
    :param headers: deleted after the last attempt, because they can contain secrets.
    :param depth: 1 plus the number of callbacks that led to the task's request.
    """

    webhook_id: str
    url: str
    host: str
    method: str
    content_type: str
    headers: dict[str, str]
    event_name: str
    send_result: bool
    is_trusted: bool
    depth: int


class Shown(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """The part of a callback that clients see.

    :param url_field: the declared URL, without its query.
    :param url: the resolved URL, without its query.
    :param header_fields: the header names.
    """

    url_field: str
    method: str
    content_type: str
    send_result: bool
    event_name: str
    header_fields: list[str]
    url: str

    def settings(self) -> dict[str, Any]:
        """Return the task object's ``CallbackSettings``."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        del found["Url"]
        return found
