"""A pipe that kills a process group when data is written to the pipe, or when the process with the
write end exits. Linux only.

The kernel sends SIGKILL instead of SIGIO, and never kills a later group with the same id.
"""

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
    """The write end of the pipe. The caller sends ``read_end`` to another process, then closes it.
    Thread-safe.
    """

    def __init__(self) -> None:
        self.read_end, self._write_end = os.pipe()
        self._lock = threading.Lock()
        self._is_open = True
        _open.add(self)

    def kill(self) -> None:
        """Kill the attached process or process group, if it is running."""
        with self._lock:
            if self._is_open:
                with suppress(BrokenPipeError):
                    os.write(self._write_end, b"!")

    def close(self) -> None:
        """Close the write end; this also kills the attached process or group."""
        with self._lock:
            if self._is_open:
                self._is_open = False
                os.close(self._write_end)


def attach(read_end: int, owner: int) -> None:
    """Have the pipe kill ``owner``, a process id or the negative id of a process group (F_SETOWN in
    `fcntl(2)`). The effect lasts while any process has ``read_end`` open.
    """
    fcntl.fcntl(read_end, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(read_end, fcntl.F_SETOWN, owner)
    fcntl.fcntl(read_end, fcntl.F_SETFL, fcntl.fcntl(read_end, fcntl.F_GETFL) | os.O_ASYNC)
    if readable([read_end], 0):
        os.kill(owner, signal.SIGKILL)  # the pipe was already written to or closed


def readable(descriptors: Iterable[int], seconds: float | None) -> list[int]:
    """Wait for descriptors that have data or whose other end is closed; return them.

    :param seconds: timeout (the list can then be empty); None: no limit.
    """
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [found for found, _ in poll.poll(None if seconds is None else seconds * 1000)]


def _close_in_fork() -> None:
    """Close the write ends in a fork of this process. Otherwise the fork would keep the children
    alive after this process has exited.
    """
    for pipe in list(_open):
        pipe._lock = threading.Lock()
        with suppress(OSError):
            pipe.close()


os.register_at_fork(after_in_child=_close_in_fork)
