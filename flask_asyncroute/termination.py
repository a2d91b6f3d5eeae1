"""Whether the server is about to end this process, before it does.

A worker of gunicorn lets the requests that it serves come to their end, for up to half a minute, and only then exits; what
would hold it up must learn of that earlier. `extension` asks for it from where the worker is ready to serve.
"""

from __future__ import annotations

import _thread
import signal
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

_SIGNALS = ("SIGTERM", "SIGINT", "SIGQUIT", "SIGABRT")
_workers: list[weakref.ref[Any]] = []


def is_near() -> bool:
    """Return whether a gunicorn worker in this process has decided to end, by a signal or after ``max_requests``."""
    return any(not getattr(worker(), "alive", True) for worker in _workers)


def notice(then: Callable[[], None]) -> None:
    """Have ``then`` called, in a thread of its own, when a gunicorn worker in this process is told to end.

    Works where gunicorn has put its handlers already, and only in the main thread; elsewhere it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for name in _SIGNALS:
        number = getattr(signal, name, None)
        handler = None if number is None else signal.getsignal(number)
        worker = getattr(handler, "__self__", None)
        if number is None or not callable(handler) or not hasattr(worker, "alive"):
            continue
        if not any(known() is worker for known in _workers):
            _workers.append(weakref.ref(worker))
        signal.signal(number, _chained(handler, then))


def _chained(handler: Callable[[int, FrameType | None], Any], then: Callable[[], None]) -> Callable[..., Any]:
    def handle(number: int, frame: FrameType | None) -> Any:
        # Not here: a handler runs between two steps of whatever the main thread does, with the locks that it holds.
        # And not by threading.Thread, whose start takes a lock that all share.
        # Where there is no room for it, the worker's own handler must run all the same.
        with suppress(RuntimeError):
            _thread.start_new_thread(then, ())
        return handler(number, frame)

    return handle
