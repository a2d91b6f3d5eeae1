"""The table of stores: which one a checked ``ASYNCROUTE_STORE`` names. What a kind needs is imported when it is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from ..store_url import MEMORY, StoreSetting, checked_engine
from .base import TaskStore

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine


PATIENCE = {"connect_timeout": 5, "tcp_user_timeout": 10_000}
"""Of libpq: seconds to connect, milliseconds until what was sent must be acknowledged."""


def make_store(setting: StoreSetting, folder: str, namespace: str, create_tables: bool) -> TaskStore:
    """Return the store that a checked setting names, not opened yet.

    :param folder: what a relative path of SQLite begins at.
    :raises ConfigurationError: for an engine that cannot be used, or a function that returns something else.
    """
    if setting == MEMORY:
        from .memory import MemoryTaskStore

        return MemoryTaskStore()
    from .sql.store import SQLTaskStore

    if not isinstance(setting, str):
        from .sql.engine import EngineDatabase

        return SQLTaskStore(EngineDatabase(_engine(setting), is_owned=False), namespace, create_tables)
    from sqlalchemy.engine import make_url

    url = make_url(setting)
    if url.get_backend_name() == "sqlite":
        from .sql.sqlite import SQLiteDatabase

        synchronous = str(url.query.get("synchronous", "NORMAL")).upper()
        return SQLTaskStore(SQLiteDatabase(Path(folder) / str(url.database), synchronous), namespace, create_tables)
    from sqlalchemy import create_engine

    from .sql.engine import EngineDatabase

    # A server that has gone silent must not be waited for without end.
    patience = {name: value for name, value in PATIENCE.items() if name not in url.query}
    engine = create_engine(url, connect_args=patience)
    return SQLTaskStore(EngineDatabase(engine, is_owned=True), namespace, create_tables)


def _engine(setting: Engine | Callable[[], Engine]) -> Engine:
    from sqlalchemy.engine import Engine

    if isinstance(setting, Engine):
        return setting
    engine = setting()
    if not isinstance(engine, Engine):
        raise ConfigurationError(
            f"ASYNCROUTE_STORE: the function returned a {type(engine).__name__}; it must return an SQLAlchemy Engine."
        )
    return checked_engine("ASYNCROUTE_STORE", engine)
