"""The mapping of JSON values that requests and tasks of all processes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import msgspec

from .encoding import encode_value
from .errors import AsyncRouteError, ResultError
from .stores.base import TaskStore

MAX_VALUE = 1024 * 1024
MAX_KEY = 255

StoreOf = Callable[[], TaskStore]


class StateValueError(AsyncRouteError, ValueError):
    """A key or value that the shared state cannot hold; the message says why."""


class SharedState(MutableMapping[str, Any]):
    """A mapping that lives in the store, the same for every process of the app. Needs an app context.

    Keys are texts of 1 to 255 characters, values JSON of at most 1 MiB. Each operation is one transaction; what is read
    is a copy: to change a value, assign it, or use :meth:`apply` where others may change it too.

    :raises StateValueError: for a key or value that it cannot hold.
    :raises StoreUnavailable: where the store cannot be used now.
    """

    def __init__(self, store: StoreOf, default: Callable[[], Callable[[Any], Any]]) -> None:
        self._store = store
        self._default = default

    def __getitem__(self, key: str) -> Any:
        held = self._store().read_value(_checked(key))
        if held is None:
            raise KeyError(key)
        return msgspec.json.decode(held[0])

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
        """Replace a value by what ``function`` makes of it, atomically; return the new value.

        :param function: takes the present value; called again where another process was faster, so it must not do
            anything else.
        :param default: what ``function`` gets where there is no value.
        """
        store = self._store()
        while True:
            held = store.read_value(_checked(key))
            encoded = self._encoded(key, function(default if held is None else msgspec.json.decode(held[0])))
            if store.write_value(key, encoded, 0 if held is None else held[1]):
                return msgspec.json.decode(encoded)

    def _encoded(self, key: str, value: Any) -> bytes:
        try:
            return encode_value(value, self._default(), MAX_VALUE)
        except ResultError as error:
            raise StateValueError(f"state[{key!r}] cannot hold this value: {error}") from None


def _checked(key: Any) -> str:
    if not isinstance(key, str) or not 0 < len(key) <= MAX_KEY or "\x00" in key:
        raise StateValueError(f"A key of the shared state is a text of 1 to {MAX_KEY} characters, not {key!r:.80}.")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise StateValueError(f"A key of the shared state must be valid Unicode, not {key!r:.80}.") from None
    return key
