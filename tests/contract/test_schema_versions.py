"""Tables of other versions in PostgreSQL: older ones are upgraded, newer ones refused (F43). For SQLite see `test_sqlite`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import text

from flask_asyncroute.errors import ConfigurationError
from flask_asyncroute.stores.base import TaskStore
from flask_asyncroute.stores.opening import make_store
from flask_asyncroute.stores.sql.upgrades import VERSION
from flask_asyncroute.task import AsyncRouteTask
from tests.conftest import engine_of, new_postgresql_database
from tests.older_schema import OLDER


@pytest.fixture
def url(postgresql_server: str) -> Iterator[str]:
    with new_postgresql_database(postgresql_server) as made:
        yield made


@pytest.fixture
def make(url: str) -> Iterator[Callable[..., TaskStore]]:
    made: list[TaskStore] = []

    def make(create_tables: bool = True) -> TaskStore:
        made.append(make_store(url, "", "test", create_tables))
        return made[-1]

    yield make
    for store in made:
        store.close()


def test_f43_postgresql_tables_of_an_older_version_are_upgraded(
    url: str, make: Callable[..., TaskStore], make_task: Callable[..., AsyncRouteTask]
) -> None:
    store = make()
    store.open()
    store.add(make_task(), b"", None, ())
    before = store.get("task")
    store.close()
    with engine_of(url).begin() as connection:
        for statement in (*OLDER, "UPDATE asyncroute_schema SET version = 1"):
            connection.execute(text(statement))
    with pytest.raises(ConfigurationError, match="ASYNCROUTE_CREATE_TABLES"):
        make(create_tables=False).open()
    upgraded = make()
    upgraded.open()
    # The order of its columns is another by now, which no statement relies on.
    assert upgraded.get("task") == before
    upgraded.add(make_task("another"), b"", None, ())
    assert upgraded.claim("another", "me", 1) is not None
    upgraded.close()
    with engine_of(url).connect() as connection:
        assert connection.scalars(text("SELECT version FROM asyncroute_schema")).all() == [VERSION]


def test_f43_postgresql_tables_of_a_newer_version_are_refused(url: str, make: Callable[..., TaskStore]) -> None:
    store = make()
    store.open()
    store.close()
    with engine_of(url).begin() as connection:
        connection.execute(text(f"UPDATE asyncroute_schema SET version = {VERSION + 1}"))
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=f"ASYNCROUTE_STORE.* version {VERSION + 1}, .* version {VERSION}"):
            make().open()
