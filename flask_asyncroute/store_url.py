"""What ``ASYNCROUTE_STORE`` may hold, checked without opening anything. `stores.opening` makes the store of it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from .checks import refuse
from .errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, Engine

MEMORY = "memory://"
SQLITE_SYNCHRONOUS = ("OFF", "NORMAL", "FULL", "EXTRA")
_EXAMPLES = (
    "a URL such as 'sqlite:///asyncroute.db', 'postgresql+psycopg://…' or 'memory://', an SQLAlchemy Engine, or a function "
    "that returns one"
)

StoreSetting: TypeAlias = "str | Engine | Callable[[], Engine]"
"""What ``ASYNCROUTE_STORE`` may hold."""


def checked(label: str, value: Any) -> StoreSetting:
    """Return a value of ``ASYNCROUTE_STORE`` that can name a store.

    :raises ConfigurationError: naming the key; a URL's password is not shown.
    """
    if value == MEMORY:
        return MEMORY
    if not isinstance(value, str):
        return _engine_setting(label, value)
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(value)
    except (ArgumentError, ValueError):
        raise refuse(label, _EXAMPLES, value) from None
    if url.drivername in ("sqlite", "sqlite+pysqlite"):
        _check_sqlite(label, value, url)
    elif url.drivername == "postgresql+psycopg":
        _check_postgresql(label, url)
    else:
        raise ConfigurationError(
            f"{label}: {url.drivername!r} is not served; use 'sqlite:///…', 'postgresql+psycopg://…' or 'memory://'."
        )
    return value


def absolute(setting: str, folder: str) -> str:
    """Return a URL that names the same store wherever it is read.

    :param folder: what a relative path of SQLite begins at.
    """
    if setting == MEMORY:
        return setting
    from sqlalchemy.engine import make_url

    url = make_url(setting)
    if url.get_backend_name() == "sqlite":
        url = url.set(database=str(Path(folder) / str(url.database)))
    return url.render_as_string(hide_password=False)


def modules_of(setting: StoreSetting) -> tuple[str, ...]:
    """Return the modules that a process needs for such a store; importing them opens nothing."""
    if setting == MEMORY:
        return ("flask_asyncroute.stores.memory",)
    if isinstance(setting, str) and setting.startswith("sqlite"):
        return ("flask_asyncroute.stores.sql.store", "flask_asyncroute.stores.sql.sqlite")
    return (
        "flask_asyncroute.stores.sql.store", "flask_asyncroute.stores.sql.engine", "sqlalchemy.dialects.postgresql.psycopg",
        "psycopg",
    )  # fmt: skip


def _engine_setting(label: str, value: Any) -> StoreSetting:
    from sqlalchemy.engine import Engine

    if isinstance(value, Engine):
        return checked_engine(label, value)
    if callable(value) and not isinstance(value, type):
        return cast("Callable[[], Engine]", value)
    raise refuse(label, _EXAMPLES, value)


def checked_engine(label: str, engine: Engine) -> Engine:
    """Return an engine that a store can work with.

    :raises ConfigurationError: for one that is not for PostgreSQL with psycopg.
    """
    kind = (engine.dialect.name, engine.dialect.driver)
    if kind[0] == "sqlite":
        raise ConfigurationError(
            f"{label}: an Engine for SQLite is not served, since the store needs settings of its own there; give the URL "
            "'sqlite:///' and a path. It may be the file that the app uses."
        )
    if kind != ("postgresql", "psycopg"):
        raise ConfigurationError(
            f"{label}: an Engine for {kind[0]} with {kind[1]} is not served; make it with a URL that begins with "
            "'postgresql+psycopg://'."
        )
    return engine


def _check_sqlite(label: str, value: str, url: URL) -> None:
    if url.database in (None, "", ":memory:") or url.query.get("mode") == "memory":
        raise ConfigurationError(f"{label}: an SQLite database in memory has one connection; use 'memory://' instead.")
    if url.host or url.username or url.port or "\x00" in value or ("?" in value and not url.query):
        # The value is not shown: it may hold a password.
        raise ConfigurationError(
            f"{label} must be 'sqlite:///' and a path, with no user or host before it and '?synchronous=…' at most after it."
        )
    for name, setting in url.query.items():
        if name != "synchronous" or not isinstance(setting, str) or setting.upper() not in SQLITE_SYNCHRONOUS:
            raise ConfigurationError(
                f"{label}: after the '?' only synchronous= is known, with one of {', '.join(SQLITE_SYNCHRONOUS)}; "
                f"not {name}={setting}."
            )


def _check_postgresql(label: str, url: URL) -> None:
    if find_spec("psycopg") is None:
        raise ConfigurationError(
            f"{label}: 'postgresql+psycopg' needs psycopg, which is not installed: pip install 'flask-asyncroute[postgresql]'."
        )
    if not url.database:
        raise ConfigurationError(f"{label} must name a database: 'postgresql+psycopg://user@host/database'.")
