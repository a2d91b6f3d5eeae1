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


@contextmanager
def filled_app(count: int) -> Iterator[Flask]:
    """Give an app on a temporary store with ``count`` tasks."""
    with TemporaryDirectory(prefix="asyncroute-bench-") as folder:
        path = Path(folder) / "asyncroute.db"
        app = Flask("many", instance_path=folder)
        app.config.update(ASYNCROUTE_LIST_ANONYMOUS=True, ASYNCROUTE_ADMINS=Access(roles=("admin",)))
        async_routes = AsyncRoute(app)

        @async_routes.identity_loader
        def identity() -> Mapping[str, Any] | None:
            user = request.headers.get("X-User")
            if user is None:
                return None
            groups = [name for name in (request.headers.get("X-Group"),) if name]
            return {"id": user, "groups": groups, "roles": [name for name in (request.headers.get("X-Role"),) if name]}

        stored.fill(path, "many", count)
        try:
            yield app
        finally:
            runtime_of(app).close()


def measure(app: Flask, count: int, rounds: int = ROUNDS) -> list[Measured]:
    """Return what the newest 100 take: of one state, user and time span, and without any condition; asked by anybody."""
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
    questions = [("state + user + time", span), ("state", completed), ("all", {})]
    return [
        _measure(app, who, what, question, headers, readers, rounds)
        for what, question in questions
        for who, headers, readers in callers
    ]


def _measure(
    app: Flask,
    who: str,
    what: str,
    question: dict[str, Any],
    headers: dict[str, str],
    readers: Readers | None,
    rounds: int,
) -> Measured:
    conditions = parse_mapping(question)
    store = runtime_of(app).runner.store
    # Those who may read nothing must not be given what belongs to nobody either.
    app_config = runtime_of(app).runner.config
    lists_anonymous = who != "may read nothing"
    object.__setattr__(app_config, "list_anonymous", lists_anonymous)
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
