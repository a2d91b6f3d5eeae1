"""Eleven extensions in one app, served by gunicorn: Flask-Login, -Session, -WTF, -SQLAlchemy,
-Limiter, -CORS, -Compress, -Caching, -Babel, Sentry and OpenTelemetry.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from sqlalchemy import create_engine

from tests.integrations.apps import eleven
from tests.support.event_streams import Parser, told
from tests.support.server import START, Server, gunicorn
from tests.support.waiting import eventually_true

TRACE = "0af7651916cd43dd8448eb211c80319c"
EXPECTED = (
    r"WARNING flask_asyncroute: A task of endpoint (thread|process)_report wrote the session keys 'draft'\.",
    r"ERROR eleven: The view of task \S+ raised an exception\.",
)
"""The warnings and errors that the tasks of this test cause."""


class Browser:
    """A client with cookies that sends each request on a new connection, from another origin."""

    def __init__(self, port: int, name: str | None = None) -> None:
        self.base = f"http://127.0.0.1:{port}"
        self.http = requests.Session()
        self.http.headers.update(
            {
                "Connection": "close",
                "Origin": eleven.ORIGIN,
                "Accept-Language": "de",
                "traceparent": f"00-{TRACE}-b7ad6b7169203331-01",
            }
        )
        self.token = ""
        if name is not None:
            token = self.request("GET", "/token").text
            form = {"name": name, "csrf_token": token}
            self.token = self.request("POST", "/login", data=form).json()["csrf_token"]

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self.http.close()

    def request(self, method: str, path: str, status: int = 200, **given: Any) -> requests.Response:
        """Send a request; check the status and the CORS header of the response."""
        response = self.http.request(method, self.base + path, timeout=60, **given)
        assert response.status_code == status, response.text
        assert response.headers["Access-Control-Allow-Origin"] == eleven.ORIGIN
        return response

    def start(self, path: str, **fields: str) -> str:
        """Start a task with a form; return its path."""
        response = self.request(
            "POST", path, 202,
            data={"csrf_token": self.token, **fields}, files={"table": ("t.csv", b"a;b\n1;2\n")},
        )  # fmt: skip
        assert "Location" in response.headers["Access-Control-Expose-Headers"]
        return response.headers["Location"]

    def ended(self, path: str) -> dict[str, Any]:
        """Wait until a task has ended; return it."""
        return eventually_true(
            lambda: (
                task
                if (task := self.request("GET", f"{path}?wait=20").json())["IsCompleted"]
                else None
            ),
            60,
        )


@pytest.fixture(params=[False, True], ids=["each worker loads", "preload"])
def server(request: pytest.FixtureRequest, tmp_path: Path, translations: Path) -> Iterator[Server]:
    engine = create_engine(f"sqlite:///{tmp_path}/app.db")
    eleven.Base.metadata.create_all(engine)
    with engine.begin() as connection:
        for name in ("ann", "bob"):
            connection.execute(eleven.User.__table__.insert().values(name=name))
    engine.dispose()
    options = ["--worker-class", "gthread", "--workers", "2", "--threads", "4"]
    app = f"{eleven.__name__}:create_app({str(tmp_path)!r})"
    preload = ["--preload"] if request.param else []
    with gunicorn(tmp_path / "log", app, *options, *preload, conf=START) as server:
        yield server


@pytest.mark.live
def test_all_extensions_work_together(server: Server, tmp_path: Path) -> None:
    port = server.port
    with Browser(port, "ann") as ann, Browser(port, "bob") as bob, Browser(port) as anonymous:
        seen: set[str] = set()
        eventually_true(
            lambda: len(seen) == 2 or seen.add(ann.request("GET", "/pid").headers["X-Pid"])
        )
        for executor in ("thread", "process"):
            check_refusals(ann, anonymous, f"/{executor}/report")
            report(ann, executor, seen)
            follow_and_stop(ann, bob, anonymous, executor)
            path = ann.start(f"/{executor}/failing")
            assert ann.ended(path)["Error"] == "LookupError: Bericht"
            limited(ann, f"/{executor}/limited")
        assert ann.request("GET", "/session").json() == {"cart": ["ann"], "draft": None}
        found = ann.request("POST", "/tasks/query", json={"State": {"op": "EQ", "value": "Failed"}})
        assert len(found.json()) == 2
        assert bob.request("GET", "/tasks").json() == []
        anonymous.request("GET", "/tasks", 401)
    server.stop()
    messages = re.findall(r"^(?:WARNING|ERROR|CRITICAL) .*", server.output(), re.MULTILINE)
    assert [line for line in messages if not any(re.match(one, line) for one in EXPECTED)] == []
    assert server.output().count("Traceback") == 2, "from the failing views"
    errors = [json.loads(line) for line in (tmp_path / "sentry").read_text().splitlines()]
    assert [event["exception"]["values"][0]["value"] for event in errors] == ["Bericht"] * 2
    assert [event["user"] for event in errors] == [{"id": "1"}] * 2
    spans = [json.loads(line) for line in (tmp_path / "spans").read_text().splitlines()]
    assert {span["trace"] for span in spans} == {TRACE}
    named = {span["name"] for span in spans}
    for executor in ("thread", "process"):
        assert {f"POST /{executor}/report", f"task {executor}_report"} <= named
    assert {"GET /task/<task_id>", "GET /task/<task_id>/events"} <= named


def check_refusals(ann: Browser, anonymous: Browser, path: str) -> None:
    """A preflight, a request without a token, and one without a user start nothing."""
    before = ann.request("GET", "/tasks").json()
    ann.request("OPTIONS", path, headers={"Access-Control-Request-Method": "POST"})
    ann.request("POST", path, 400)
    token = anonymous.request("GET", "/token").text
    anonymous.request("POST", path, 401, data={"csrf_token": token})
    assert ann.request("GET", "/tasks").json() == before


def report(ann: Browser, executor: str, workers: set[str]) -> None:
    """Start two tasks that use every extension, and check their results."""
    title = f"{executor} é"
    paths = [ann.start(f"/{executor}/report", title=title) for _ in range(2)]
    results = [ann.ended(path)["Result"] for path in paths]
    for result in results:
        assert set(result["Titles"]) <= {"thread é", "process é"} and title in result["Titles"]
        assert result["User"] == ["1", "ann", "1"] and result["Cart"] == ["ann"]
        assert (result["Draft"], result["Word"], result["Bytes"]) == (title, "Bericht", 8)
        assert result["HasToken"]
        assert (str(result["Pid"]) in workers) is (executor == "thread")
    assert ann.request("GET", f"{paths[0]}/result").json() == results[0]
    etag = ann.request("GET", paths[0]).headers["ETag"]
    assert ":" in etag, "Flask-Compress has added a suffix"
    ann.request("GET", paths[0], 304, headers={"If-None-Match": etag})
    invalid = ann.ended(ann.start(f"/{executor}/report"))
    assert list(invalid["Result"]["Errors"]) == ["title"]


def follow_and_stop(ann: Browser, bob: Browser, anonymous: Browser, executor: str) -> None:
    """Follow a task by its events, request it as other users, stop it, and read the end."""
    path = ann.start(f"/{executor}/long")
    stream = ann.request(
        "GET", f"{path}/events", headers={"Accept": "text/event-stream"}, stream=True
    )
    assert "Content-Encoding" not in stream.headers
    parser, events = Parser(), []
    pieces = iter(lambda: stream.raw.read1(65536), b"")
    while sum(event.name == "step" for event in events) < 3:
        events += parser.feed(next(pieces))
    for method in ("GET", "DELETE"):
        bob.request(method, path, 404)
        anonymous.request(method, path, 401)
    running = ann.request("GET", "/tasks?State=Running").json()
    assert [f"/task/{task['Id']}" for task in running] == [path]
    stopped = ann.request("DELETE", path).json()
    assert (stopped["State"], stopped["Error"]) == ("Aborted", "Aborted by the user")
    for piece in pieces:
        events += parser.feed(piece)
    assert told(events)[-1] == "Aborted"
    stream.close()
    eventually_true(lambda: "Stopping" not in ann.request("GET", path).json(), 10)
    ann.request("DELETE", f"{path}?purge=true", 204)
    ann.request("GET", path, 404)


def limited(ann: Browser, path: str) -> None:
    """Start tasks until Flask-Limiter refuses one. Each worker process counts for itself."""

    def is_refused() -> bool:
        response = ann.http.post(ann.base + path, data={"csrf_token": ann.token}, timeout=60)
        assert response.status_code in (202, 429), response.text
        return response.status_code == 429

    tries = iter(range(2 * eleven.STARTS + 1))
    while not is_refused():
        next(tries)
