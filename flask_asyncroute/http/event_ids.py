"""The ids of events: the number of a change and whose it is, sealed so that they say nothing to others.

A stream seals the number of each event and opens the ``Last-Event-ID`` that comes back. A synthetic-IV construction (as
RFC 5297 has it): the tag over the content is also what the content is hidden with, so the same event always has the same id.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode

_CONTENT = struct.Struct(">Q8s")
_TAG_SIZE = 8
_SIZE = _CONTENT.size + _TAG_SIZE
_TAG, _HIDE, _TASK = (f"asyncroute {use}".encode() for use in ("tag", "hide", "task"))
_LENGTH = _SIZE * 4 // 3


class EventIds:
    """Seals and opens ids with one key.

    :param key: secret, the same in all processes that may see the id again.
    """

    def __init__(self, key: bytes) -> None:
        self.key = key

    def seal(self, change: int, task_id: str) -> str:
        """Return the id of the event of a task with this change number."""
        content = _CONTENT.pack(change, self._digest(_TASK, task_id.encode(), 8))
        tag = self._digest(_TAG, content, _TAG_SIZE)
        return urlsafe_b64encode(tag + self._hidden(content, tag)).decode()

    def open(self, event_id: str, task_id: str | None = None) -> int | None:
        """Return the change number in an id; None for one that is not ours.

        :param task_id: whose it must be; None: any task's.
        """
        if len(event_id) != _LENGTH or not event_id.isascii():
            return None
        try:
            data = urlsafe_b64decode(event_id)
        except ValueError:
            return None
        tag = data[:_TAG_SIZE]
        content = self._hidden(data[_TAG_SIZE:], tag)
        if len(data) != _SIZE or not hmac.compare_digest(tag, self._digest(_TAG, content, _TAG_SIZE)):
            return None
        change, of_task = _CONTENT.unpack(content)
        if task_id is not None and of_task != self._digest(_TASK, task_id.encode(), 8):
            return None
        return int(change)

    def _hidden(self, content: bytes, tag: bytes) -> bytes:
        mask = self._digest(_HIDE, tag, _CONTENT.size)
        return bytes(a ^ b for a, b in zip(content, mask, strict=False))

    def _digest(self, use: bytes, data: bytes, size: int) -> bytes:
        return hashlib.blake2b(data, digest_size=size, key=self.key, person=use).digest()
