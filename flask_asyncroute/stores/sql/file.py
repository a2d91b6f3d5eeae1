"""The SQLite file as a file: made for its owner's eyes only, and whether it is still the one that was opened.

SQLite opens a file, its log and its shared memory one after the other, each by its name, and between two threads of one
process no lock of its own tells them apart. Were the file made anew in between, one would read the log of the other, and
memory that is in use would be cut short. So who makes it has the folder alone, and who opens it has nobody make it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

LOOK_SECONDS = 0.5
"""Between two looks whether the file is still the same."""
LOCK_SECONDS = 5.0
"""How long others may take to make the file, or to open it."""

Identity = tuple[int, int]
"""What tells a file from one that has been put in its place: device and inode."""


class StoreFile:
    """One file. Thread-safe. Raises :exc:`OSError` where it cannot be made or looked at."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.opened: Identity | None = None
        """Which file is in use."""
        self._beside: dict[Path, Identity | None] = {
            path.with_name(path.name + suffix): None for suffix in ("-wal", "-shm")
        }
        """Where SQLite keeps log and memory, and which files those of the one in use are. Of no other file: what others have
        opened meanwhile is theirs."""
        self._look_at = 0.0

    def make(self) -> Identity:
        """Make the file, where there is none; return which it is.

        Log and memory of one that is gone go first: SQLite would take them for this one's.
        """
        if self._is_gone(_find(self.path)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.parent, is_alone=True):
                found = _find(self.path)
                for path, known in self._beside.items():
                    if found is None or (self._is_gone(found) and known is not None and known == _find(path)):
                        path.unlink(missing_ok=True)
                if found is None:
                    os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        return self.identity()

    def use(self, file: Identity) -> None:
        """Take note that this file is in use from here on."""
        if self.opened != file:
            self._beside = dict.fromkeys(self._beside)
        self.opened = file
        self._look_at = time.monotonic() + LOOK_SECONDS

    @contextmanager
    def kept(self) -> Iterator[Identity]:
        """Give which file is there, to be opened meanwhile; nobody makes it anew."""
        with _locked(self.path.parent, is_alone=False):
            found = self.identity()
            yield found
            if found == self.opened == _find(self.path):
                self._beside = {path: _find(path) for path in self._beside}

    def _is_gone(self, found: Identity | None) -> bool:
        """Return whether there is no file, or another than the one in use."""
        return found is None or self.opened not in (None, found)

    def is_replaced(self) -> bool:
        """Return whether another file, or none, is in the place of the one in use; looks twice a second at most."""
        now = time.monotonic()
        if now < self._look_at or self.opened is None:
            return False
        try:
            if self.identity() != self.opened:
                return True
        except OSError:
            return True
        self._look_at = now + LOOK_SECONDS
        return False

    def identity(self) -> Identity:
        """Return which file is there."""
        found = os.stat(self.path)
        return found.st_dev, found.st_ino


def _find(path: Path) -> Identity | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def _locked(folder: Path, is_alone: bool) -> Iterator[None]:
    """Keep others out, or only those who want to be alone. Windows does not let go of files that are open, and needs it less."""
    if sys.platform == "win32":
        yield
        return
    kind = fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH
    deadline = time.monotonic() + LOCK_SECONDS
    number = os.open(folder, os.O_RDONLY)
    try:
        while True:
            try:
                fcntl.flock(number, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"others have the folder {folder} locked") from None
                time.sleep(0.005)
        yield
    finally:
        # Not by closing alone: a copy of this process that was forked meanwhile holds the same lock.
        with suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_UN)
        os.close(number)
