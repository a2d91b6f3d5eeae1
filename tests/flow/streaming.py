"""Reads streams of events as a client does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from flask.testing import FlaskClient
from werkzeug.test import TestResponse


@dataclass
class Message:
    """One event of a stream, as the WHATWG's rules read it."""

    name: str
    data: Any
    id: str | None = None


def messages(chunks: Iterable[bytes]) -> Iterator[Message]:
    """Yield the events of a stream as they come; comments and retry times are left out."""
    buffer = b""
    for chunk in chunks:
        buffer += chunk
        while b"\n\n" in buffer:
            block, _, buffer = buffer.partition(b"\n\n")
            fields: dict[str, str] = {}
            for line in block.decode().split("\n"):
                name, _, value = line.partition(": ")
                assert name not in fields or name == "", f"{name} twice in {block!r}"
                fields[name] = value
            if "data" in fields:
                yield Message(fields["event"], json.loads(fields["data"]), fields.get("id"))
    assert not buffer.strip(), f"the stream ended within an event: {buffer!r}"


def told(found: Iterable[Message]) -> list[str]:
    """Return each event in short: the state, or its name."""
    return [m.data["State"] if m.name in ("task.state", "task.completed") else m.name for m in found]


def opened(client: FlaskClient, path: str, last_id: str | None = None, **headers: str) -> TestResponse:
    """Ask for a stream, which is then read as it comes."""
    if last_id is not None:
        headers["Last-Event-ID"] = last_id
    answer = client.get(path, headers={"Accept": "text/event-stream", **headers}, buffered=False)
    return answer


def read(client: FlaskClient, path: str, last_id: str | None = None, **headers: str) -> list[Message]:
    """Return all events of a stream that ends."""
    answer = opened(client, path, last_id, **headers)
    assert answer.status_code == 200, answer.text
    assert answer.content_type == "text/event-stream"
    try:
        return list(messages(answer.iter_encoded()))
    finally:
        answer.close()
