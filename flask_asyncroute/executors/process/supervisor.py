"""Start child processes through a fork server, and supervise them.

Each child has its own sockets and kill pipe, so it cannot harm other children.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.spawn import get_executable
from pathlib import Path

import msgspec

from ...background import when_gone
from ...snapshot import Body
from ..base import ChildSettings
from . import forkserver, protocol
from .kill_pipe import KillPipe, attach, readable

LOST_SECONDS = 2.0
"""Seconds to wait for the exit status of a child that was killed before it sent anything."""


@dataclass(eq=False)
class Child:
    """A child process that runs one task. Only :meth:`kill` is thread-safe."""

    channel: socket.socket
    exit_socket: socket.socket
    kill_pipe: KillPipe
    limits: Mapping[bytes, int]  # in bytes, by kind of frame
    resources: ExitStack  # closes the sockets and the kill pipe
    status: int | None = None  # from `os.waitstatus_to_exitcode`; None: unknown
    has_ended: bool = False

    def send(self, job: protocol.Job, body: Body | None) -> None:
        """Send the task that the child must run. Raises no error if the child has ended."""
        # listen() reports the end of the child.
        with suppress(OSError):
            protocol.send(self.channel, protocol.JOB, msgspec.json.encode(job))
            for piece in () if body is None else body.pieces():
                protocol.send(self.channel, protocol.BODY, piece)

    def listen(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the kind and the payload of each message from the child until the child ends.

        :raises FrameError: if the child sends invalid data.
        """
        has_begun = False
        for frame in protocol.frames(self._pieces(), self.limits):
            has_begun = True
            yield frame
        # A fork server that hangs while it imports the app has forked no child.
        self.is_gone(None if has_begun else LOST_SECONDS)
        self.has_ended = True

    def _pieces(self) -> Iterator[bytes]:
        channel, exit_socket = self.channel.fileno(), self.exit_socket.fileno()
        while True:
            if channel not in readable([channel, exit_socket], None):
                # The child has ended, and all its data was read.
                if self._read_status():
                    return
                # Without a status, the fork server has exited, but the child can still be running.
                readable([channel], None)
            data = protocol.receive(self.channel)
            if not data:
                return
            yield data

    def kill(self) -> None:
        """Kill the child and its process group. Messages that were not read yet are lost."""
        self.kill_pipe.kill()
        with suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)

    def is_gone(self, seconds: float | None = 0) -> bool:
        """Wait until the child has ended; return False if it is still running after ``seconds``.

        :param seconds: timeout; None: no limit.
        """
        if not self.has_ended and readable([self.exit_socket.fileno()], seconds):
            self._read_status()
            self.has_ended = True
        return self.has_ended

    def leave(self, seconds: float) -> None:
        """Wait up to ``seconds`` for the child's end, then kill it. Close its sockets and pipe."""
        if not self.is_gone(seconds):
            self.kill()
            self.is_gone(None)
        self.drop()

    def drop(self) -> None:
        """Kill the child if it is still running. Close its sockets and pipe."""
        self.resources.close()

    def _read_status(self) -> bool:
        data = protocol.receive(self.exit_socket)
        if len(data) == forkserver.STATUS.size:
            (self.status,) = forkserver.STATUS.unpack(data)
        return self.status is not None


class ForkServer:
    """Starts child processes by requests to a fork server process. Thread-safe.

    The server process starts before the first child. It exits after its last child if this object
    is closed or garbage-collected. It is killed if this process exits.
    """

    def __init__(self, settings: ChildSettings) -> None:
        app_module = settings.app.partition(":")[0]
        self._modules = ",".join((forkserver.CHILD, *settings.modules, app_module))
        self._settings = msgspec.json.encode(settings)
        self._limits = protocol.TO_PARENT | {protocol.OUTCOME: protocol.SMALL + settings.max_result}
        self._lock = threading.RLock()
        self._control: socket.socket | None = None
        self._end: Callable[[], object] | None = None
        self.pid = 0

    def start(self) -> Child:
        """Start a child process. Return at once, before the child has loaded the app.

        :raises OSError: if the system lacks processes or descriptors.
        """
        with ExitStack() as ours, ExitStack() as theirs:
            channel, their_channel = _socket_pair(ours, theirs)
            exit_socket, their_exit_socket = _socket_pair(ours, theirs)
            kill_pipe = _kill_pipe(ours, theirs)
            ends = [their_channel.fileno(), kill_pipe.read_end, their_exit_socket.fileno()]
            self._request(ends)
            with suppress(OSError):
                protocol.send(channel, protocol.SETTINGS, self._settings)
            return Child(channel, exit_socket, kill_pipe, self._limits, ours.pop_all())

    def close(self) -> None:
        """Make the server process exit after its last child.

        A later :meth:`start` creates a new server.
        """
        with self._lock:
            self._control = None
            if self._end is not None:
                self._end()

    def _request(self, descriptors: list[int]) -> None:
        with self._lock:
            if self._control is not None:
                try:
                    socket.send_fds(self._control, [b"+"], descriptors)
                    return
                except OSError:
                    # The server was killed; its children exit by themselves.
                    self.close()
            self._control, self.pid, resources = _start_server(self._modules)
            self._end = when_gone(self, _end_server, self._control, self.pid, resources)
            socket.send_fds(self._control, [b"+"], descriptors)


def _start_server(modules: str) -> tuple[socket.socket, int, ExitStack]:
    """Start the fork server program. Return its socket, its pid and the resources to close.

    :param modules: the first argument of `forkserver.main`.
    """
    with ExitStack() as ours, ExitStack() as theirs:
        control, their_control = _socket_pair(ours, theirs, socket.SOCK_SEQPACKET)
        ends = (their_control.fileno(), _kill_pipe(ours, theirs).read_end)
        # Use new numbers: dup2() to the same number would leave close-on-exec set.
        numbers = (max(ends) + 1, max(ends) + 2)
        executable = _python_executable()
        pid = os.posix_spawn(
            executable,
            [executable, *forkserver.command(modules, *numbers)],
            os.environ,
            file_actions=[
                *((os.POSIX_SPAWN_DUP2, *pair) for pair in zip(ends, numbers, strict=True)),
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            ],
            setsid=True,  # so that Ctrl-C in the terminal does not interrupt its imports
            setsigmask=(),
            setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
        )
        # The program also does this itself, but only after its interpreter has started.
        attach(ends[1], pid)
        return control, pid, ours.pop_all()


def _end_server(control: socket.socket, pid: int, resources: ExitStack) -> None:
    with suppress(OSError):
        control.shutdown(socket.SHUT_WR)
        control.recv(1)
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)
    resources.close()


def _socket_pair(
    ours: ExitStack, theirs: ExitStack, kind: int = socket.SOCK_STREAM
) -> tuple[socket.socket, socket.socket]:
    mine, other = socket.socketpair(socket.AF_UNIX, kind)
    return ours.enter_context(mine), theirs.enter_context(other)


def _kill_pipe(ours: ExitStack, theirs: ExitStack) -> KillPipe:
    pipe = KillPipe()
    ours.callback(pipe.close)
    theirs.callback(os.close, pipe.read_end)
    return pipe


def _python_executable() -> str:
    # In servers that embed Python, such as uWSGI, get_executable() returns the server, or an
    # interpreter outside the virtual environment.
    named = os.fsdecode(get_executable())
    found = Path(sys.prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    return str(found) if found.exists() and Path(named).parent != found.parent else named
