"""The mapping ``async_routes.state``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import msgspec

from .encoding import encode_value
from .errors import ResultError, StateValueError
from .stores.base import TaskStore

MAX_VALUE = 1024 * 1024
MAX_KEY = 255


class SharedState(MutableMapping[str, Any]):
    """A mapping in the store that all processes of the app share. Access needs an app context.

    Keys are strings of 1 to 255 characters. Values are JSON of at most 1 MiB. Each operation is one
    transaction.

    Reading returns a copy of the value, so assign a changed value to its key. Use :meth:`apply` if
    other processes may change the same key.

    :raises StateValueError: if a key or value is invalid.
    :raises StoreUnavailable: if the store cannot be used.
    """

    def __init__(
        self, store: Callable[[], TaskStore], default: Callable[[], Callable[[Any], Any]]
    ) -> None:
        self._store = store
        self._default = default

    def __getitem__(self, key: str) -> Any:
        stored = self._store().read_value(_checked(key))
        if stored is None:
            raise KeyError(key)
        return msgspec.json.decode(stored[0])

    def __setitem__(self, key: str, value: Any) -> None:
        self._store().write_value(_checked(key), self._encoded(key, value), None)

    def __delitem__(self, key: str) -> None:
        if not self._store().write_value(_checked(key), None, None):
            raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._store().value_keys())

    def __len__(self) -> int:
        return len(list(self._store().value_keys()))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._store().read_value(_checked(key)) is not None

    def apply(self, key: str, function: Callable[[Any], Any], default: Any = None) -> Any:
        """Replace a value by ``function(value)`` and return the new value. The change is atomic.

        :param function: is called again if another process has changed the value meanwhile. So it
            must have no side effects.
        :param default: passed to ``function`` if the key is missing.
        """
        store = self._store()
        while True:
            stored, version = store.read_value(_checked(key)) or (None, 0)
            value = default if stored is None else msgspec.json.decode(stored)
            encoded = self._encoded(key, function(value))
            if store.write_value(key, encoded, version):
                return msgspec.json.decode(encoded)

    def _encoded(self, key: str, value: Any) -> bytes:
        try:
            return encode_value(value, self._default(), MAX_VALUE)
        except ResultError as error:
            raise StateValueError(f"state[{key!r}] cannot hold this value: {error}") from None


def _checked(key: Any) -> str:
    if not isinstance(key, str) or not 0 < len(key) <= MAX_KEY or "\x00" in key:
        raise StateValueError(
            f"A key of the shared state must be a string of 1 to {MAX_KEY} characters without NUL, "
            f"not {key!r:.80}."
        )
    try:
        key.encode()
    except UnicodeEncodeError:
        raise StateValueError(
            f"A key of the shared state must be valid Unicode, not {key!r:.80}."
        ) from None
    return key
