"""Which processes of this host live, as the kernel knows it: each keeps one byte of a shared file locked.

A record lock is gone the moment its process is, however that ended, and whatever the clock or the interpreter's lock do;
children do not inherit it. `presence` holds one, `census` looks at those of others.
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
    """A file of which every worker of this host locks a byte. Thread-safe.

    There is one for each path in a process, and it stays open: closing any descriptor of a file drops all locks that the
    process has on it (POSIX ``fcntl``).
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name
        """Random, for this file on this host: two hosts that have a file of this path each do not take them for one."""
        self.descriptor = descriptor
        self._lock = threading.Lock()
        self._held: set[int] = set()

    def hold(self, number: int) -> None:
        """Lock a byte for as long as this process lives; again where that is so already does no harm."""
        with self._lock:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            self._held.add(number)

    def release(self, number: int) -> None:
        """Unlock a byte."""
        with self._lock:
            self._held.discard(number)
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, number)

    def is_held(self, number: int) -> bool:
        """Return whether any process of this host holds a byte."""
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
    """Return a byte's number that nobody else has."""
    return secrets.randbits(61) + 1


def lock_file(path: Path) -> LockFile | None:
    """Return the lock file at ``path``, made where there is none; None on systems without such locks.

    :raises OSError: where it cannot be made, or belongs to somebody else.
    """
    if sys.platform == "win32":
        return None  # workers there know each other by their beats alone
    with _files_lock:
        found = _files.get(path) or _opened_elsewhere(path)
        if found is None:
            found = _open(path)
        _files[path] = found
        return found


def _opened_elsewhere(path: Path) -> LockFile | None:
    """Return the same file where it was opened by another path. Opening it once more would be the end of its locks."""
    try:
        wanted = path.stat()
    except FileNotFoundError:
        return None
    for known in _files.values():
        status = os.fstat(known.descriptor)
        if (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino):
            return known
    return None


def this_process() -> str:
    """Return what tells this process from all others of this host, before and after it; empty where that is not known.

    That is its PID namespace, its number there, and when it began, as ``/proc`` of Linux has it.
    """
    try:
        return f"{os.readlink(_NAMESPACE)}/{os.getpid()}/{_state_of(os.getpid())[1]}"
    except OSError:
        return ""


def is_running(process: str) -> bool | None:
    """Return whether a process lives, by what :func:`this_process` told there; None: it cannot be seen from here."""
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
    """Return what tells this run of the kernel from all others (Linux), else nothing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def _state_of(pid: int) -> tuple[str, str]:
    """Return the state of a process, a letter, and when it began, as proc(5) has them."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    return fields[0], fields[19]


def _open(path: Path) -> LockFile:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        status = os.fstat(descriptor)
        # In a folder that others may write to, what has the name need not be ours.
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise PermissionError(f"{path} is not a file of this user")
        fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, 0)
        try:
            token = os.pread(descriptor, TOKEN_BYTES, 0)
            if len(token) < TOKEN_BYTES:
                token = secrets.token_hex(TOKEN_BYTES // 2).encode()
                os.pwrite(descriptor, token, 0)
        finally:
            fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, 0)
        # A copy of the file, in the image of a container or of a machine, has the same token and is another file.
        told = f"{token!r} {_boot()} {status.st_dev} {status.st_ino}"
        return LockFile(descriptor, hashlib.sha256(told.encode()).hexdigest())
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
