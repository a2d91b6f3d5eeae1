"""Events as they are written to a stream (WHATWG HTML, section 9.2, "Server-sent events")."""

from __future__ import annotations

import secrets

from ..encoding import encode_json
from ..stores.events import PROGRESS, STATE, Event
from ..task import AsyncRouteTask
from .event_ids import EventIds

COMPLETED = "task.completed"
HEARTBEAT = b":\n\n"


def frame(event: Event, ids: EventIds) -> bytes:
    """Return an event as a stream has it, with its id; progress has none, since what is left out of it is no loss."""
    if event.name == PROGRESS:
        return _frame(PROGRESS, _progress(event.task))
    event_id = ids.seal(event.change, event.task.id)
    if event.data is not None:
        return _frame(event.name, event.data, event_id)
    name = COMPLETED if event.task.state.is_terminal else STATE
    return _frame(name, encode_json(event.task.to_wire()), event_id)


def present(task: AsyncRouteTask) -> bytes:
    """Return what a stream begins with: the task as it is, without its result and without an id."""
    wire = task.to_wire()
    wire.pop("Result", None)
    return _frame(STATE, encode_json(wire))


def position(change: int, ids: EventIds) -> bytes:
    """Return what gives a client the id of what comes next and nothing else: a block without data is no event.

    Another one each time, so that two that are alike do not tell that nobody has done anything in between.
    """
    return b"id: %s\n\n" % ids.seal(change, secrets.token_hex(8)).encode()


def retry(milliseconds: int) -> bytes:
    """Return what tells a client when to come back once the stream has ended."""
    return b"retry: %d\n\n" % milliseconds


def _progress(task: AsyncRouteTask) -> bytes:
    wire = task.to_wire()
    return encode_json({name: wire[name] for name in ("Id", "Progress", "ProgressMessage") if name in wire})


def _frame(name: str, data: bytes, event_id: str | None = None) -> bytes:
    head = b"" if event_id is None else b"id: %s\n" % event_id.encode()
    return head + b"event: %s\ndata: %s\n\n" % (name.encode(), data)
