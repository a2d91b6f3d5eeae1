"""The hot path: starts, gets, stops and lists, measured beside a plain view in one run.

The cases alternate call by call in random order, so that disturbances and the state of caches
affect all of them alike.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from flask import Flask

from .apps import close, executor_of, make_async_app, make_plain_app
from .calls import Answer, Times, call, environ_of

BODY = {"sleep_time": 2, "message": "Hello from a client"}
PATIENCE = 30.0
SLOW = ("stop", "list of 50")
"""Cases that are measured only in every fifth round."""
SPIN = 0.0003
"""Seconds of busy waiting before each call, because the processor slows down during a sleep."""
STORES = {"memory": "memory://", "sqlite": None}
TARGETS = {
    ("start", "memory"): 1.7,
    ("start", "sqlite"): 2.7,
    ("get", "memory"): 1.5,
    ("get", "sqlite"): 1.5,
}
"""The highest accepted ratio to the plain view, by the medians."""


@dataclass
class Case:
    """One kind of call.

    :param plain: the case it is compared with; None: it is itself a plain case.
    :param prepare: runs before each call and is not measured.
    :param clean_up: runs after each call and is not measured.
    """

    name: str
    store: str
    make: Callable[[], dict[str, Any]]
    app: Flask
    status: int
    plain: Case | None = None
    clean_up: Callable[[], object] = lambda: None
    prepare: Callable[[], object] = lambda: None
    times: Times = field(default_factory=Times)

    @property
    def ratio(self) -> float:
        """The ratio of the median to that of the plain case."""
        return 1.0 if self.plain is None else self.times.median_us / self.plain.times.median_us

    @property
    def target(self) -> float | None:
        """The highest accepted ratio; None: no limit."""
        return TARGETS.get((self.name, self.store))

    def measure(self) -> None:
        """Measure one call."""
        self.prepare()
        environ = self.make()
        until = time.perf_counter() + SPIN
        while time.perf_counter() < until:
            pass
        self.times.seconds.append(call(self.app, environ, self.status).seconds)
        self.clean_up()


def wait_until(condition: Callable[[], bool], what: str, interval: float = 0.0002) -> None:
    """Wait for a condition.

    :param interval: seconds between two checks.
    :raises TimeoutError: after ``PATIENCE`` seconds.
    """
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} took over {PATIENCE} s.")
        time.sleep(interval)


class Bench:
    """The apps of one comparison. Call `close` at the end."""

    def __init__(self, folder: Path) -> None:
        self.apps = {name: make_async_app(folder / name, store) for name, store in STORES.items()}
        self.ids: dict[str, str] = {}
        answer: Answer | None = None
        for name, app in self.apps.items():
            for _ in range(60):
                answer = call(app, environ_of("PUT", "/quick", BODY), 202)
            assert answer is not None
            self.ids[name] = answer.json()["Id"]
            self.drain(app)
        assert answer is not None
        found = call(
            self.apps["sqlite"], environ_of("GET", f"/task/{self.ids['sqlite']}"), 200
        ).json()
        self.plain = make_plain_app(answer.json(), found)

    def close(self) -> None:
        """Close all apps."""
        for app in self.apps.values():
            close(app)

    def drain(self, app: Flask, endpoint: str = "quick") -> None:
        """Wait until no task runs or waits."""
        executor = executor_of(app, endpoint)
        wait_until(lambda: executor.free() == 2, "Draining the queue")

    def cases(self) -> list[Case]:
        """Return all cases, plain cases first."""
        plain_start = Case(
            "plain PUT", "", lambda: environ_of("PUT", "/plain", BODY), self.plain, 202
        )
        some = self.ids["sqlite"]
        plain_get = Case(
            "plain GET", "", lambda: environ_of("GET", f"/plain/{some}"), self.plain, 200
        )
        found = [plain_start, plain_get]
        for store, app in self.apps.items():
            found += [
                Case(
                    "start",
                    store,
                    lambda: environ_of("PUT", "/quick", BODY),
                    app,
                    202,
                    plain_start,
                    clean_up=partial(self.drain, app),
                ),
                Case(
                    "get",
                    store,
                    partial(environ_of, "GET", f"/task/{self.ids[store]}"),
                    app,
                    200,
                    plain_get,
                ),
                self._stop(store, app, plain_get),
                Case(
                    "list of 50",
                    store,
                    lambda: environ_of("GET", "/tasks?limit=50"),
                    app,
                    200,
                    plain_get,
                ),
            ]
        return found

    def _stop(self, store: str, app: Flask, plain: Case) -> Case:
        started: list[str] = []

        def prepare() -> None:
            started[:] = [call(app, environ_of("PUT", "/long", BODY), 202).json()["Id"]]
            path = f"/task/{started[0]}"
            wait_until(
                lambda: call(app, environ_of("GET", path), 200).json()["State"] == "Running",
                "Starting a task",
            )

        return Case(
            "stop", store, lambda: environ_of("DELETE", f"/task/{started[0]}"), app, 200, plain,
            clean_up=partial(self.drain, app, "long"), prepare=prepare,
        )  # fmt: skip


def compare(bench: Bench, rounds: int) -> list[Case]:
    """Measure all cases with an idle queue at each call; return them with their times."""
    cases = bench.cases()
    order = random.Random(1)
    for case in cases:
        for _ in range(30):
            case.measure()
        case.times = Times()
    gc.collect()
    gc.freeze()
    try:
        for number in range(rounds):
            turn = [case for case in cases if number % 5 == 0 or case.name not in SLOW]
            order.shuffle(turn)
            for case in turn:
                case.measure()
    finally:
        gc.unfreeze()
    return cases


def compare_under_load(bench: Bench, rounds: int) -> list[Case]:
    """Measure starts and gets while the started tasks run; return the cases with their times."""
    cases = [
        case for case in bench.cases() if case.name in ("plain PUT", "plain GET", "start", "get")
    ]
    for _ in range(rounds):
        for case in cases:
            case.clean_up = lambda: None
            case.measure()
    for app in bench.apps.values():
        bench.drain(app)
    return cases


def tasks_per_second(bench: Bench, store: str, count: int) -> float:
    """Return how many tasks per second are started, run and finished, with one client and two
    threads in this process.
    """
    app = bench.apps[store]
    began = time.perf_counter()
    for _ in range(count):
        call(app, environ_of("PUT", "/quick", BODY), 202)
    bench.drain(app)
    return count / (time.perf_counter() - began)
