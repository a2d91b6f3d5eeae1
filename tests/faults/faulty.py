"""A store that fails when a test wants it to, before or after it has done what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from flask_asyncroute.errors import CommitUnknown, StoreUnavailable
from flask_asyncroute.stores.base import TaskStore

READS = ("get", "body", "query", "waiting", "outlived", "read_value", "value_keys")
WRITES = ("add", "claim", "update", "delete", "write_value")

Fault = Callable[[str], str | None]
"""Says of a call, by its name, whether it fails ``"before"`` or ``"after"`` it is done, or not (None)."""


class FaultyStore:
    """Passes all on to a store, but for what ``fault`` wants to fail. It may block, too: that is a slow store."""

    def __init__(self, store: TaskStore, fault: Fault = lambda name: None) -> None:
        self.store = store
        self.fault = fault

    def __getattr__(self, name: str) -> Any:
        done = getattr(self.store, name)
        if name not in READS + WRITES:
            return done

        def call(*arguments: Any) -> Any:
            how = self.fault(name)
            if how == "before":
                raise StoreUnavailable("A test wants it so.", retry_after=1)
            result = done(*arguments)
            if how == "after":
                kind = CommitUnknown if name in WRITES else StoreUnavailable
                raise kind("A test wants it so.", retry_after=1)
            return result

        return call


class Nth:
    """Has the call with this number fail, of those that are counted. Thread-safe."""

    def __init__(self, number: int, how: str) -> None:
        self._number = number
        self._how = how
        self._lock = threading.Lock()
        self.calls: list[str] = []

    def __call__(self, name: str) -> str | None:
        with self._lock:
            self.calls.append(name)
            return self._how if len(self.calls) == self._number else None

    def disarm(self) -> int:
        """Let no further call fail; return how many there were."""
        with self._lock:
            self._number = 0
            return len(self.calls)


class Down:
    """Has all calls of some names fail while it is set."""

    def __init__(self, *names: str) -> None:
        self.names = names or READS + WRITES
        self.is_down = False
        self.refused: list[str] = []

    def __call__(self, name: str) -> str | None:
        if self.is_down and name in self.names:
            self.refused.append(name)
            return "before"
        return None
