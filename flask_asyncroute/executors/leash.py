"""The leash of a process group: a pipe that kills it when it is pulled, or when the process that holds it is gone.

The kernel does it, by SIGIO made a SIGKILL, whatever the group is doing; and it knows the group itself, not a number
that could be another's by now. Linux only.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import threading
import weakref
from contextlib import suppress

_held: weakref.WeakSet[Leash] = weakref.WeakSet()


class Leash:
    """The end that is held. ``other_end`` goes to the process that is on it, and is closed here then.

    Thread-safe. Closing it is pulling it.
    """

    def __init__(self) -> None:
        self.other_end, self._end = os.pipe()
        self._lock = threading.Lock()
        self._is_open = True
        _held.add(self)

    def pull(self) -> None:
        """Kill whoever is on it. Called again, or too late, it does nothing."""
        with self._lock:
            if self._is_open:
                with suppress(BrokenPipeError):
                    os.write(self._end, b"!")

    def close(self) -> None:
        """Let go."""
        with self._lock:
            if self._is_open:
                self._is_open = False
                os.close(self._end)


def put_on(other_end: int, owner: int) -> None:
    """Put a process on a leash, or a process group (its number negative), as `fcntl(2)` has it for F_SETOWN.

    It stays on it as long as anybody has ``other_end`` open.
    """
    fcntl.fcntl(other_end, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(other_end, fcntl.F_SETOWN, owner)
    fcntl.fcntl(other_end, fcntl.F_SETFL, fcntl.fcntl(other_end, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(other_end, select.POLLIN)
    if poll.poll(0):
        # It was pulled before.
        os.kill(owner, signal.SIGKILL)


def _let_go() -> None:
    """A forked copy of the process holds no leashes: the children are the parent's, and go with it."""
    for leash in list(_held):
        if leash._is_open:
            with suppress(OSError):
                os.close(leash._end)
        leash._is_open = False
        leash._lock = threading.Lock()


os.register_at_fork(after_in_child=_let_go)
