"""The fork server: a program that imports the app's module once and then forks child processes.

It runs in a new interpreter with one thread, so that children inherit no locks, connections or
signal handlers of the web server. It must not use the app.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import logging
import os
import select
import signal
import socket
import stat
import struct
import sys
import threading
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

from . import kill_pipe

logger = logging.getLogger("flask_asyncroute")

# With -c, child processes have no `__main__` module to import again.
PROGRAM = (
    "import sys; sys.path[:] = sys.argv[4:]; "
    "from flask_asyncroute.executors.process.forkserver import main; "
    "main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
)
"""The program text for ``python -c``."""

DESCRIPTORS = 3  # received with each request for a child
STATUS = struct.Struct("!i")
CHILD = "flask_asyncroute.child_main"

# Saved: the app can patch them.
_poll, _fork, _recv_fds = select.poll, os.fork, socket.recv_fds


def command(modules: str, control: int, kill_end: int) -> list[str]:
    """Return the arguments with which a new Python interpreter calls :func:`main`."""
    return ["-c", PROGRAM, modules, str(control), str(kill_end), *sys.path]


def main(modules: str, control: int, kill_end: int) -> None:
    """Fork child processes for the parent process until it closes the connection.

    :param modules: comma-separated modules to import first. The last is the app's module, or empty.
    :param control: the descriptor on which the parent requests children.
    :param kill_end: the read end of the pipe with which the parent kills this process; see
        `kill_pipe`.
    """
    kill_pipe.attach(kill_end, os.getpid())
    for descriptor in (control, kill_end):
        os.set_inheritable(descriptor, False)
    ours, _, app = modules.rpartition(",")
    for module in ours.split(","):
        import_module(module)
    child = import_module(CHILD)
    child.be_child_process()
    if app:
        before = _descriptors()
        try:
            with child.app_loader.without_servers():
                import_module(app)
        except BaseException as error:
            # The import also fails in each child, whose task reports the error.
            logger.warning(
                "The fork server could not import the app, so each child process imports it: %r",
                error,
            )
        # A store that the app opened for `async_routes.state` must not cause a restart.
        child.close_early_stores()
        if threading.active_count() > 1 or any(map(_is_unsafe_to_share, _descriptors() - before)):
            _restart_without_app(ours, control, kill_end)
    gc.collect()
    gc.freeze()
    _Server(socket.socket(fileno=control), kill_end).serve()


def _descriptors() -> set[int]:
    listed = os.listdir("/proc/self/fd")
    # Leave out the closed descriptor of listdir().
    return {int(name) for name in listed if os.path.exists(f"/proc/self/fd/{name}")}


def _is_unsafe_to_share(descriptor: int) -> bool:
    # Child processes can share log files and devices, but not connections.
    kind = os.fstat(descriptor).st_mode
    access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    is_log = stat.S_ISREG(kind) and access == os.O_WRONLY
    return not stat.S_ISCHR(kind) and not is_log


def _restart_without_app(ours: str, control: int, kill_end: int) -> None:
    # A fork of a process with threads can copy a lock that is never released. Children with a
    # shared connection would read each other's responses.
    logger.warning(
        "The app starts threads or opens files or connections at import, so each child process "
        "must import the app again, and tasks start more slowly."
    )
    for descriptor in (control, kill_end):
        os.set_inheritable(descriptor, True)
    os.execv(sys.executable, [sys.executable, *command(f"{ours},", control, kill_end)])


class _Server:
    """Forks child processes and reports their exit statuses to the parent process.

    For each child, the parent sends three descriptors to ``control``: the child's socket, the read
    end of its kill pipe, and a socket for its exit status.
    """

    def __init__(self, control: socket.socket, kill_end: int) -> None:
        self._control = control
        self._kill_end = kill_end
        self._children: dict[int, list[int]] = {}

    def serve(self) -> None:
        """Fork children until the parent closes ``control``. Return after the last child's end."""
        woken, wake = os.pipe()
        for end in (woken, wake):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        poll = _poll()
        poll.register(self._control, select.POLLIN)
        poll.register(woken, select.POLLIN)
        is_open = True
        while is_open or self._children:
            ready = [descriptor for descriptor, _ in poll.poll()]
            if woken in ready:
                os.read(woken, 4096)
                self._reap_children()
            if self._control.fileno() in ready:
                data, descriptors, _, _ = _recv_fds(self._control, 1, DESCRIPTORS)
                if data:
                    self._start(descriptors)
                else:
                    is_open = False
                    poll.unregister(self._control)

    def _start(self, descriptors: list[int]) -> None:
        # If this fails, closing the descriptors informs the parent.
        try:
            if len(descriptors) < DESCRIPTORS:
                raise OSError("this process has no free descriptors")
            pid = _fork()
        except OSError as error:
            logger.error("A child process could not be started: %s", error)
            _close(descriptors)
            return
        if pid == 0:
            self._become_child(*descriptors)
        os.close(descriptors[0])
        self._children[pid] = descriptors[1:]

    def _become_child(self, task: int, kill_end: int, status: int) -> NoReturn:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            kill_pipe.attach(kill_end, -os.getpid())
            self._control.close()
            _close([status, self._kill_end])
            for descriptors in self._children.values():
                _close(descriptors)
            channel = socket.socket(fileno=task)
            # Under gevent, the parent has made both ends non-blocking.
            channel.setblocking(True)
            import_module(CHILD).main(channel)
            # Exit as the interpreter does, but do not free objects: that can take longer than
            # the task.
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            code = 0
        except BaseException:
            logger.exception("An error was raised during the exit of a child process.")
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            os._exit(code)

    def _reap_children(self) -> None:
        # Report the exit statuses, and kill the rest of the process groups.
        while self._children:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return
            descriptors = self._children.pop(ended.si_pid, [])
            if descriptors:
                # Before waitpid(), no other process or group can get this id.
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(ended.si_pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(ended.si_pid, 0)[1])
            if descriptors:
                with suppress(OSError):
                    os.write(descriptors[1], STATUS.pack(status))
                _close(descriptors)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
