"""List queries over many stored tasks, at the store and through HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flask import Flask, request

from flask_asyncroute import Access, AsyncRoute
from flask_asyncroute.query import NEWEST_FIRST, parse_mapping
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.stores.base import Readers
from flask_asyncroute.task import rfc3339

from . import stored
from .calls import Times, call, environ_of

LIMIT = 100
ROUNDS = 200
SPAN = "state + user + time"
MANY_MS = 2.0
"""Limit for the newest 100 of one state, user and time span, at the store."""
CALLER_MS = 5.0
"""Limit for any other query of any caller, at the store."""
HTTP_MS = 6.0
"""Limit for any query through HTTP."""
ADMIN = {"HTTP_X_USER": "root", "HTTP_X_ROLE": "admin"}
OWNER = {"HTTP_X_USER": stored.SOME_USER}
MEMBER = {"HTTP_X_USER": "member", "HTTP_X_GROUP": stored.SOME_GROUP}
STRANGER = {"HTTP_X_USER": "stranger", "HTTP_X_GROUP": "nobodys"}


Caller = tuple[str, dict[str, str], Readers | None]
"""The name of a caller in the table, the headers of their requests, and what they may read at the
store.
"""


@dataclass(frozen=True)
class Measured:
    """The times of one query.

    :param who: the caller.
    :param what: the query.
    :param found: how many tasks were returned.
    """

    who: str
    what: str
    found: int
    store: Times
    http: Times

    @property
    def name(self) -> str:
        """The caller and the query."""
        return f"{self.who}: {self.what}"

    @property
    def target_ms(self) -> float:
        """The limit for the median at the store."""
        return MANY_MS if self.what == SPAN and self.who == "admin" else CALLER_MS


@dataclass(frozen=True)
class Filled:
    """A folder with a store of many tasks.

    :param count: how many tasks the store has.
    """

    folder: Path
    count: int

    @contextmanager
    def app(self, lists_anonymous: bool) -> Iterator[Flask]:
        """Yield an app on the store. Close it before you open the next.

        :param lists_anonymous: whether lists include tasks without an owner.
        """
        app = _make_app(self.folder, lists_anonymous)
        try:
            yield app
        finally:
            runtime_of(app).close()


@contextmanager
def filled(count: int) -> Iterator[Filled]:
    """Yield a temporary store with ``count`` tasks."""
    with TemporaryDirectory(prefix="asyncroute-bench-") as folder:
        stored.fill(Path(folder) / "asyncroute.db", "many", count)
        yield Filled(Path(folder), count)


def _make_app(folder: Path, lists_anonymous: bool) -> Flask:
    app = Flask("many", instance_path=str(folder))
    app.config.update(
        ASYNCROUTE_LIST_ANONYMOUS=lists_anonymous, ASYNCROUTE_ADMINS=Access(roles=("admin",))
    )
    async_routes = AsyncRoute(app)

    @async_routes.identity_loader
    def identity() -> Mapping[str, Any] | None:
        user = request.headers.get("X-User")
        if user is None:
            return None
        group, role = request.headers.get("X-Group"), request.headers.get("X-Role")
        return {"id": user, "groups": [group] if group else [], "roles": [role] if role else []}

    return app


def measure(store: Filled, rounds: int = ROUNDS) -> list[Measured]:
    """Measure queries for the newest 100 tasks, by state, user and time span and without
    conditions, for each kind of caller.
    """
    count = store.count
    span: dict[str, Any] = {
        "State": {"value": "Completed"},
        "User": {"value": stored.SOME_USER},
        "CreationTime": [
            {"op": "GE", "value": rfc3339(stored.moment_us(count, 0.2))},
            {"op": "LT", "value": rfc3339(stored.moment_us(count, 0.8))},
        ],
    }
    completed = {"State": {"value": "Completed"}}
    owned = Readers(stored.SOME_USER, (("users", stored.SOME_USER),), True)
    member = Readers("member", (("users", "member"), ("groups", stored.SOME_GROUP)), True)
    stranger = Readers("stranger", (("users", "stranger"), ("groups", "nobodys")))
    open_callers: list[Caller] = [
        ("admin", ADMIN, None), ("owner", OWNER, owned), ("group member", MEMBER, member),
        ("anonymous", {}, Readers(anonymous=True)),
    ]  # fmt: skip
    strict_callers: list[Caller] = [("may read nothing", STRANGER, stranger)]
    questions = [(SPAN, span), ("state", completed), ("all", {})]
    measured = []
    for lists_anonymous, callers in (True, open_callers), (False, strict_callers):
        with store.app(lists_anonymous) as app:
            measured += [
                _measure(app, caller, what, question, rounds)
                for what, question in questions
                for caller in callers
            ]
    return measured


def _measure(
    app: Flask, caller: Caller, what: str, question: dict[str, Any], rounds: int
) -> Measured:
    who, headers, readers = caller
    conditions = parse_mapping(question)
    store = runtime_of(app).runner.store
    found: list[Any] = []

    def at_store() -> float:
        began = time.perf_counter()
        found[:] = store.query(conditions, NEWEST_FIRST, LIMIT, None, readers)
        return time.perf_counter() - began

    def through_http() -> float:
        answer = call(
            app, environ_of("POST", f"/tasks/query?limit={LIMIT}", question, headers), 200
        )
        if len(answer.json()) != len(found):
            raise AssertionError(
                f"{who}, {what}: the store found {len(found)}, HTTP {len(answer.json())}."
            )
        return answer.seconds

    times = Times(), Times()
    for take, measured in zip((at_store, through_http), times, strict=True):
        _take(take, measured, rounds)
    return Measured(who, what, len(found), *times)


def _take(take: Callable[[], float], measured: Times, rounds: int) -> None:
    for _ in range(10):
        take()
    for _ in range(rounds):
        measured.seconds.append(take())
