"""The data types of callbacks.

A developer declares a `Callback`, a store keeps a `Delivery`, and clients see a `Shown`.
"""

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
    """A request that the server sends to report the outcome of a task.

    The URL, method, content type and header values can be OpenAPI runtime expressions, or contain
    expressions in braces. Expressions are resolved when the task is created.

    :param url: an absolute URL, or an expression that reads it from the task's request.
    :param method: the request method.
    :param content_type: the media type of the body: JSON, XML or YAML.
    :param headers: additional headers.
    :param send_result: whether the body contains the task's Result.
    :param event_name: the body's ``EventName``. The default is the ``AsyncRouteId``.
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
        """The declared URL without its query, because a query can contain a secret."""
        return self.url if expressions.parse(self.url).is_alone else self.url.partition("?")[0]

    @property
    def is_trusted(self) -> bool:
        """Whether the developer, not the client, chose the host of the URL."""
        # If an expression comes before or inside the host, the client can choose the host.
        template = expressions.parse(self.url)
        return template.is_literal or validation.has_authority(template)

    @property
    def literal_headers(self) -> dict[str, str]:
        """The headers whose values contain no expressions.

        The values of other headers are deleted after the last attempt, so they cannot be sent
        again.
        """
        headers = self.headers.items()
        return {name: value for name, value in headers if expressions.parse(value).is_literal}


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """The callback of one task, with all expressions resolved.

    :param webhook_id: the ``webhook-id`` header. It is the same in all attempts.
    :param url: the absolute URL, normalized by `parse_url`.
    :param host: the host of ``url``.
    :param is_trusted: whether the developer, not the client, chose the host.
    :param headers: deleted after the last attempt, because they can contain secrets.
    :param depth: the length of the chain of callbacks, including this one. It is 1 if no callback
        led to the task's request.
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
    """The parts of a callback that clients see in the task object.

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
        """Return the value of the ``CallbackSettings`` field in the task object."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        del found["Url"]
        return found
