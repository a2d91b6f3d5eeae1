"""Lists over very many stored tasks: at the store, and through HTTP."""

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
"""The newest 100 of one state, user and time span, at the store."""
CALLER_MS = 5.0
"""Whatever anybody asks for, at the store."""
HTTP_MS = 6.0
"""Through HTTP."""
ADMIN = {"HTTP_X_USER": "root", "HTTP_X_ROLE": "admin"}
OWNER = {"HTTP_X_USER": stored.SOME_USER}
MEMBER = {"HTTP_X_USER": "member", "HTTP_X_GROUP": stored.SOME_GROUP}
STRANGER = {"HTTP_X_USER": "stranger", "HTTP_X_GROUP": "nobodys"}


@dataclass(frozen=True)
class Measured:
    """What one query took.

    :param who: who asked.
    :param what: what for.
    :param found: how many tasks came back.
    """

    who: str
    what: str
    found: int
    store: Times
    http: Times

    @property
    def name(self) -> str:
        """Who asks for what."""
        return f"{self.who}: {self.what}"

    @property
    def target_ms(self) -> float:
        """What the store may take at most, by the median."""
        return MANY_MS if self.what == SPAN and self.who == "admin" else CALLER_MS


@dataclass(frozen=True)
class Filled:
    """Two apps on one store: in one, lists have what belongs to nobody; in the other they do not.

    :param count: how many tasks the store has.
    """

    count: int
    open: Flask
    strict: Flask


@contextmanager
def filled(count: int) -> Iterator[Filled]:
    """Give apps on a temporary store with ``count`` tasks."""
    with TemporaryDirectory(prefix="asyncroute-bench-") as folder:
        stored.fill(Path(folder) / "asyncroute.db", "many", count)
        made = Filled(count, _make_app(folder, True), _make_app(folder, False))
        try:
            yield made
        finally:
            runtime_of(made.open).close()
            runtime_of(made.strict).close()


def _make_app(folder: str, lists_anonymous: bool) -> Flask:
    app = Flask("many", instance_path=folder)
    app.config.update(ASYNCROUTE_LIST_ANONYMOUS=lists_anonymous, ASYNCROUTE_ADMINS=Access(roles=("admin",)))
    async_routes = AsyncRoute(app)

    @async_routes.identity_loader
    def identity() -> Mapping[str, Any] | None:
        user = request.headers.get("X-User")
        if user is None:
            return None
        group, role = request.headers.get("X-Group"), request.headers.get("X-Role")
        return {"id": user, "groups": [group] if group else [], "roles": [role] if role else []}

    return app


def measure(made: Filled, rounds: int = ROUNDS) -> list[Measured]:
    """Return what the newest 100 take: of one state, user and time span, and without any condition; asked by anybody."""
    count = made.count
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
    callers: list[tuple[str, dict[str, str], Readers | None]] = [
        ("admin", ADMIN, None), ("owner", OWNER, owned), ("group member", MEMBER, member),
        ("anonymous", {}, Readers(anonymous=True)), ("may read nothing", STRANGER, stranger),
    ]  # fmt: skip
    questions = [(SPAN, span), ("state", completed), ("all", {})]
    return [
        _measure(made, who, what, question, headers, readers, rounds)
        for what, question in questions
        for who, headers, readers in callers
    ]


def _measure(
    made: Filled,
    who: str,
    what: str,
    question: dict[str, Any],
    headers: dict[str, str],
    readers: Readers | None,
    rounds: int,
) -> Measured:
    conditions = parse_mapping(question)
    app = made.open if readers is None or readers.anonymous else made.strict
    store = runtime_of(app).runner.store
    found: list[Any] = []

    def at_store() -> float:
        began = time.perf_counter()
        found[:] = store.query(conditions, NEWEST_FIRST, LIMIT, None, readers)
        return time.perf_counter() - began

    def through_http() -> float:
        answer = call(app, environ_of("POST", f"/tasks/query?limit={LIMIT}", question, headers), 200)
        if len(answer.json()) != len(found):
            raise AssertionError(f"{who}, {what}: the store found {len(found)}, HTTP {len(answer.json())}.")
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
