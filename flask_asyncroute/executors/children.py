"""Children of this process: started through a fork server, heard through a socket, killed by a leash.

`spares` and `processes` use them. Whatever a child does harms nobody else: each has a socket, a leash and a pipe for its
exit status of its own.
"""

from __future__ import annotations

import _thread
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.spawn import get_executable
from pathlib import Path
from typing import Any

import msgspec

from ..finalizers import when_gone
from ..snapshot import Body
from . import forkserver, frames
from .frames import FrameReader
from .leash import Leash, put_on

LOST_SECONDS = 2.0
"""How long after its kill a child is waited for that has never said anything."""


class Child:
    """A child that was asked for. One thread at a time; :meth:`kill` may be called from any.

    :param channel: the socket on which it is told and heard.
    :param status_end: where its exit status will come, with the end of the process.
    :param limits: the most bytes of each kind of frame that are taken from it.
    :param held: closes these three.
    """

    def __init__(
        self,
        channel: socket.socket,
        leash: Leash,
        status_end: int,
        limits: Mapping[bytes, int],
        held: ExitStack,
    ) -> None:
        self._channel = channel
        self._leash = leash
        self._status_end = status_end
        self._limits = limits
        self._held = held
        self._is_gone = False
        self._has_begun = False
        self.status: int | None = None
        """How it ended, as :func:`os.waitstatus_to_exitcode` gives it; None before, and where nobody learned of it."""

    def send(self, job: frames.Job, body: Body | None) -> None:
        """Tell it what to run. One that has ended by now is not told; :meth:`listen` tells why."""
        with suppress(OSError):
            frames.send(self._channel, frames.JOB, msgspec.json.encode(job))
            for piece in () if body is None else body.pieces():
                frames.send(self._channel, frames.BODY, piece)

    def listen(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield what it sends, and return when it is gone.

        :raises FrameError: where it sent something else than frames.
        """
        reader = FrameReader(self._limits)
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        poll.register(self._status_end, select.POLLIN)
        is_open = has_status = True
        while is_open or has_status:
            # A fork server that hangs, since importing the app does, has not forked yet what was to be killed.
            is_waited_for = is_open or self._has_begun
            ready = {descriptor for descriptor, _ in poll.poll(None if is_waited_for else LOST_SECONDS * 1000)}
            if not ready:
                break
            if self._channel.fileno() in ready:
                data = self._receive()
                if data:
                    self._has_begun = True
                    yield from reader.feed(data)
                    continue
                is_open = False
                poll.unregister(self._channel)
            elif self._status_end in ready:
                # After all that it had sent. Without a status the fork server is gone, and the child may live on.
                has_status = False
                self._take_status()
                if self.status is not None:
                    break
                poll.unregister(self._status_end)
        self._is_gone = True

    def kill(self) -> None:
        """Kill it and its process group, if it is there, and hear no more of it."""
        self._leash.pull()
        with suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)

    def is_gone(self, seconds: float | None = 0) -> bool:
        """Wait until it is gone, at most so long (None: as long as it takes); return whether it is."""
        if not self._is_gone:
            poll = select.poll()
            poll.register(self._status_end, select.POLLIN)
            if poll.poll(None if seconds is None else seconds * 1000):
                self._take_status()
                self._is_gone = True
        return self._is_gone

    def leave(self, seconds: float) -> None:
        """Wait until it has ended, kill it where that takes longer than ``seconds``, and let go of it."""
        if not self.is_gone(seconds):
            self.kill()
            self.is_gone(None)
        self.drop()

    def drop(self) -> None:
        """Let go of it: kill it if it is there, and close what was held of it."""
        self._held.close()

    def _receive(self) -> bytes:
        try:
            return self._channel.recv(frames.PIECE)
        except OSError:
            return b""

    def _take_status(self) -> None:
        data = os.read(self._status_end, forkserver.STATUS.size)
        if len(data) == forkserver.STATUS.size:
            (self.status,) = forkserver.STATUS.unpack(data)


class ForkServer:
    """Starts children of this process, through a fork server that begins with the first. Thread-safe.

    It goes when this object does, after its last child; or at once with this process.

    :param app: from where a child loads the app, see `app_path`.
    :param values: those of the configuration that a child takes over, and the keys that it keeps.
    :param max_result: bytes of a result that a child may send.
    :param modules: what children need beside the app.
    """

    def __init__(
        self, app: str, values: tuple[dict[str, Any], list[str]], max_result: int, modules: Sequence[str] = ()
    ) -> None:
        self._modules = (forkserver.CHILD, *modules, app.partition(":")[0])
        self._settings = msgspec.json.encode(frames.Settings(app, *values))
        self._limits = {
            frames.READY: frames.SMALL_FRAME,
            frames.PROGRESS: frames.SMALL_FRAME,
            frames.EVENT: frames.EVENT_FRAME,
            frames.OUTCOME: max_result + frames.SMALL_FRAME,
        }
        self._lock = threading.Lock()
        self._process: _ServerProcess | None = None

    def start(self) -> Child:
        """Ask for a child and return it at once; it loads the app and waits for a job.

        :raises OSError: where the system has no more processes or descriptors.
        """
        with ExitStack() as theirs, ExitStack() as ours:
            channel, their_channel = socket.socketpair()
            theirs.callback(their_channel.close)
            ours.callback(channel.close)
            leash = Leash()
            theirs.callback(os.close, leash.other_end)
            ours.callback(leash.close)
            status_end, their_status_end = os.pipe()
            theirs.callback(os.close, their_status_end)
            ours.callback(os.close, status_end)
            self._ask([their_channel.fileno(), leash.other_end, their_status_end])
            with suppress(OSError):
                frames.send(channel, frames.SETTINGS, self._settings)
            return Child(channel, leash, status_end, self._limits, ours.pop_all())

    def close(self) -> None:
        """Have the fork server end; children that run go on, and one that is asked for after this has a new server."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.close()

    def _ask(self, descriptors: list[int]) -> None:
        with self._lock:
            if self._process is not None:
                try:
                    self._process.ask(descriptors)
                    return
                except OSError:
                    # It was killed. Its children end by themselves; there is a new one for what comes now.
                    self._process.close()
            self._process = _ServerProcess(self._modules)
            when_gone(self, self._process.close)
            self._process.ask(descriptors)


def _python() -> str:
    """Return the interpreter of the environment that this process uses.

    A server that embeds Python, as uWSGI does, gives its own name for it, or that outside the virtual environment.
    """
    named = os.fsdecode(get_executable())
    found = Path(sys.prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    return str(found) if found.exists() and Path(named).parent != found.parent else named


class _ServerProcess:
    """One run of the program `forkserver`."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._is_closed = False
        executable = _python()
        with ExitStack() as theirs, ExitStack() as ours:
            self._control, control_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            theirs.callback(control_end.close)
            ours.callback(self._control.close)
            self._leash = Leash()
            theirs.callback(os.close, self._leash.other_end)
            ours.callback(self._leash.close)
            ends = (control_end.fileno(), self._leash.other_end)
            # Numbers that are neither's, since a descriptor that is copied to its own number would not be handed on.
            numbers = (max(ends) + 1, max(ends) + 2)
            self._pid = os.posix_spawn(
                executable,
                [executable, "-c", forkserver.PROGRAM, ",".join(modules), *map(str, numbers), *sys.path],
                os.environ,
                file_actions=[
                    *((os.POSIX_SPAWN_DUP2, end, number) for end, number in zip(ends, numbers, strict=True)),
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                ],
                setsigmask=(),
                setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
            )
            # Not left to the program: an interpreter takes its time to begin, and this process may be killed meanwhile.
            put_on(self._leash.other_end, self._pid)
            self._held = ours.pop_all()

    def ask(self, descriptors: list[int]) -> None:
        """Have it fork a child that gets these.

        :raises OSError: where it is gone.
        """
        socket.send_fds(self._control, [b"+"], descriptors)

    def close(self) -> None:
        """Have it end after its last child, and see to that on a thread of its own."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        _thread.start_new_thread(self._reap, ())

    def _reap(self) -> None:
        with suppress(OSError):
            self._control.recv(1)
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)
        self._held.close()
