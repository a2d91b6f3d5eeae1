"""A server is killed or shut down while it sends a callback: another worker sends it again with the
same id.
"""

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

from tests.support.apps.calling import SECRET
from tests.support.client import send
from tests.support.databases import engine_of
from tests.support.server import gunicorn

from .test_loss import WORKERS, both_run, gone, task

pytestmark = pytest.mark.live

Eventually = Callable[..., Any]
RESUMED_SECONDS = 3.0


class Receiver:
    """A receiver that answers the first callback when ``may_answer`` is set, and the others at
    once.
    """

    def __init__(self, server: HTTPServer) -> None:
        self.requests: list[Request] = []
        self.may_answer = threading.Event()
        self.url = server.url_for("/hook")
        server.expect_request("/hook").respond_with_handler(self._take)

    def _take(self, request: Request) -> Response:
        request.get_data()
        self.requests.append(request)
        if len(self.requests) == 1:
            self.may_answer.wait(20)
        return Response(status=204)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with HTTPServer("127.0.0.1", threaded=True) as server:
        found = Receiver(server)
        yield found
        found.may_answer.set()


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/asyncroute.db"
    return str(request.getfixturevalue("postgresql_url"))


def holder_of(store_url: str, task_id: str) -> int:
    """Return the process that sends the callback of a task; a worker's name begins with its pid."""
    with engine_of(store_url).connect() as connection:
        holder = connection.exec_driver_sql(
            f"SELECT holder FROM asyncroute_callbacks WHERE task_id = '{task_id}'"
        ).scalar_one()
    return int(holder.split("-")[0])


@pytest.mark.covers("F30", "F31")
@pytest.mark.parametrize("signal_name", ["KILL", "TERM"])
def test_a_callback_in_flight_is_sent_again(
    tmp_path: Path, eventually: Eventually, store_url: str, receiver: Receiver, signal_name: str
) -> None:
    app = f"tests.support.apps.calling:create_app({str(tmp_path)!r}, store={store_url!r}, drain=0.5, attempt_seconds=15)"
    with gunicorn(tmp_path / "log", app, *WORKERS) as server:
        both_run(server, eventually)
        task_id = send(server.port, "PUT", "/call/1", {"callbackUrl": receiver.url}).json()["Id"]
        eventually(lambda: receiver.requests, 5)
        before = task(server.port, task_id)
        assert before["CallbackInfo"]["State"] == "Running"
        pid = holder_of(store_url, task_id)
        began = time.monotonic()
        os.kill(pid, getattr(signal, f"SIG{signal_name}"))
        eventually(lambda: len(receiver.requests) == 2, RESUMED_SECONDS + 2)
        assert time.monotonic() - began <= RESUMED_SECONDS
        eventually(lambda: gone(pid), 5)
        eventually(lambda: task(server.port, task_id)["CallbackInfo"]["State"] == "Completed", 5)
        receiver.may_answer.set()
        after = task(server.port, task_id)
        assert after == {
            **before,
            "CallbackInfo": {**before["CallbackInfo"], "State": "Completed", "Tentative": 1},
        }
        first, second = receiver.requests
        assert first.headers["webhook-id"] == second.headers["webhook-id"]
        assert first.get_data() == second.get_data()
        for request in receiver.requests:
            headers = {name.lower(): value for name, value in request.headers.items()}
            assert Webhook(SECRET).verify(request.get_data(), headers)["State"] == "Completed"
        assert "Traceback" not in server.output()
