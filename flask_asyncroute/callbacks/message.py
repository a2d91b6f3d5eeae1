"""What a callback says: the body of its request, in JSON, XML or YAML."""

from __future__ import annotations

from typing import Any

import msgspec

from ..delivery import Delivery
from ..encoding import encode_json, encode_xml, encode_yaml
from ..states import State
from ..task import AsyncRouteTask


def body_of(task: AsyncRouteTask, delivery: Delivery) -> bytes:
    """Return the message about a finished task, encoded.

    ``Result`` is there where the callback asked for it and the view returned something, ``Error`` where the task failed
    or was aborted.
    """
    document: dict[str, Any] = {
        "Id": task.id,
        "Url": task.url,
        "Method": task.method,
        "EventName": delivery.event_name,
        "State": task.state.value,
    }
    is_json = delivery.content_type == "application/json"
    if task.state is not State.COMPLETED:
        document["Error"] = task.error or ""
    elif delivery.send_result and task.result_json is not None:
        document["Result"] = msgspec.Raw(task.result_json) if is_json else task.result
    if is_json:
        return encode_json(document)
    return encode_xml(document, "Callback") if delivery.content_type == "application/xml" else encode_yaml(document)
