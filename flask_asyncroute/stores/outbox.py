"""The port of the outbox: which callbacks are to be sent, and which process is at one. Part of each store, see `base`.

A row is stored with its task, becomes due in the same transaction in which the task ends, and leaves with the task.
"""

from __future__ import annotations

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
