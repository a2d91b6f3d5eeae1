"""Detects which workers of this host are running: each worker locks one byte of a shared file.

The kernel releases such a lock when its process ends, and child processes do not inherit it.
`heartbeat` holds this process's lock; `recovery` tests the locks of others.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import sys
import threading
from pathlib import Path

if sys.platform != "win32":
    import fcntl

TOKEN_BYTES = 32
_NAMESPACE = "/proc/self/ns/pid"

_files: dict[Path, LockFile] = {}
_files_lock = threading.Lock()


class LockFile:
    """A lock file that is never closed, because closing any descriptor of a file releases all locks
    on it (POSIX). Thread-safe.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name  # differs between two hosts with a file at the same path
        self.descriptor = descriptor
        self._lock = threading.Lock()
        self._held: set[int] = set()

    def hold(self, number: int) -> None:
        """Lock a byte. Idempotent. Raises OSError if another process has locked it."""
        with self._lock:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            self._held.add(number)

    def release(self, number: int) -> None:
        with self._lock:
            self._held.discard(number)
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, number)

    def is_held(self, number: int) -> bool:
        """Return whether a process of this host has locked a byte."""
        with self._lock:
            if number in self._held:
                return True
            try:
                fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except OSError:
                return True
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, number)
            return False


def new_number() -> int:
    """Return a random byte offset, from a range so large that no two workers get the same."""
    return secrets.randbits(61) + 1


def lock_file(path: Path) -> LockFile | None:
    """Return the lock file at ``path``; create a missing file. Return None on Windows.

    :raises OSError: if the file cannot be created, or if another user owns it.
    """
    if sys.platform == "win32":
        return None  # only heartbeats show which workers are alive
    with _files_lock:
        _files[path] = _files.get(path) or _opened_elsewhere(path) or _open(path)
        return _files[path]


def _opened_elsewhere(path: Path) -> LockFile | None:
    """Return the LockFile if this process has opened the file under another path, else None."""
    try:
        wanted = path.stat()
    except FileNotFoundError:
        return None
    same = (k for k in _files.values() if os.path.samestat(os.fstat(k.descriptor), wanted))
    return next(same, None)


def this_process() -> str:
    """Return this process's PID namespace, PID and start time; empty if this is not Linux."""
    try:
        return f"{os.readlink(_NAMESPACE)}/{os.getpid()}/{_state_of(os.getpid())[1]}"
    except OSError:
        return ""


def is_running(process: str) -> bool | None:
    """Return whether a process is running; None if that cannot be detected here.

    :param process: the value of :func:`this_process` in that process.
    """
    namespace, _, rest = process.partition("/")
    pid, _, began = rest.partition("/")
    try:
        if namespace != os.readlink(_NAMESPACE):
            return None
    except OSError:
        return None
    try:
        state, found = _state_of(int(pid))
    except OSError:
        return False
    return found == began and state not in "ZX"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def _state_of(pid: int) -> tuple[str, str]:
    """Return a process's state letter and start time; see proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    return fields[0], fields[19]


def _open(path: Path) -> LockFile:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        status = os.fstat(descriptor)
        # In a shared folder, another user can own the file.
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise PermissionError(f"{path} is not a regular file of this user")
        fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, 0)
        try:
            token = os.pread(descriptor, TOKEN_BYTES, 0)
            if len(token) < TOKEN_BYTES:
                token = secrets.token_hex(TOKEN_BYTES // 2).encode()
                os.pwrite(descriptor, token, 0)
        finally:
            fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, 0)
        # A copied lock file, as in a container image, has the same token but another inode.
        identity = f"{token!r} {_boot()} {status.st_dev} {status.st_ino}"
        return LockFile(descriptor, hashlib.sha256(identity.encode()).hexdigest())
    except BaseException:
        os.close(descriptor)
        raise


def _after_fork() -> None:
    global _files_lock
    _files_lock = threading.Lock()
    for descriptor in {found.descriptor for found in _files.values()}:
        os.close(descriptor)
    _files.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
