"""Apps for the flow tests, on each store if it matters, else on ``memory://``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest
from blinker import NamedSignal
from flask import Flask

from flask_asyncroute import AsyncRoute
from tests.support.flow import Flow, identity_of_header
from tests.support.waiting import eventually_true

EXECUTORS = ("executor", "later_executor")
STORES = {"memory": "memory://", "sqlite": "sqlite:///asyncroute.db"}


@pytest.fixture(params=[*STORES, "postgresql"])
def store_url(request: pytest.FixtureRequest) -> str:
    """Return the URL of a store of each kind."""
    return STORES.get(request.param) or str(request.getfixturevalue("postgresql_url"))


@pytest.fixture
def make_flow(
    request: pytest.FixtureRequest, make_app: Callable[..., Flask]
) -> Callable[..., Flow]:
    """Return ``make_flow(decorators=(), **config)``, which creates an app with the extension, by
    default on ``memory://``.

    The header ``X-User`` names the caller: ``anna; groups=a,b; roles=c``.
    """

    def make(decorators: Any = (), **config: Any) -> Flow:
        config = {"ASYNCROUTE_STORE": "memory://", **config}
        callspec = getattr(request.node, "callspec", None)
        if callspec is not None and "celery" in map(callspec.params.get, EXECUTORS):
            config["ASYNCROUTE_CELERY"] = request.getfixturevalue("celery")
            # Celery needs a store that processes can share.
            if config["ASYNCROUTE_STORE"] == "memory://":
                config["ASYNCROUTE_STORE"] = STORES["sqlite"]
        app = make_app(**config)
        async_routes = AsyncRoute(app, decorators=decorators)
        async_routes.identity_loader(identity_of_header)
        return Flow(app, async_routes)

    return make


@pytest.fixture
def flow(make_flow: Callable[..., Flow], store_url: str) -> Flow:
    """Return an app with the extension on each kind of store."""
    return make_flow(ASYNCROUTE_STORE=store_url)


@pytest.fixture
def own_pool() -> Iterator[ThreadPoolExecutor]:
    """Return an Executor that belongs to the app."""
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def celery(shared_celery: Any) -> Iterator[Any]:
    """Return the Celery app, and wait at the end until its worker has nothing left to do: it would
    look for a late task in the app of the next test, which may still lack its routes.
    """
    from celery.worker import state

    def is_idle() -> bool:
        with shared_celery.connection_for_read() as connection:
            queue = shared_celery.conf.task_default_queue
            waiting = connection.default_channel.queue_declare(queue, passive=True).message_count
        return not waiting and not state.reserved_requests

    yield shared_celery
    assert eventually_true(is_idle)


@pytest.fixture(scope="session")
def shared_celery() -> Iterator[Any]:
    """Run a Celery worker in threads of this process, so that it can call the views of tests;
    return its Celery app.

    All tests share it, because it takes 4 s to end.
    """
    pytest.importorskip("celery")
    from celery import signals as celery_signals
    from celery.contrib.testing.worker import start_worker

    from flask_asyncroute import celery_task  # noqa: F401 - registers the task
    from tests.support.brokers import new_celery

    celery = new_celery(
        "memory://", f"flow-{uuid4().hex}", broker_transport_options={"polling_interval": 0.01}
    )

    def leave_logging_alone(**extra: object) -> None:
        """Celery would set the level of the root logger, for all later tests too."""

    celery_signals.setup_logging.connect(leave_logging_alone)
    worker = start_worker(celery, pool="threads", concurrency=8, perform_ping_check=False)
    try:
        with worker:
            yield celery
    finally:
        celery_signals.setup_logging.disconnect(leave_logging_alone)


@pytest.fixture(params=["thread", "immediate", "own", "celery"])
def executor(request: pytest.FixtureRequest) -> Any:
    """Return each kind of executor."""
    return request.getfixturevalue("own_pool") if request.param == "own" else request.param


@pytest.fixture(params=["thread", "own", "celery"])
def later_executor(request: pytest.FixtureRequest) -> Any:
    """Return each kind of executor that runs a task after the start was answered."""
    return request.getfixturevalue("own_pool") if request.param == "own" else request.param


@pytest.fixture
def listen() -> Iterator[Callable[..., None]]:
    """Return ``listen(function, *signals, sender=app)``, which connects a receiver for one test."""
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
    """Return a semaphore that views release and tests acquire.

    A task that is ``Running`` may not have called its view yet.
    """
    return threading.Semaphore(0)
