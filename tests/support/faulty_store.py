"""A store whose calls can fail on demand, before or after their effect."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from flask_asyncroute.errors import CommitUnknown, StoreUnavailable
from flask_asyncroute.stores.base import TaskStore

READS = (
    "get", "started_with", "body", "query", "waiting", "past_retention", "not_started_in_time", "read_value",
    "value_keys",
)  # fmt: skip
WRITES = ("add", "claim", "update", "delete", "write_value")

Fault = Callable[[str], str | None]
"""Returns, for the name of a call, whether it fails ``"before"`` or ``"after"`` its effect, or
None.
"""


class FaultyStore:
    """Forwards calls to a store and makes some fail. ``fault`` may also block, like a slow store."""

    def __init__(self, store: TaskStore, fault: Fault = lambda name: None) -> None:
        self.store = store
        self.fault = fault

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Pass ``isinstance`` checks for the type of the store."""
        return type(self.store)

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
    """Makes the call with this number fail. Thread-safe."""

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
        """Stop failing; return the number of calls."""
        with self._lock:
            self._number = 0
            return len(self.calls)


class Down:
    """Makes all calls with these names fail while ``is_down``."""

    def __init__(self, *names: str) -> None:
        self.names = names or READS + WRITES
        self.is_down = False
        self.refused: list[str] = []

    def __call__(self, name: str) -> str | None:
        if self.is_down and name in self.names:
            self.refused.append(name)
            return "before"
        return None
