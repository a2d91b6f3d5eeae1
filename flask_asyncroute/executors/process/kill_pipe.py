"""A pipe that kills a process or process group. Linux only.

It kills when data is written to the pipe, or when the process with the write end exits.
"""

# The kernel sends SIGKILL instead of SIGIO. It never kills a later group with the same id.

from __future__ import annotations

import fcntl
import os
import select
import signal
import threading
import weakref
from collections.abc import Iterable
from contextlib import suppress

_open: weakref.WeakSet[KillPipe] = weakref.WeakSet()


class KillPipe:
    """The write end of a new pipe, with which this process kills another. Thread-safe.

    The caller must send ``read_end`` to the other process, and then close ``read_end`` here.
    """

    def __init__(self) -> None:
        self.read_end, self._write_end = os.pipe()
        self._lock = threading.Lock()
        self._is_open = True
        _open.add(self)

    def kill(self) -> None:
        """Kill the process or process group that was passed to :func:`attach`, if it is running."""
        with self._lock:
            if self._is_open:
                with suppress(BrokenPipeError):
                    os.write(self._write_end, b"!")

    def close(self) -> None:
        """Close the write end. This also kills the process or process group."""
        with self._lock:
            if self._is_open:
                self._is_open = False
                os.close(self._write_end)


def attach(read_end: int, owner: int) -> None:
    """Make a pipe kill a process when data is written to the pipe or its write end is closed.

    This lasts while any process has ``read_end`` open.

    :param owner: a process id, or the negative id of a process group (F_SETOWN in `fcntl(2)`).
    """
    fcntl.fcntl(read_end, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(read_end, fcntl.F_SETOWN, owner)
    fcntl.fcntl(read_end, fcntl.F_SETFL, fcntl.fcntl(read_end, fcntl.F_GETFL) | os.O_ASYNC)
    if readable([read_end], 0):
        os.kill(owner, signal.SIGKILL)  # the pipe was already written to or closed


def readable(descriptors: Iterable[int], seconds: float | None) -> list[int]:
    """Return the descriptors that have data or whose other end is closed. Wait until there is one.

    :param seconds: timeout, after which the list is empty; None: no limit.
    """
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [found for found, _ in poll.poll(None if seconds is None else seconds * 1000)]


def _close_in_fork() -> None:
    # Otherwise a fork of this process would keep the children alive after this process has exited.
    for pipe in list(_open):
        pipe._lock = threading.Lock()
        with suppress(OSError):
            pipe.close()


os.register_at_fork(after_in_child=_close_in_fork)
