"""The Python client against gunicorn: many tasks at once, restarts, killed workers, lost responses."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import pytest
import requests

from flask_asyncroute.client import AsyncRouteClient, RemoteTask
from tests.support.apps.crowd import read_journal
from tests.support.client import send
from tests.support.proxy import Proxy
from tests.support.server import START, Server, gunicorn

pytestmark = pytest.mark.live

Eventually = Callable[..., Any]
TASKS = 50
SECONDS = 60.0


def serve(folder: Path, *options: str, **config: Any) -> Server:
    """Return a gunicorn with two workers. The header ``X-User`` names the caller."""
    arguments = "".join(f", {name}={value!r}" for name, value in config.items())
    app = f"create_app({str(folder)!r}, max_streams=8, drain=0.5{arguments})"
    return gunicorn(
        folder / "log", f"tests.support.apps.known:{app}", "--workers", "2", "--threads", "16",
        "--access-logfile", str(folder / "access"), *options, conf=START,
    )  # fmt: skip


def session_of(user: str | None) -> requests.Session:
    session = requests.Session()
    if user is not None:
        session.headers["X-User"] = user
    return session


def requests_of(folder: Path) -> Counter[str]:
    """Return how often each kind of request was answered."""
    lines = (folder / "access").read_text().splitlines()
    found: Counter[str] = Counter()
    for line in lines:
        method, path = line.split('"')[1].split()[:2]
        is_task = path.startswith("/task/") and not path.endswith("/events")
        found[f"{method} /task" if is_task else f"{method} {path}"] += 1
    return found


def runs(folder: Path) -> Counter[str]:
    return Counter(line["id"] for line in read_journal(folder) if line["what"] == "begin")


@pytest.fixture(params=["ann", None], ids=["stream", "polling"])
def user(request: pytest.FixtureRequest) -> str | None:
    found: str | None = request.param
    return found


@pytest.fixture
def kept() -> Iterator[list[AsyncRouteClient]]:
    """Return a list of clients that are closed at the end."""
    clients: list[AsyncRouteClient] = []
    yield clients
    for client in clients:
        client.close()


def connect(kept: list[AsyncRouteClient], port: int, user: str | None) -> AsyncRouteClient:
    kept.append(AsyncRouteClient(f"http://127.0.0.1:{port}", session_of(user)))
    return kept[0]


def test_fifty_tasks_are_followed_at_once(
    tmp_path: Path, user: str | None, kept: list[AsyncRouteClient], eventually: Eventually
) -> None:
    with serve(tmp_path) as server:
        client = connect(kept, server.port, user)
        tasks = [client.start("PUT", f"/work/{number * 40}") for number in range(TASKS)]
        names = {thread.name for thread in threading.enumerate()}
        assert len([name for name in names if name == "asyncroute-client"]) == 1
        done = list(as_completed(tasks, SECONDS))
        assert len({task.result()["Pid"] for task in done}) <= 2
        kept.pop().close()
        if user is not None:
            eventually(lambda: requests_of(tmp_path)["GET /tasks/events"] == 1, 20)
            # One read for each Result, and some for tasks that began before the stream.
            assert requests_of(tmp_path)["GET /task"] <= 2 * TASKS
        else:
            assert requests_of(tmp_path)["GET /tasks/events"] == 0
        server.assert_no_traceback()


def test_tasks_are_followed_over_a_restart_and_killed_workers(
    tmp_path: Path, user: str | None, kept: list[AsyncRouteClient], eventually: Eventually
) -> None:
    with serve(tmp_path) as server:
        client = connect(kept, server.port, user)
        tasks = [client.start("PUT", "/again/3000") for _ in range(TASKS)]
        eventually(lambda: len(runs(tmp_path)) >= 4, 20)
        server.reload()
        os.kill(server.a_worker(), signal.SIGKILL)
        server.a_worker()
        port = server.port
    # A new server on the same port takes over the tasks.
    with serve(tmp_path, "--bind", f"127.0.0.1:{port}"):
        for task in as_completed(tasks, SECONDS):
            assert task.exception() is None or "Worker lost" in str(task.exception())
        assert all(task.state in ("Completed", "Aborted") for task in tasks)
        assert sum(task.state == "Completed" for task in tasks) >= TASKS - 8
        for task in tasks:
            assert send(port, "GET", f"/task/{task.id}", headers=_headers(user)).json() == task.task


def _headers(user: str | None) -> dict[str, str]:
    return {} if user is None else {"X-User": user}


def test_nothing_starts_twice_behind_a_proxy_that_drops_every_third_response(
    tmp_path: Path, user: str | None, kept: list[AsyncRouteClient], eventually: Eventually
) -> None:
    with serve(tmp_path) as server:
        proxy = Proxy(("127.0.0.1", server.port))
        number = 0

        def cut(data: bytes) -> str | None:
            nonlocal number
            number += 1
            return "after" if number % 3 == 0 else None

        proxy.cut = cut
        try:
            client = connect(kept, proxy.port, user)
            found: list[RemoteTask] = []

            def start() -> None:
                for _ in range(10):
                    found.append(client.start("PUT", "/work/100", json={"a": 1}))

            threads = [threading.Thread(target=start) for _ in range(5)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(SECONDS)
            begin = time.monotonic()
            results = [task.result(SECONDS) for task in found]
            assert time.monotonic() - begin < SECONDS
        finally:
            kept.pop().close()
            proxy.close()
        assert len(results) == len({task.id for task in found}) == TASKS
        assert proxy.cuts >= TASKS / 3
        assert runs(tmp_path) == Counter({task.id: 1 for task in found})


def test_events_are_resumed_when_the_connection_breaks(
    tmp_path: Path, kept: list[AsyncRouteClient], eventually: Eventually
) -> None:
    with serve(tmp_path) as server:
        proxy = Proxy(("127.0.0.1", server.port))
        try:
            task = connect(kept, proxy.port, "ann").start("PUT", "/talk")
            numbers: list[int] = []
            for event in task.events():
                if event.name == "word":
                    numbers.append(event.data["n"])
                    if len(numbers) == 6:
                        (tmp_path / "enough").touch()
                    elif len(numbers) % 2:
                        proxy.break_off()
                    (tmp_path / f"heard-{event.data['n']}").touch()
            assert numbers == list(range(len(numbers))) and len(numbers) >= 6
            assert event.name == "task.completed" and event.data["State"] == "Completed"
            assert task.wait(SECONDS)["State"] == "Completed"
        finally:
            kept.pop().close()
            proxy.close()
