"""The program of the fork server: a process that has imported the app's module, and forks a child whenever it is asked to.

`children` starts it, one for each process that has tasks to run so. It is a fresh interpreter with a single thread, so its
forks carry over no locks, connections or signal handlers of a web server. It must not use anything of the app.
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

from . import leash

logger = logging.getLogger("flask_asyncroute")

PROGRAM = (
    # As `leash.put_on` does it, and before anything is imported that takes time: the parent does so too, but may be killed
    # while it is still starting this process.
    "import fcntl, os, select, signal, sys; end = int(sys.argv[3]); "
    "fcntl.fcntl(end, fcntl.F_SETSIG, signal.SIGKILL); fcntl.fcntl(end, fcntl.F_SETOWN, os.getpid()); "
    "fcntl.fcntl(end, fcntl.F_SETFL, fcntl.fcntl(end, fcntl.F_GETFL) | os.O_ASYNC); "
    "select.select([end], [], [], 0)[0] and os.kill(os.getpid(), signal.SIGKILL); "
    "sys.path[:] = sys.argv[4:]; "
    "from flask_asyncroute.executors.forkserver import main; main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
)
"""Run by ``python -c``, so that there is no ``__main__`` module that anybody could import again."""

HANDED_OVER = 3
"""Descriptors that come with each request for a child."""
STATUS = struct.Struct("!i")
CHILD = "flask_asyncroute.child"
NO_APP = "-"

# As they are before the app is imported, which may patch them.
_poll, _fork, _recv_fds = select.poll, os.fork, socket.recv_fds


def main(modules: str, control: int, leash_end: int) -> None:
    """Serve the parent.

    :param modules: what to import beforehand, with commas between; the last one is the app's.
    :param control: the descriptor on which the parent asks for children.
    :param leash_end: that of this process's own leash, which the parent has put it on.
    """
    for descriptor in (control, leash_end):
        os.set_inheritable(descriptor, False)
    with suppress(PermissionError):
        os.setsid()
    ours, _, app = modules.rpartition(",")
    for module in ours.split(","):
        import_module(module)
    if app != NO_APP:
        before = _descriptors()
        _preload(app)
        if threading.active_count() > 1 or any(map(_is_shared_badly, _descriptors() - before)):
            _begin_anew(ours, control, leash_end)
    gc.collect()
    gc.freeze()
    _Server(socket.socket(fileno=control), leash_end).serve()


def _preload(module: str) -> None:
    """Import the app's module. What fails here fails in the child too, where somebody hears of it."""
    try:
        import_module(module)
    except BaseException as error:
        logger.warning("The app could not be imported beforehand, each child does it for itself: %r", error)


def _descriptors() -> set[int]:
    listed = os.listdir("/proc/self/fd")
    return {int(name) for name in listed if os.path.exists(f"/proc/self/fd/{name}")}  # not that of the look itself


def _is_shared_badly(descriptor: int) -> bool:
    """Return whether children must not share an open file: a connection, a database, or whatever has a place in it where
    one reads; unlike a log that is only written.
    """
    kind = os.fstat(descriptor).st_mode
    access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    is_log = stat.S_ISREG(kind) and access == os.O_WRONLY
    return not stat.S_ISCHR(kind) and not is_log


def _begin_anew(ours: str, control: int, leash_end: int) -> None:
    """Start again without the app: a fork beside threads can copy a lock that nobody releases, and children that share a
    connection take each other's answers.
    """
    logger.warning(
        "The app starts threads, or opens files or connections, when it is imported, so each child imports it for itself, "
        "which takes longer."
    )
    for descriptor in (control, leash_end):
        os.set_inheritable(descriptor, True)
    os.execv(
        sys.executable, [sys.executable, "-c", PROGRAM, f"{ours},{NO_APP}", str(control), str(leash_end), *sys.path]
    )


class _Server:
    """Forks and reaps.

    :param control: gives three descriptors for each child: its socket, its leash, and where to write its exit status.
    :param leash_end: that of the server itself.
    """

    def __init__(self, control: socket.socket, leash_end: int) -> None:
        self._control = control
        self._leash_end = leash_end
        self._children: dict[int, list[int]] = {}

    def serve(self) -> None:
        """Fork for the parent until it closes, and end when the last child has."""
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
            ready = {descriptor for descriptor, _ in poll.poll()}
            if woken in ready:
                os.read(woken, 4096)
                self._reap()
            if self._control.fileno() in ready:
                data, descriptors, _, _ = _recv_fds(self._control, 1, HANDED_OVER)
                if data and len(descriptors) == HANDED_OVER:
                    self._start(descriptors)
                elif data:
                    # This process has no more of them. Who asked learns from the closed ends that there is no child.
                    logger.error("A child process could not be started: %s", "this process has no more descriptors")
                    for descriptor in descriptors:
                        os.close(descriptor)
                else:
                    is_open = False
                    poll.unregister(self._control)

    def _start(self, descriptors: list[int]) -> None:
        try:
            pid = _fork()
        except OSError as error:
            logger.error("A child process could not be started: %s", error)
            for descriptor in descriptors:
                os.close(descriptor)
            return
        if pid == 0:
            self._become_child(*descriptors)
        os.close(descriptors[0])
        self._children[pid] = descriptors[1:]

    def _become_child(self, task: int, leash_end: int, status: int) -> NoReturn:
        """Be a child from here on, to its end."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            leash.put_on(leash_end, -os.getpid())
            os.close(status)
            os.close(self._leash_end)
            self._control.close()
            for descriptors in self._children.values():
                for descriptor in descriptors:
                    os.close(descriptor)
            channel = socket.socket(fileno=task)
            # A parent under gevent has made it otherwise, for both ends.
            channel.setblocking(True)
            import_module(CHILD).main(channel)
            # What the interpreter does at its end, but for taking everything apart, which costs more than many a task.
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            code = 0
        except BaseException:
            logger.exception("A child could not end as it should.")
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            os._exit(code)

    def _reap(self) -> None:
        """Take note of the children that have ended, and kill what they leave behind in their groups."""
        while self._children:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return
            descriptors = self._children.pop(ended.si_pid, [])
            if descriptors:
                # Until it is waited for, the number is the child's own, and so is the group.
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(ended.si_pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(ended.si_pid, 0)[1])
            if descriptors:
                leash_end, status_end = descriptors
                with suppress(OSError):
                    os.write(status_end, STATUS.pack(status))
                os.close(leash_end)
                os.close(status_end)
