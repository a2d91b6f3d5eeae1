"""An app with tables of its own in the same PostgreSQL database, by Flask-SQLAlchemy and Alembic,
as on the page on deployment.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import Column, Integer, MetaData, Table, inspect

from flask_asyncroute import AsyncRoute, ConfigurationError, metadata
from flask_asyncroute.stores.registry import make_store
from tests.support.apps import close_app
from tests.support.databases import engine_of, new_postgresql_database
from tests.support.flow import Flow

ENV = """
import flask_asyncroute
from alembic import context

config = context.config
target = config.attributes["target"]


def include_name(name, type_, parent_names):
    return type_ != "table" or name not in flask_asyncroute.metadata.tables


with config.attributes["engine"].connect() as connection:
    names = include_name if config.attributes["leaves_alone"] else None
    context.configure(connection=connection, target_metadata=target, include_name=names)
    with context.begin_transaction():
        context.run_migrations()
"""
SCRIPT = '''
"""${message}"""
import sqlalchemy as sa
from alembic import op
${imports if imports else ""}

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


def upgrade():
    ${upgrades if upgrades else "pass"}
'''


def test_a_store_on_the_engine_of_flask_sqlalchemy(
    make_app: Callable[..., Flask], postgresql_url: str
) -> None:
    flask_sqlalchemy = pytest.importorskip("flask_sqlalchemy")
    db = flask_sqlalchemy.SQLAlchemy()
    app = make_app(
        SQLALCHEMY_DATABASE_URI=postgresql_url,
        ASYNCROUTE_STORE=lambda: db.engine,
        ASYNCROUTE_LIST_ANONYMOUS=True,
    )
    db.init_app(app)
    flow = Flow(app, AsyncRoute(app))

    @flow.route()
    def work() -> Any:
        return db.session.scalar(db.text("SELECT 6 * 7"))

    task = flow.run()
    assert (task["State"], task["Result"]) == ("Completed", 42)
    assert flow.ids() == [task["Id"]]
    # First use may happen outside an app context.
    assert flow.async_routes.start(app) is None
    close_app(app)
    with app.app_context():
        assert db.engine.pool.checkedout() == 0
        db.engine.dispose()


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Any]:
    """Return ``make_config(engine, target, leaves_alone)``, which configures Alembic."""
    pytest.importorskip("alembic")
    from alembic.config import Config

    (tmp_path / "migrations" / "versions").mkdir(parents=True)
    (tmp_path / "migrations" / "env.py").write_text(ENV)
    (tmp_path / "migrations" / "script.py.mako").write_text(SCRIPT)

    def make(engine: Any, target: Any, leaves_alone: bool) -> Any:
        config = Config(stdout=io.StringIO())
        config.set_main_option("script_location", str(tmp_path / "migrations"))
        config.set_main_option("path_separator", "os")
        config.attributes.update(engine=engine, target=target, leaves_alone=leaves_alone)
        return config

    return make


def test_alembic_can_ignore_the_tables_of_the_extension(
    postgresql_server: str, make_config: Callable[..., Any]
) -> None:
    pytest.importorskip("alembic")
    from alembic import command

    own = MetaData()
    Table("mine", own, Column("id", Integer, primary_key=True))
    with new_postgresql_database(postgresql_server) as url:
        store = make_store(url, "", "test", True)
        store.open()
        config = make_config(engine_of(url), own, leaves_alone=True)
        script = command.revision(config, "first", autogenerate=True)
        source = Path(script.path).read_text()
        assert "create_table('mine'" in source
        assert "asyncroute" not in source
        command.upgrade(config, "head")
        with engine_of(url).connect() as connection:
            tables = set(inspect(connection).get_table_names())
        assert tables >= {"mine", *metadata.tables}
        command.check(config)
        store.open()
        store.close()


def test_alembic_can_create_the_tables_of_the_extension(
    postgresql_server: str, make_config: Callable[..., Any]
) -> None:
    """Afterwards it finds no difference, whether Alembic or the store created the tables."""
    pytest.importorskip("alembic")
    from alembic import command

    with new_postgresql_database(postgresql_server) as url:
        config = make_config(engine_of(url), metadata, leaves_alone=False)
        store = make_store(url, "", "test", False)
        with pytest.raises(ConfigurationError, match="ASYNCROUTE_CREATE_TABLES"):
            store.open()
        command.revision(config, "tasks", autogenerate=True)
        command.upgrade(config, "head")
        store.open()
        assert store.secret()
        command.check(config)
        store.close()
    with new_postgresql_database(postgresql_server) as url:
        store = make_store(url, "", "test", True)
        store.open()
        store.close()
        config = make_config(engine_of(url), metadata, leaves_alone=False)
        command.stamp(config, "head")
        command.check(config)
