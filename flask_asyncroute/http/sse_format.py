"""Encode server-sent events and their ids.

An id contains the number that the store has given to a change, and a hash of the task id. The id is
encrypted, so that clients cannot see how busy the app is. With a synthetic IV (RFC 5297), an event
always has the same id.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode

from ..encoding import encode_json
from ..stores.base import PROGRESS, STATE, Event
from ..task import AsyncRouteTask

_CONTENT = struct.Struct(">Q8s")
_TAG_SIZE = 8
_SIZE = _CONTENT.size + _TAG_SIZE
_TAG, _HIDE, _TASK = (f"asyncroute {use}".encode() for use in ("tag", "hide", "task"))
_LENGTH = _SIZE * 4 // 3

COMPLETED = "task.completed"
HEARTBEAT = b":\n\n"


class EventIds:
    """Encrypts and decrypts the ids of server-sent events.

    :param key: a secret that all processes share.
    """

    def __init__(self, key: bytes) -> None:
        self.key = key

    def seal(self, change: int, task_id: str) -> str:
        content = _CONTENT.pack(change, self._digest(_TASK, task_id.encode(), 8))
        tag = self._digest(_TAG, content, _TAG_SIZE)
        return urlsafe_b64encode(tag + self._masked(content, tag)).decode()

    def open(self, event_id: str, task_id: str | None = None) -> int | None:
        """Decrypt an event id and return the number of the change in the store.

        :param task_id: the task to which the id must belong; None: any task.
        :return: None if the id is invalid or belongs to another task.
        """
        if len(event_id) != _LENGTH or not event_id.isascii():
            return None
        try:
            data = urlsafe_b64decode(event_id)
        except ValueError:
            return None
        tag = data[:_TAG_SIZE]
        content = self._masked(data[_TAG_SIZE:], tag)
        expected = self._digest(_TAG, content, _TAG_SIZE)
        if len(data) != _SIZE or not hmac.compare_digest(tag, expected):
            return None
        change, of_task = _CONTENT.unpack(content)
        if task_id is not None and of_task != self._digest(_TASK, task_id.encode(), 8):
            return None
        return int(change)

    def _masked(self, content: bytes, tag: bytes) -> bytes:
        mask = self._digest(_HIDE, tag, _CONTENT.size)
        return bytes(a ^ b for a, b in zip(content, mask, strict=False))

    def _digest(self, use: bytes, data: bytes, size: int) -> bytes:
        return hashlib.blake2b(data, digest_size=size, key=self.key, person=use).digest()


def frame(event: Event, ids: EventIds) -> bytes:
    """Encode an event in the format of server-sent events."""
    # Progress has no id, because a client that resumes does not need all of it.
    if event.name == PROGRESS:
        wire = event.task.to_wire()
        names = ("Id", "Progress", "ProgressMessage")
        return _frame(PROGRESS, encode_json({name: wire[name] for name in names if name in wire}))
    event_id = ids.seal(event.change, event.task.id)
    if event.data is not None:
        return _frame(event.name, event.data, event_id)
    name = COMPLETED if event.task.state.is_terminal else STATE
    return _frame(name, encode_json(event.task.to_wire()), event_id)


def present(task: AsyncRouteTask) -> bytes:
    """Encode the first event of a stream: the task without its result. This event has no id."""
    wire = task.to_wire()
    wire.pop("Result", None)
    return _frame(STATE, encode_json(wire))


def position(change: int, ids: EventIds) -> bytes:
    """Encode a block that contains only an id. A client can resume the stream from this id.

    :param change: the number of the last change that the client need not receive.
    """
    # The id contains a random task id, because equal ids would reveal that no task has changed.
    return b"id: %s\n\n" % ids.seal(change, secrets.token_hex(8)).encode()


def retry(milliseconds: int) -> bytes:
    """Encode how long the client waits before it reconnects."""
    return b"retry: %d\n\n" % milliseconds


def _frame(name: str, data: bytes, event_id: str | None = None) -> bytes:
    head = b"" if event_id is None else b"id: %s\n" % event_id.encode()
    return head + b"event: %s\ndata: %s\n\n" % (name.encode(), data)
