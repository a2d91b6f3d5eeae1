"""The databases that tests run on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.pool import NullPool

from flask_asyncroute.stores.base import TaskStore
from flask_asyncroute.stores.registry import make_store

SHARED = pytest.mark.parametrize("store", ["sqlite", "postgresql"], indirect=True)
"""Runs a test on each kind of `SharedTaskStore`."""


def engine_of(url: str) -> Engine:
    """Return an engine that does not pool connections."""
    return create_engine(url, poolclass=NullPool)


@contextmanager
def new_postgresql_database(server: str) -> Iterator[str]:
    """Create a database, yield its URL, and drop it."""
    name = f"asyncroute_test_{os.getpid()}_{time.monotonic_ns()}"
    engine = engine_of(server).execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    try:
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


def new_sqlite_store(path: Path, namespace: str = "test", create_tables: bool = True) -> TaskStore:
    """Return a store on an SQLite file, not yet open."""
    return make_store(f"sqlite:///{path}", "", namespace, create_tables)
