"""A server that is killed, or ends, with a callback in flight: another worker sends it again, with the same id (F30, F31)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_httpserver import HTTPServer
from standardwebhooks import Webhook
from werkzeug import Request, Response

from prove.apps.calling import SECRET
from prove.client import send
from prove.server import gunicorn
from tests.conftest import engine_of

from .test_loss import WORKERS, both_run, gone, task

pytestmark = pytest.mark.live

Eventually = Callable[..., Any]
RESUMED_SECONDS = 3.0


class Receiver:
    """Keeps the first callback waiting until it may be answered; those that follow it are answered at once."""

    def __init__(self, server: HTTPServer) -> None:
        self.requests: list[Request] = []
        self.over = threading.Event()
        self.url = server.url_for("/hook")
        server.expect_request("/hook").respond_with_handler(self._take)

    def _take(self, request: Request) -> Response:
        request.get_data()
        self.requests.append(request)
        if len(self.requests) == 1:
            self.over.wait(20)
        return Response(status=204)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with HTTPServer("127.0.0.1", threaded=True) as server:
        found = Receiver(server)
        yield found
        found.over.set()


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/asyncroute.db"
    return str(request.getfixturevalue("postgresql_url"))


def holder_of(store_url: str, task_id: str) -> int:
    """Return the process that has the callback of a task in flight: the name of a worker begins with it."""
    with engine_of(store_url).connect() as connection:
        holder = connection.exec_driver_sql(
            f"SELECT holder FROM asyncroute_callbacks WHERE task_id = '{task_id}'"
        ).scalar_one()
    return int(holder.split("-")[0])


@pytest.mark.parametrize("how", ["KILL", "TERM"])
def test_f30_f31_a_callback_in_flight(
    tmp_path: Path, eventually: Eventually, store_url: str, receiver: Receiver, how: str
) -> None:
    app = f"prove.apps.calling:create_app({str(tmp_path)!r}, store={store_url!r}, drain=0.5, attempt_seconds=15)"
    with gunicorn(tmp_path / "log", app, *WORKERS) as server:
        both_run(server, eventually)
        task_id = send(server.port, "PUT", "/call/1", {"callbackUrl": receiver.url}).json()["Id"]
        eventually(lambda: receiver.requests, 5)
        before = task(server.port, task_id)
        assert before["CallbackInfo"]["State"] == "Running"
        pid = holder_of(store_url, task_id)
        began = time.monotonic()
        os.kill(pid, getattr(signal, f"SIG{how}"))
        eventually(lambda: len(receiver.requests) == 2, RESUMED_SECONDS + 2)
        assert time.monotonic() - began <= RESUMED_SECONDS
        eventually(lambda: gone(pid), 5)
        eventually(lambda: task(server.port, task_id)["CallbackInfo"]["State"] == "Completed", 5)
        receiver.over.set()
        after = task(server.port, task_id)
        assert after == {**before, "CallbackInfo": {**before["CallbackInfo"], "State": "Completed", "Tentative": 1}}
        first, second = receiver.requests
        assert first.headers["webhook-id"] == second.headers["webhook-id"]
        assert first.get_data() == second.get_data()
        for request in receiver.requests:
            headers = {name.lower(): value for name, value in request.headers.items()}
            assert Webhook(SECRET).verify(request.get_data(), headers)["State"] == "Completed"
        assert "Traceback" not in server.output()
