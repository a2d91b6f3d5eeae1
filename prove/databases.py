"""The stores that trials of several processes run on: a fresh SQLite file each, and a fresh PostgreSQL database."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

from sqlalchemy.exc import SQLAlchemyError

from tests.conftest import engine_of, new_postgresql_database


def sqlite_and_postgresql() -> Iterator[tuple[str, AbstractContextManager[str]]]:
    """Yield the name of each kind and a context manager that gives its ``ASYNCROUTE_STORE``.

    Without a PostgreSQL server that one is left out, but where ``REQUIRE_SERVICES`` is 1.
    """
    yield "SQLite", nullcontext("sqlite:///asyncroute.db")
    server = os.environ.get("TEST_POSTGRESQL_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/postgres")
    try:
        with engine_of(server).connect():
            pass
    except SQLAlchemyError:
        if os.environ.get("REQUIRE_SERVICES") == "1":
            raise
        return
    yield "PostgreSQL", new_postgresql_database(server)
