"""The store that ``async_routes.state`` uses before the app's runner exists.

The runner holds the threads and connections of the app in this process. It is created later, and
takes over the store.
"""

from __future__ import annotations

import weakref
from typing import Any

from flask import Flask

from .background import when_gone
from .config import Config
from .errors import ConfigurationError
from .stores.base import SharedTaskStore, TaskStore
from .stores.registry import MEMORY, make_store
from .workers.runner import new_store

left_behind: list[object] = []
"""Stores and runners that a fork has copied from the parent process. They are kept alive, because
closing their connections would break the parent's.
"""


class EarlyStore:
    """Holds the store of ``async_routes.state`` until the app's runner takes it over. Not
    thread-safe.

    The runner holds the threads and connections of the app in this process. When it takes over a
    store in memory, this object keeps a copy of the values. After a fork, and in `testing.inline`,
    the next runner begins with this copy.
    """

    def __init__(self) -> None:
        self._store: TaskStore | None = None
        self._named_by: tuple[Any, ...] = ()
        self._finalizer: weakref.finalize[..., Any] | None = None

    def open(self, app: Flask, config: Config) -> TaskStore:
        """Return the store that ``config`` names. The first call opens the store."""
        if self._store is None:
            store = new_store(app, config)
            store.open()
            self._store, self._named_by = store, _naming(config)
            self._finalizer = when_gone(self, store.close)
        return self._store

    def check(self, config: Config) -> None:
        if self._store is not None and self._named_by != _naming(config):
            raise ConfigurationError(
                "ASYNCROUTE_STORE, ASYNCROUTE_NAMESPACE or ASYNCROUTE_CREATE_TABLES was changed "
                "after async_routes.state was used. Set the key before the first use of the state."
            )

    def take(self, app: Flask, config: Config) -> TaskStore:
        """Return the open store, or a new store that is not open. The runner must close it."""
        store = self._store
        if store is None:
            return new_store(app, config)
        self._release()
        if not store.is_shared:
            self._store = _copy(store)
        return store

    def in_memory(self) -> EarlyStore:
        """Return an `EarlyStore` for `testing.inline`, with a copy of an in-memory store's
        values.
        """
        copy = EarlyStore()
        if self._store is not None and not self._store.is_shared:
            copy._store, copy._named_by = _copy(self._store), self._named_by
        return copy

    def close(self) -> None:
        """Close the connections of the store. The next access reopens them."""
        if self._store is not None:
            self._store.close()

    def forget_process(self) -> None:
        """Drop the connections that a fork has copied, without closing them.

        Call this in the child process.
        """
        if isinstance(self._store, SharedTaskStore):
            self._store.forget()
            left_behind.append(self._store)
            self._release()

    def _release(self) -> None:
        self._store = None
        if self._finalizer is not None:
            self._finalizer.detach()


def _naming(config: Config) -> tuple[Any, ...]:
    return config.store, config.namespace, config.create_tables


def _copy(store: TaskStore) -> TaskStore:
    copy = make_store(MEMORY, "", "", True)
    for key in store.value_keys():
        found = store.read_value(key)
        if found is not None:
            copy.write_value(key, found[0], None)
    return copy
