"""Starts that come again and starts that are too many, at real servers with several processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from prove import overload
from prove.apps.crowd import read_journal
from prove.client import Reply, send
from prove.server import gunicorn

pytestmark = pytest.mark.live


def test_a75_sixteen_at_once_over_four_processes(tmp_path: Path, eventually: Callable[..., Any]) -> None:
    app = f"prove.apps.crowd:create_app({str(tmp_path)!r})"
    with gunicorn(tmp_path / "log", app, "--workers", "4", "--threads", "4") as server:
        pids: set[int] = set()
        for turn in range(5):
            replies = at_once(server.port, f"key-{turn}")
            assert {reply.status for reply in replies} <= {200, 202}
            assert len({reply.json()["Id"] for reply in replies}) == 1
            pids |= {reply.pid for reply in replies}
        assert len(pids) > 1
        eventually(lambda: begun(tmp_path) == 5 == begun(tmp_path, "end"), 20)
        assert "Traceback" not in server.output()


def at_once(port: int, key: str) -> list[Reply]:
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


def test_a75_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    with gunicorn(tmp_path / "log", f"prove.apps.crowd:create_app({str(tmp_path)!r})") as server:
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


def test_a69_a_flood_over_two_processes() -> None:
    overload.prove(0.1)
