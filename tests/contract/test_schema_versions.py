"""Every SQL store refuses tables of another version. Tables without a version row get the current
one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from flask_asyncroute import metadata
from flask_asyncroute.errors import ConfigurationError
from flask_asyncroute.stores.base import TaskStore
from flask_asyncroute.stores.registry import make_store
from flask_asyncroute.stores.sql.migrations import VERSION
from flask_asyncroute.task import AsyncRouteTask
from tests.support.databases import engine_of, new_postgresql_database

NewStore = Callable[..., TaskStore]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Return the URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'store.db'}"
        return
    with new_postgresql_database(request.getfixturevalue("postgresql_server")) as made:
        yield made


@pytest.fixture
def make(url: str) -> Iterator[NewStore]:
    made: list[TaskStore] = []

    def make(create_tables: bool = True) -> TaskStore:
        made.append(make_store(url, "", "test", create_tables))
        return made[-1]

    yield make
    for store in made:
        store.close()


def execute(url: str, statement: str) -> None:
    with engine_of(url).begin() as connection:
        connection.execute(text(statement))


def versions(url: str) -> list[int]:
    with engine_of(url).connect() as connection:
        return list(connection.scalars(text("SELECT version FROM asyncroute_schema")))


@pytest.mark.covers("F43")
@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1, 99])
@pytest.mark.parametrize("create_tables", [True, False])
def test_tables_of_another_version_are_refused(
    url: str, make: NewStore, version: int, create_tables: bool
) -> None:
    make().open()
    execute(url, f"UPDATE asyncroute_schema SET version = {version}")
    refused = make(create_tables)
    for _ in range(2):
        with pytest.raises(ConfigurationError) as found:
            refused.open()
        message = str(found.value)
        assert "ASYNCROUTE_STORE" in message
        assert f"have version {version}, " in message and f"needs version {VERSION}." in message
        assert "restart the app to create new ones" in message
    assert versions(url) == [version]


@pytest.mark.covers("F43")
@pytest.mark.parametrize("create_tables", [True, False])
def test_tables_created_from_the_metadata_get_their_version(
    url: str, make: NewStore, make_task: Callable[..., AsyncRouteTask], create_tables: bool
) -> None:
    """As an Alembic migration creates them, without rows."""
    engine = engine_of(url)
    metadata.create_all(engine)
    engine.dispose()
    store = make(create_tables)
    store.open()
    store.add(make_task(), b"", None, ())
    assert store.get("task") is not None
    assert versions(url) == [VERSION]
