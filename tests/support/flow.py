"""An app with the extension and a client that starts, polls, stops and lists its tasks."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask, request
from werkzeug.test import TestResponse

from flask_asyncroute import AsyncRoute
from tests.support.waiting import eventually_true

IN_MEMORY = pytest.mark.parametrize("store_url", ["memory"], indirect=True)
"""For tests that do not depend on the store."""

NOT_ON_CELERY = pytest.mark.parametrize("later_executor", ["thread", "own"], indirect=True)
"""For tests of the slots of a pool, which the concurrency of Celery workers replaces."""

TERMINAL = ("Completed", "Failed", "Aborted")
PATIENCE = 20.0
"""Seconds to wait for a state. No limit is tested by it: a fork server starts slowly on a busy
machine.
"""


class Flow:
    """One app with the extension, and a test client."""

    def __init__(self, app: Flask, async_routes: AsyncRoute) -> None:
        self.app = app
        self.async_routes = async_routes
        self.client = app.test_client()
        self.headers: dict[str, str] = {}
        """Sent with every request, such as ``X-User``."""

    def route(self, rule: str = "/work", **options: Any) -> Any:
        """Return the decorator of an async route, by default for POST."""
        return self.async_routes.route(rule, **{"methods": ["POST"], **options})

    def request(self, method: str, path: str, **values: Any) -> TestResponse:
        """Send a request with the headers of this flow."""
        headers = {**self.headers, **values.pop("headers", {})}
        return self.client.open(path, method=method, headers=headers, **values)

    def start(
        self, path: str = "/work", method: str = "POST", *, status: int = 202, **values: Any
    ) -> dict[str, Any]:
        """Start a task, or expect ``status``; return the response document."""
        response = self.request(method, path, **values)
        assert response.status_code == status, response.get_data(as_text=True)[:2000]
        return loaded(response)

    def run(self, path: str = "/work", method: str = "POST", **values: Any) -> dict[str, Any]:
        """Start a task and return it when it has ended."""
        return self.ended(self.start(path, method, **values))

    def result(self, path: str = "/work", method: str = "POST", **values: Any) -> Any:
        """Start a task that completes; return its result, or None."""
        task = self.run(path, method, **values)
        assert task["State"] == "Completed", task
        return task.get("Result")

    def error(self, path: str = "/work", method: str = "POST", **values: Any) -> str:
        """Start a task that fails; return its error."""
        task = self.run(path, method, **values)
        assert task["State"] == "Failed", task
        assert "Result" not in task
        return str(task["Error"])

    def get(
        self, task: dict[str, Any] | str, *, status: int = 200, **values: Any
    ) -> dict[str, Any]:
        """Return the current state of a task."""
        response = self.request("GET", path_of(task), **values)
        assert response.status_code == status, response.get_data(as_text=True)[:2000]
        return loaded(response)

    def stop(
        self, task: dict[str, Any] | str, *, status: int = 200, **values: Any
    ) -> dict[str, Any]:
        """Stop a task, or expect ``status``; return the response document."""
        response = self.request("DELETE", path_of(task), **values)
        assert response.status_code == status, response.get_data(as_text=True)[:2000]
        return loaded(response)

    def purge(
        self, task: dict[str, Any] | str, *, status: int = 204, **values: Any
    ) -> TestResponse:
        """Purge a task, or expect ``status``."""
        response = self.request("DELETE", f"{path_of(task)}?purge=true", **values)
        assert response.status_code == status, response.get_data(as_text=True)[:2000]
        return response

    def query(self, query_string: str = "", *, status: int = 200, **values: Any) -> Any:
        """List tasks; return the list, or the problem."""
        response = self.request(
            "GET", f"/tasks?{query_string}" if query_string else "/tasks", **values
        )
        assert response.status_code == status, response.get_data(as_text=True)[:2000]
        return loaded(response)

    def ids(self, query_string: str = "", **values: Any) -> list[str]:
        """List tasks; return their ids in order."""
        return [task["Id"] for task in self.query(query_string, **values)]

    def ended(self, task: dict[str, Any] | str, seconds: float = PATIENCE) -> dict[str, Any]:
        """Poll until the task has ended; return it."""
        return self.became(task, *TERMINAL, seconds=seconds)

    def still(self, task: dict[str, Any] | str, seconds: float = PATIENCE) -> dict[str, Any]:
        """Poll until the task and its view have ended; return it."""
        eventually_true(
            lambda: (now := self.get(task))["IsCompleted"] and not now.get("Stopping"), seconds
        )
        return self.get(task)

    def became(
        self, task: dict[str, Any] | str, *states: str, seconds: float = PATIENCE
    ) -> dict[str, Any]:
        """Poll until the task is in one of the states; return it."""
        found: dict[str, Any] = eventually_true(
            lambda: now if (now := self.get(task))["State"] in states else None, seconds
        )
        return found


def path_of(task: dict[str, Any] | str) -> str:
    return f"/task/{task if isinstance(task, str) else task['Id']}"


def loaded(response: TestResponse) -> Any:
    """Return the document of a JSON response."""
    assert response.mimetype in ("application/json", "application/problem+json"), response.headers
    return response.get_json()


def problem(response: TestResponse, status: int, slug: str) -> dict[str, Any]:
    """Check that a response is a problem of RFC 9457 with this status and type; return it."""
    assert response.status_code == status, response.get_data(as_text=True)[:2000]
    assert response.content_type == "application/problem+json"
    assert_not_cached(response)
    document: dict[str, Any] = loaded(response)
    assert document["type"] == f"tag:flask-asyncroute.readthedocs.io,2026:{slug}"
    assert document["status"] == status
    assert document["title"] and document["detail"] and document["Error"]
    return document


def assert_not_cached(response: TestResponse) -> None:
    """Check the headers of every response."""
    assert response.headers["Cache-Control"] == "no-store"
    vary = {name.strip() for name in response.headers["Vary"].split(",")}
    assert vary == {"Accept", "Authorization", "Cookie"}


def identity_of_header() -> dict[str, Any] | None:
    """Return the identity in the header ``X-User``: ``anna; groups=a,b; roles=c``."""
    header = request.headers.get("X-User")
    if header is None:
        return None
    name, *kinds = header.split(";")
    held = {kind.partition("=")[0].strip(): kind.partition("=")[2].split(",") for kind in kinds}
    return {"id": name, **held}
