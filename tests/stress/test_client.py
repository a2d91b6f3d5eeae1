"""The Python client while workers of gunicorn are killed, the server is restarted, and a proxy drops
every third response: it starts nothing twice and follows every task to its end.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import pytest
import requests

from flask_asyncroute.client import AsyncRouteClient, RemoteTask
from tests.support.apps.crowd import read_journal
from tests.support.client import send
from tests.support.proxy import Proxy
from tests.support.server import START, Server, gunicorn
from tests.support.waiting import eventually_true

ROUNDS = 20
TASKS = 50
"""Tasks of each client in a round."""
STARTERS = 10
"""Threads of each client that start tasks."""
MILLISECONDS = 150
SECONDS = 60.0
ROUTES = ("work", "again")
"""A lost task of the second route runs again."""
LOST = ("Worker lost", "Server shutdown")
USERS = ("ann", None)
"""The first client follows its tasks with a stream, the second one by polling."""


def serve(folder: Path, port: int = 0) -> Server:
    app = f"tests.support.apps.known:create_app({str(folder)!r}, max_streams=8, drain=0.5)"
    return gunicorn(
        folder / "log", app, "--workers", "2", "--threads", "16", "--bind", f"127.0.0.1:{port}",
        conf=START,
    )  # fmt: skip


@contextmanager
def dropping(port: int) -> Iterator[Proxy]:
    """Run a proxy that drops every third response while the context lasts."""
    proxy = Proxy(("127.0.0.1", port))
    numbers = count(1)

    def cut(data: bytes) -> str | None:
        is_request = data.startswith((b"GET ", b"PUT "))  # not the body of one
        return "after" if is_request and next(numbers) % 3 == 0 else None

    proxy.cut = cut
    try:
        yield proxy
    finally:
        proxy.close()


def headers_of(user: str | None) -> dict[str, str]:
    return {} if user is None else {"X-User": user}


def connected(stack: ExitStack, port: int, user: str | None) -> AsyncRouteClient:
    session = requests.Session()
    session.headers.update(headers_of(user))
    client = AsyncRouteClient(f"http://127.0.0.1:{port}", session, retry_for=SECONDS)
    return stack.enter_context(client)


def begins(folder: Path) -> Counter[str]:
    """Return how often each task has begun."""
    return Counter(line["id"] for line in read_journal(folder) if line["what"] == "begin")


def wait_for_begins(folder: Path, number: int) -> None:
    """Wait until as many tasks have begun."""
    eventually_true(lambda: len(begins(folder)) >= number, SECONDS)


@pytest.mark.covers("F01", "A93")
def test_nothing_starts_twice_and_every_task_is_followed_to_its_end(
    tmp_path: Path, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    tasks: list[tuple[str | None, RemoteTask]] = []
    killed = restarts = 0
    began = time.monotonic()
    with ExitStack() as stack:
        server = stack.enter_context(serve(tmp_path))
        port = server.port
        proxy = stack.enter_context(dropping(port))
        clients = {user: connected(stack, proxy.port, user) for user in USERS}
        for round_number in range(scaled(ROUNDS)):
            found: list[tuple[str | None, RemoteTask]] = []

            def start(
                user: str | None, number: int, found: list[tuple[str | None, RemoteTask]] = found
            ) -> None:
                for _ in range(TASKS // STARTERS):
                    path = f"/{ROUTES[number % 2]}/{MILLISECONDS}"
                    found.append((user, clients[user].start("PUT", path, json={"a": 1})))

            before = len(begins(tmp_path))
            threads = [
                threading.Thread(target=start, args=(user, number))
                for user in USERS
                for number in range(STARTERS)
            ]
            for thread in threads:
                thread.start()
            wait_for_begins(tmp_path, before + 10)
            os.kill(server.a_worker(), signal.SIGKILL)
            killed += 1
            wait_for_begins(tmp_path, before + 40)
            if round_number % 2:
                server.reload()
            else:
                server.stop()
                server = stack.enter_context(serve(tmp_path, port))
                restarts += 1
            for thread in threads:
                thread.join(2 * SECONDS)
            assert len(found) == len(USERS) * TASKS
            names = [thread.name for thread in threading.enumerate()]
            assert names.count("asyncroute-client") <= len(USERS)
            list(as_completed([task for _, task in found], SECONDS))
            tasks += found
        stored = {
            user: {task["Id"] for task in client.query() if task.get("User") == user}
            for user, client in clients.items()
        }
        check_ends(tasks, stored, port)
    ids = {task.id for _, task in tasks}
    assert len(ids) == len(tasks), "two starts got the same task"
    runs = begins(tmp_path)
    assert runs.keys() <= ids, "a task was started twice"
    for _, task in tasks:
        most = 1 if "/work/" in task.task["Url"] else 3
        assert runs[task.id] <= most, f"{task.task} began {runs[task.id]} times"
        assert runs[task.id] >= 1 or task.state == "Aborted"
    ends = Counter(task.task.get("Error") or task.state for _, task in tasks)
    assert proxy.cuts >= len(tasks) / 3
    figures(
        f"{len(tasks)} tasks, {killed} kills, {restarts} restarts, {proxy.cuts} dropped responses "
        f"in {time.monotonic() - began:.0f} s: {dict(ends)}"
    )


def check_ends(
    tasks: list[tuple[str | None, RemoteTask]],
    stored: dict[str | None, set[str]],
    port: int,
) -> None:
    """Compare what the clients have with the store."""
    for user in USERS:
        assert stored[user] == {task.id for owner, task in tasks if owner == user}
    for user, task in tasks:
        assert task.state == "Completed" or task.task.get("Error") in LOST, task.task
        found = send(port, "GET", f"/task/{task.id}", headers=headers_of(user)).json()
        assert found == task.task
