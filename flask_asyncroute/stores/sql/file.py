"""The SQLite file as a file: made for its owner's eyes only, and whether it is still the one that was opened."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

LOOK_SECONDS = 0.5
"""Between two looks whether the file is still the same."""

Identity = tuple[int, int]
"""What tells a file from one that has been put in its place: device and inode."""


class StoreFile:
    """One file. Thread-safe. Raises :exc:`OSError` where it cannot be made or looked at."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.opened: Identity | None = None
        """Which file is in use."""
        self._look_at = 0.0

    def make(self) -> Identity:
        """Make the file, where there is none; return which it is."""
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _alone_in(self.path.parent):
                if not self.path.exists():
                    # What lies beside it belonged to one that was deleted. SQLite would take it for this one's.
                    for suffix in ("-wal", "-shm"):
                        self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
                    os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        return self.identity()

    def use(self, file: Identity) -> None:
        """Take note that this file is in use from here on."""
        self.opened = file
        self._look_at = time.monotonic() + LOOK_SECONDS

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


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out that do this too. Windows does not let go of files that are open, and needs it less."""
    if sys.platform == "win32":
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)
