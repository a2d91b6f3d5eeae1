"""A callback that is to be sent, as a value: made when its task is started, kept by the store, sent when the task has ended."""

from __future__ import annotations

from typing import Any

import msgspec


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be sent about one task, and where to.

    :param webhook_id: the same at every attempt.
    :param url: absolute, as `web_address` writes it; ``host`` is its host.
    :param is_trusted: whether the developer alone said which host.
    :param headers: may hold secrets; nothing is left of them after the last attempt.
    :param depth: how many callbacks led to the task, this one included.
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
    """What clients see of a callback: nothing in it is a secret.

    :param url_field: the URL as the route has it, an address without its query.
    :param url: where it is sent, without its query.
    :param header_fields: the names alone.
    """

    url_field: str
    method: str
    content_type: str
    send_result: bool
    event_name: str
    header_fields: list[str]
    url: str

    def settings(self) -> dict[str, Any]:
        """Return ``CallbackSettings`` of the task object."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        del found["Url"]
        return found


NOT_STARTED = "NotStarted"
RUNNING = "Running"
COMPLETED = "Completed"
FAILED = "Failed"
PENDING = (NOT_STARTED, RUNNING)
"""States of a callback, and those in which it is yet to be sent."""
