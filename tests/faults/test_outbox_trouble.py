"""An outbox that fails at its Nth call, before or after the call took effect: the callback is still
sent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from flask_asyncroute import AsyncRoute, Callback, State
from flask_asyncroute.errors import CommitUnknown, StoreUnavailable
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.webhooks import sender

WRITES = ("claim", "record_attempt", "release")


class FaultyOutbox:
    """Passes all calls on to an outbox, except that the call with this number fails."""

    def __init__(self, outbox: Any, number: int, how: str) -> None:
        self._outbox = outbox
        self._number = number
        self._how = how
        self._lock = threading.Lock()
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        done = getattr(self._outbox, name)

        def call(*arguments: Any, **named: Any) -> Any:
            with self._lock:
                self.calls += 1
                fails = self.calls == self._number
            if fails and self._how == "before":
                raise StoreUnavailable("The test injected this failure.", retry_after=1)
            result = done(*arguments, **named)
            if fails:
                raise (CommitUnknown if name in WRITES else StoreUnavailable)(
                    "The test injected this failure.", retry_after=1
                )
            return result

        return call


@pytest.mark.covers("F44")
@pytest.mark.parametrize("store", ["memory://", "sqlite:///asyncroute.db"])
@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("number", range(1, 8))
def test_a_callback_is_sent_if_the_nth_call_of_the_outbox_fails(
    make_app: Callable[..., Flask], httpserver: HTTPServer, eventually: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
    store: str, how: str, number: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(sender, "DELAYS", (0.0, 0.01, 0.01, 0.01))
    taken: list[str] = []

    def take(request: Request) -> Response:
        taken.append(request.headers["webhook-id"])
        return Response(status=500 if len(taken) == 1 else 204)

    httpserver.expect_request("/hook").respond_with_handler(take)
    app = make_app(ASYNCROUTE_STORE=store)
    async_routes = AsyncRoute(app)
    async_routes.route("/work", methods=["POST"], callback=Callback(httpserver.url_for("/hook")))(
        lambda: "fine"
    )
    runner = runtime_of(app).runner
    faulty = FaultyOutbox(runner.store.outbox, number, how)
    monkeypatch.setattr(runner.sender, "_outbox", faulty)
    task_id = app.test_client().post("/work").get_json()["Id"]

    def is_over() -> bool:
        task = runner.store.get(task_id)
        return task is not None and task.callback_state == "Completed" and faulty.calls >= number

    eventually(is_over, 15)
    task = runner.store.get(task_id)
    assert task is not None and (task.state, task.result) == (State.COMPLETED, "fine")
    assert len(set(taken)) == 1 and 2 <= len(taken) <= 3
    assert runner.store.outbox.next_due(2**60) is None
