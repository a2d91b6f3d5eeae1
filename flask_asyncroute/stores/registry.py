"""The kinds of store that ``ASYNCROUTE_STORE`` can name, in :data:`KINDS`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import ConfigurationError
from ..validators import refuse
from .base import TaskStore

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

StoreSetting: TypeAlias = "str | Engine | Callable[[], Engine]"

MEMORY = "memory://"
_KEY = "ASYNCROUTE_STORE"
_EXAMPLES = (
    "a URL such as 'sqlite:///asyncroute.db', 'postgresql+psycopg://…' or 'memory://', an "
    "SQLAlchemy Engine, or a function "
    "that returns one"
)


@dataclass(frozen=True, slots=True)
class StoreKind:
    """A kind of store, such as SQLite or PostgreSQL.

    :param name: the name in messages.
    :param schemes: the URL schemes, without ``://``.
    :param module: the implementation, imported only if used. It defines ``check_setting(label,
        setting)``, which raises ConfigurationError for an invalid setting, and
        ``make_store(setting, folder, namespace, create_tables)``, which returns an unopened store.
    :param is_shared: whether several processes can use one store.
    :param is_file: whether the URL names a file. Relative paths start at the instance folder.
    :param takes_engine: whether the setting can be an Engine, or a function that returns one.
    :param driver: the driver module. The pip extra ``extra`` installs it.
    :param preload: further modules to import. Importing them opens no connections or files.
    """

    name: str
    schemes: tuple[str, ...]
    module: str
    is_shared: bool = True
    is_file: bool = False
    takes_engine: bool = False
    driver: str | None = None
    extra: str | None = None
    preload: tuple[str, ...] = ()


KINDS = (
    StoreKind("memory", ("memory",), "flask_asyncroute.stores.memory", is_shared=False),
    StoreKind(
        "SQLite", ("sqlite", "sqlite+pysqlite"), "flask_asyncroute.stores.sql.sqlite", is_file=True
    ),
    StoreKind(
        "PostgreSQL", ("postgresql+psycopg",), "flask_asyncroute.stores.sql.postgresql",
        takes_engine=True, driver="psycopg", extra="postgresql",
        preload=("sqlalchemy.dialects.postgresql.psycopg", "psycopg"),
    ),
)  # fmt: skip


def kind_of(setting: StoreSetting, label: str = _KEY) -> StoreKind:
    """Return the kind of store that a value of ``ASYNCROUTE_STORE`` names.

    :raises ConfigurationError: if the store is not supported. The message shows no password.
    """
    if not isinstance(setting, str):
        return next(kind for kind in KINDS if kind.takes_engine)
    scheme, separator, _ = setting.partition("://")
    if not separator or not re.fullmatch(r"[a-z][a-z0-9+]*", scheme):
        # Other text can contain a password.
        raise refuse(label, _EXAMPLES, setting if re.fullmatch(r"[\w./: -]*", setting) else "…")
    for kind in KINDS:
        if scheme in kind.schemes:
            return kind
    raise ConfigurationError(
        f"{label}: {scheme!r} is not supported; use 'sqlite:///…', 'postgresql+psycopg://…' or "
        "'memory://'."
    )


def checked(label: str, value: Any) -> StoreSetting:
    """Validate a value of ``ASYNCROUTE_STORE`` and return it.

    :raises ConfigurationError: if the value is invalid. The message shows no password.
    """
    if not isinstance(value, str):
        from sqlalchemy.engine import Engine

        if callable(value) and not isinstance(value, type):
            return value  # type: ignore[no-any-return]
        if not isinstance(value, Engine):
            raise refuse(label, _EXAMPLES, value)
    kind = kind_of(value, label)
    if isinstance(value, str) and kind.driver is not None and find_spec(kind.driver) is None:
        raise ConfigurationError(
            f"{label}: {kind.schemes[0]!r} needs {kind.driver}, which is not installed; run pip "
            f"install 'flask-asyncroute[{kind.extra}]'."
        )
    import_module(kind.module).check_setting(label, value)
    setting: StoreSetting = value
    return setting


def make_store(
    setting: StoreSetting, folder: str, namespace: str, create_tables: bool
) -> TaskStore:
    """Create the store that a validated setting names, without opening it.

    :param folder: the base of relative file paths.
    :raises ConfigurationError: if the setting is a function that does not return a supported
        Engine.
    """
    store: TaskStore = import_module(kind_of(setting).module).make_store(
        setting, folder, namespace, create_tables
    )
    return store


def absolute(setting: str, folder: str) -> str:
    """Make the file path in a store URL absolute, so that other processes can use the URL.

    :param folder: the base of relative file paths.
    """
    if not kind_of(setting).is_file:
        return setting
    from sqlalchemy.engine import make_url

    url = make_url(setting)
    url = url.set(database=str(Path(folder) / str(url.database)))
    return url.render_as_string(hide_password=False)


def modules_of(setting: StoreSetting) -> tuple[str, ...]:
    """Return the names of the modules that a store needs, so that they can be imported early."""
    kind = kind_of(setting)
    return (kind.module, *kind.preload)
