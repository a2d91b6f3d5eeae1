"""Flask-SQLAlchemy: the session of a task, its connection, and both in one SQLite file."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask_compress import Compress
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import QueuePool, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from tests.support.apps import close_app
from tests.support.flow import Flow, path_of

MakeFlow = Callable[..., Flow]
MakeDb = Callable[..., tuple[Flow, Any, Any]]


@pytest.fixture
def make_db(make_flow: MakeFlow) -> Iterator[MakeDb]:
    """Return ``make_db(**config)``, which creates an app, its database ``app.db`` and the model
    Book.
    """
    made: list[tuple[Flow, Any]] = []

    def make(**config: Any) -> tuple[Flow, Any, Any]:
        class Base(DeclarativeBase): ...

        db: Any = SQLAlchemy(model_class=Base)

        class Book(db.Model):  # type: ignore[name-defined, misc]
            id: Mapped[int] = mapped_column(primary_key=True)
            title: Mapped[str] = mapped_column(String(50), unique=True)

        flow = make_flow(SQLALCHEMY_DATABASE_URI="sqlite:///app.db", **config)
        db.init_app(flow.app)
        with flow.app.app_context():
            db.create_all()
        made.append((flow, db))
        return flow, db, Book

    yield make
    for flow, db in made:
        close_app(flow.app)
        with flow.app.app_context():
            assert db.engine.pool.checkedout() == 0
            db.engine.dispose()


def test_a_task_has_a_session_of_its_own_which_ends_with_it(make_db: MakeDb) -> None:
    flow, db, Book = make_db()
    sessions = []

    @flow.route("/books/<title>")
    def add(title: str) -> Any:
        db.session.add(Book(title=title))
        db.session.commit()
        sessions.append(db.session())
        assert db.session.connection()  # It is left open.
        return db.session.scalar(db.select(db.func.count()).select_from(Book))

    @flow.app.get("/titles")
    def titles() -> Any:
        return list(db.session.scalars(db.select(Book.title)))

    assert [flow.result(f"/books/{title}") for title in "ab"] == [1, 2]
    assert flow.client.get("/titles").get_json() == ["a", "b"]
    assert sessions[0] is not sessions[1]
    with flow.app.app_context():
        assert db.engine.pool.checkedout() == 0


def test_what_a_failed_or_stopped_task_did_not_commit_is_rolled_back(
    make_db: MakeDb, begun: threading.Semaphore
) -> None:
    flow, db, Book = make_db()

    @flow.route("/fail")
    def fail() -> None:
        db.session.add_all([Book(title="a"), Book(title="a")])
        db.session.flush()

    @flow.route("/hang", interrupt_after=0)
    def hang() -> None:
        db.session.add(Book(title="b"))
        db.session.flush()
        begun.release()
        while True:
            time.sleep(0.001)

    @flow.route("/titles")
    def titles() -> Any:
        return list(db.session.scalars(db.select(Book.title)))

    assert flow.error("/fail").startswith("IntegrityError: ")
    task = flow.start("/hang")
    assert begun.acquire(timeout=5)
    flow.stop(task)
    flow.still(task)
    assert flow.result("/titles") == []
    with flow.app.app_context():
        assert db.engine.pool.checkedout() == 0


def test_an_object_as_result_fails_with_a_hint(make_db: MakeDb) -> None:
    flow, db, Book = make_db()

    @flow.route()
    def work() -> Any:
        book = Book(title="a")
        db.session.add(book)
        db.session.commit()
        return book

    error = flow.error()
    assert "Book" in error, error


def test_store_and_app_in_one_sqlite_file(make_db: MakeDb) -> None:
    """It works, but a long transaction of the app delays starts, because SQLite has one writer."""
    flow, db, Book = make_db(ASYNCROUTE_STORE="sqlite:///app.db")

    @flow.route("/books/<title>")
    def add(title: str) -> Any:
        db.session.add(Book(title=title))
        db.session.commit()
        return db.session.scalar(db.select(db.func.count()).select_from(Book))

    assert [flow.result(f"/books/{number}") for number in range(5)] == [1, 2, 3, 4, 5]
    with flow.app.app_context():
        assert {"asyncroute_tasks", "book"} <= set(db.inspect(db.engine).get_table_names())


@pytest.mark.parametrize("accepted", ["identity", "gzip", "br", "zstd"])
def test_a_wait_holds_no_connection(
    make_db: MakeDb, gate: threading.Event, begun: threading.Semaphore, accepted: str
) -> None:
    """This includes a wait whose streamed response is compressed by Flask-Compress."""
    one = {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
    flow, db, Book = make_db(SQLALCHEMY_ENGINE_OPTIONS=one, COMPRESS_MIN_SIZE=1)
    Compress(flow.app)
    is_known = threading.Semaphore(0)

    @flow.async_routes.identity_loader
    def load_identity() -> dict[str, str]:
        found = db.session.scalar(db.text("SELECT 'ann'"))
        is_known.release()
        return {"id": found}

    @flow.route()
    def work() -> None:
        begun.release()
        gate.wait(10)

    task = flow.start()
    assert begun.acquire(timeout=5) and is_known.acquire(timeout=5)
    waiting = Flow(flow.app, flow.async_routes)
    waiting.headers = {"Accept-Encoding": accepted}

    def wait() -> int:
        response = waiting.request("GET", f"{path_of(task)}?wait=20")
        assert response.get_data()
        return response.status_code

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(wait)
        assert is_known.acquire(timeout=5)
        for _ in range(3):
            assert flow.get(task)["State"] == "Running"
        assert not answer.done()
        gate.set()
        assert answer.result(10) == 200
