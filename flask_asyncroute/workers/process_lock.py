"""Detect which workers of this host are running: each worker locks one byte of a shared file.

The kernel releases such a lock when its process ends, and child processes do not inherit it.
`heartbeat` holds this process's lock. `recovery` tests the locks of others.
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
    """A file in which each worker of this host locks one byte. Thread-safe."""

    # The file is never closed, because closing any descriptor of a file releases all locks on it
    # (POSIX).

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name  # differs between two hosts with a file at the same path
        self.descriptor = descriptor
        self._lock = threading.Lock()
        self._held: set[int] = set()

    def hold(self, number: int) -> None:
        """Lock the byte with this number. Locking it again has no effect.

        :raises OSError: if another process has locked the byte.
        """
        with self._lock:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            self._held.add(number)

    def release(self, number: int) -> None:
        with self._lock:
            self._held.discard(number)
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, number)

    def is_held(self, number: int) -> bool:
        """Check whether any process of this host has locked the byte with this number."""
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
    """Choose a random byte for :meth:`LockFile.hold`."""
    # The range is so large that no two workers get the same number.
    return secrets.randbits(61) + 1


def lock_file(path: Path) -> LockFile | None:
    """Open the lock file at ``path``, and create it if it is missing. Returns None on Windows.

    :raises OSError: if the file cannot be created, or if another user owns it.
    """
    if sys.platform == "win32":
        return None  # only heartbeats show which workers are alive
    with _files_lock:
        _files[path] = _files.get(path) or _opened_elsewhere(path) or _open(path)
        return _files[path]


def _opened_elsewhere(path: Path) -> LockFile | None:
    """Return the LockFile if this process has opened the same file under another path."""
    try:
        wanted = path.stat()
    except FileNotFoundError:
        return None
    same = (k for k in _files.values() if os.path.samestat(os.fstat(k.descriptor), wanted))
    return next(same, None)


def this_process() -> str:
    """Identify this process by its PID namespace, PID and start time.

    :return: "" if this is not Linux.
    """
    try:
        return f"{os.readlink(_NAMESPACE)}/{os.getpid()}/{_state_of(os.getpid())[1]}"
    except OSError:
        return ""


def is_running(process: str) -> bool | None:
    """Check whether a process of this host is running. Returns None if that cannot be detected.

    :param process: the value that :func:`this_process` returned in that process.
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
    """Return the state letter and the start time of a process; see proc(5)."""
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
