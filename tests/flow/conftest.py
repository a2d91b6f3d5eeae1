"""Apps for the flow tests: on each store where it matters, else on ``memory://``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from blinker import NamedSignal
from flask import Flask, request

from flask_asyncroute import AsyncRoute
from tests.flow.driving import Flow

STORES = {"memory": "memory://", "sqlite": "sqlite:///asyncroute.db"}


@pytest.fixture(params=[*STORES, "postgresql"])
def store_url(request: pytest.FixtureRequest) -> str:
    """Give the URL of each kind of store."""
    return STORES.get(request.param) or str(request.getfixturevalue("postgresql_url"))


@pytest.fixture
def make_flow(make_app: Callable[..., Flask]) -> Callable[..., Flow]:
    """Give ``make_flow(decorators=(), **config)``: an app with the extension, on ``memory://`` where nothing else is said.

    Who asks is told by the header ``X-User``: ``anna; groups=a,b; roles=c``.
    """

    def make(decorators: Any = (), **config: Any) -> Flow:
        app = make_app(**{"ASYNCROUTE_STORE": "memory://", **config})
        async_routes = AsyncRoute(app, decorators=decorators)
        async_routes.identity_loader(identity_of_header)
        return Flow(app, async_routes)

    return make


@pytest.fixture
def flow(make_flow: Callable[..., Flow], store_url: str) -> Flow:
    """Give an app with the extension on each store."""
    return make_flow(ASYNCROUTE_STORE=store_url)


@pytest.fixture
def own_pool() -> Iterator[ThreadPoolExecutor]:
    """Give an Executor of the app's own."""
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture(params=["thread", "immediate", "own"])
def executor(request: pytest.FixtureRequest) -> Any:
    """Give each kind of executor."""
    return request.getfixturevalue("own_pool") if request.param == "own" else request.param


@pytest.fixture(params=["thread", "own"])
def later_executor(request: pytest.FixtureRequest) -> Any:
    """Give each kind of executor that runs a task after its start was answered."""
    return request.getfixturevalue("own_pool") if request.param == "own" else request.param


def identity_of_header() -> dict[str, Any] | None:
    """Say who asks, as the header ``X-User`` has it."""
    said = request.headers.get("X-User")
    if said is None:
        return None
    name, *kinds = said.split(";")
    held = {kind.partition("=")[0].strip(): kind.partition("=")[2].split(",") for kind in kinds}
    return {"id": name, **held}


@pytest.fixture
def listen() -> Iterator[Callable[..., None]]:
    """Give ``listen(function, *signals, sender=app)``: connects a receiver until the end."""
    connected: list[tuple[NamedSignal, Callable[..., Any]]] = []

    def connect(function: Callable[..., Any], *which: NamedSignal, sender: Flask) -> None:
        for signal in which:
            signal.connect(function, sender, weak=False)
            connected.append((signal, function))

    yield connect
    for signal, function in connected:
        signal.disconnect(function)


@pytest.fixture
def begun() -> threading.Semaphore:
    """Give what views release when they begin, and tests acquire: a claimed task may still be stopped before its view."""
    return threading.Semaphore(0)
