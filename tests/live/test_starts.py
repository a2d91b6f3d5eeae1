"""Repeated and excessive starts on real servers with several processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.stress import test_overload as overload
from tests.support.apps.crowd import read_journal
from tests.support.client import Reply, send
from tests.support.server import gunicorn

pytestmark = pytest.mark.live


@pytest.mark.covers("A75")
def test_sixteen_concurrent_starts_on_four_processes_create_one_task(
    tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    app = f"tests.support.apps.crowd:create_app({str(tmp_path)!r})"
    with gunicorn(tmp_path / "log", app, "--workers", "4", "--threads", "4") as server:
        pids: set[int] = set()
        for number in range(5):
            replies = sixteen_starts(server.port, f"key-{number}")
            assert {reply.status for reply in replies} <= {200, 202}
            assert len({reply.json()["Id"] for reply in replies}) == 1
            pids |= {reply.pid for reply in replies}
        assert len(pids) > 1
        eventually(lambda: begun(tmp_path) == 5 == begun(tmp_path, "end"), 20)
        assert "Traceback" not in server.output()


def sixteen_starts(port: int, key: str) -> list[Reply]:
    barrier = threading.Barrier(16)
    replies: list[Reply] = []

    def start() -> None:
        barrier.wait(10)
        headers = {"Idempotency-Key": key, "Cookie": "who=anna"}
        replies.append(send(port, "PUT", "/work/20", body=b"x" * 300_000, headers=headers))

    threads = [threading.Thread(target=start) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(replies) == 16
    return replies


def begun(folder: Path, what: str = "begin") -> int:
    return sum(line["what"] == what for line in read_journal(folder))


@pytest.mark.covers("A75")
def test_two_keys_are_refused(tmp_path: Path) -> None:
    with gunicorn(
        tmp_path / "log", f"tests.support.apps.crowd:create_app({str(tmp_path)!r})"
    ) as server:
        http = HTTPConnection("127.0.0.1", server.port, timeout=10)
        http.putrequest("PUT", "/work/1")
        for name, value in (
            ("Cookie", "a=1"),
            ("Idempotency-Key", "a"),
            ("Idempotency-Key", "a"),
            ("Content-Length", "0"),
        ):
            http.putheader(name, value)
        http.endheaders()
        assert http.getresponse().status == 400
        http.close()


@pytest.mark.covers("A69")
def test_a_flood_of_starts_on_two_processes(tmp_path: Path) -> None:
    assert overload.flood(tmp_path, queue_size=20, quota=5)
