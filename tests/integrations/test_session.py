"""Flask-Session: a server-side session is read at the start; a task does not change it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cachelib import FileSystemCache
from flask import session
from flask_session import Session

from tests.support.flow import Flow

MakeFlow = Callable[..., Flow]


@pytest.fixture
def session_flow(make_flow: MakeFlow, tmp_path: Path) -> Flow:
    """Return an app whose sessions are files in ``tmp_path / "sessions"``."""
    flow = make_flow(
        SESSION_TYPE="cachelib", SESSION_CACHELIB=FileSystemCache(str(tmp_path / "sessions"))
    )
    Session(flow.app)

    @flow.app.get("/set/<name>/<value>")
    def remember(name: str, value: str) -> str:
        session[name] = value
        return ""

    @flow.app.get("/session")
    def shown() -> Any:
        return dict(session)

    return flow


def live_session(flow: Flow) -> dict[str, Any]:
    """Return the content of the client's live session."""
    return {
        name: value
        for name, value in flow.client.get("/session").get_json().items()
        if name != "_permanent"
    }


def test_a_task_reads_a_copy_and_its_writes_are_dropped_with_a_warning(
    session_flow: Flow, warnings_of: Callable[[], list[str]]
) -> None:
    @session_flow.route()
    def work() -> Any:
        session["cart"] += ",pear"
        session.pop("name")
        return session["cart"]

    session_flow.client.get("/set/cart/apple")
    session_flow.client.get("/set/name/ann")
    assert session_flow.result() == "apple,pear"
    assert live_session(session_flow) == {"cart": "apple", "name": "ann"}
    (warning,) = warnings_of()
    assert "wrote the session keys 'cart', 'name'. The changes are lost" in warning


def test_requests_meanwhile_use_the_live_session(
    session_flow: Flow, begun: threading.Semaphore, gate: threading.Event
) -> None:
    """The task holds no lock, and does not write back what it has read."""

    @session_flow.route()
    def work() -> Any:
        begun.release()
        gate.wait(10)
        return session["cart"]

    session_flow.client.get("/set/cart/apple")
    task = session_flow.start()
    assert begun.acquire(timeout=5)
    session_flow.client.get("/set/cart/pear")
    assert live_session(session_flow) == {"cart": "pear"}
    gate.set()
    assert session_flow.ended(task)["Result"] == "apple"
    assert live_session(session_flow) == {"cart": "pear"}


def test_clearing_the_session_in_a_task_destroys_nothing(session_flow: Flow) -> None:
    @session_flow.route()
    def work() -> Any:
        session.clear()
        return len(session)

    session_flow.client.get("/set/cart/apple")
    assert session_flow.result() == 0
    assert live_session(session_flow) == {"cart": "apple"}


def test_a_client_without_a_session_gets_none(session_flow: Flow, tmp_path: Path) -> None:
    @session_flow.route()
    def work() -> Any:
        return session.get("cart", "empty")

    assert session_flow.result() == "empty"
    assert session_flow.client.get_cookie("session") is None


def test_the_session_id_is_not_available_in_a_task(session_flow: Flow) -> None:
    @session_flow.route()
    def work() -> Any:
        return session.sid  # type: ignore[attr-defined]

    assert "'sid'" in session_flow.error()
