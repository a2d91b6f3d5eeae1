"""How these tests drive an app: through HTTP, as a client that starts tasks and polls them."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask
from werkzeug.test import TestResponse

from flask_asyncroute import AsyncRoute
from tests.conftest import eventually_true

IN_MEMORY = pytest.mark.parametrize("store_url", ["memory"], indirect=True)
"""For tests of what comes before the store: once is enough."""

TERMINAL = ("Completed", "Failed", "Aborted")


class Flow:
    """One app with the extension, and a client of it."""

    def __init__(self, app: Flask, async_routes: AsyncRoute) -> None:
        self.app = app
        self.async_routes = async_routes
        self.client = app.test_client()
        self.headers: dict[str, str] = {}
        """Sent with every request; the identity of these tests travels here."""

    def route(self, rule: str = "/work", **options: Any) -> Any:
        """Return the decorator that makes an async route, by POST where nothing else is said."""
        return self.async_routes.route(rule, **{"methods": ["POST"], **options})

    def request(self, method: str, path: str, **given: Any) -> TestResponse:
        """Send a request with the headers of this flow."""
        headers = {**self.headers, **given.pop("headers", {})}
        return self.client.open(path, method=method, headers=headers, **given)

    def start(self, path: str = "/work", method: str = "POST", *, status: int = 202, **given: Any) -> dict[str, Any]:
        """Start a task, or fail to with ``status``; return the answer."""
        response = self.request(method, path, **given)
        assert response.status_code == status, response.get_data(as_text=True)[:2000]
        return loaded(response)

    def run(self, path: str = "/work", method: str = "POST", **given: Any) -> dict[str, Any]:
        """Start a task and return it as it is when it has ended."""
        return self.ended(self.start(path, method, **given))

    def result(self, path: str = "/work", method: str = "POST", **given: Any) -> Any:
        """Start a task that completes; return its result, None where there is none."""
        task = self.run(path, method, **given)
        assert task["State"] == "Completed", task
        return task.get("Result")

    def error(self, path: str = "/work", method: str = "POST", **given: Any) -> str:
        """Start a task that fails; return its error."""
        task = self.run(path, method, **given)
        assert task["State"] == "Failed", task
        assert "Result" not in task
        return str(task["Error"])

    def get(self, task: dict[str, Any] | str, *, status: int = 200, **given: Any) -> dict[str, Any]:
        """Return a task as it is now."""
        response = self.request("GET", path_of(task), **given)
        assert response.status_code == status, response.get_data(as_text=True)[:2000]
        return loaded(response)

    def stop(self, task: dict[str, Any] | str, *, status: int = 200, **given: Any) -> dict[str, Any]:
        """Stop a task, or fail to with ``status``; return the answer."""
        response = self.request("DELETE", path_of(task), **given)
        assert response.status_code == status, response.get_data(as_text=True)[:2000]
        return loaded(response)

    def purge(self, task: dict[str, Any] | str, *, status: int = 204, **given: Any) -> TestResponse:
        """Remove a task, or fail to with ``status``."""
        response = self.request("DELETE", f"{path_of(task)}?purge=true", **given)
        assert response.status_code == status, response.get_data(as_text=True)[:2000]
        return response

    def query(self, query_string: str = "", *, status: int = 200, **given: Any) -> Any:
        """List tasks; return the list, or the problem."""
        response = self.request("GET", f"/tasks?{query_string}" if query_string else "/tasks", **given)
        assert response.status_code == status, response.get_data(as_text=True)[:2000]
        return loaded(response)

    def ids(self, query_string: str = "", **given: Any) -> list[str]:
        """List tasks; return their ids in order."""
        return [task["Id"] for task in self.query(query_string, **given)]

    def ended(self, task: dict[str, Any] | str, seconds: float = 5.0) -> dict[str, Any]:
        """Poll until the task has ended; return it as it is then."""
        return self.became(task, *TERMINAL, seconds=seconds)

    def still(self, task: dict[str, Any] | str, seconds: float = 5.0) -> dict[str, Any]:
        """Poll until the task has ended and its code too."""
        eventually_true(lambda: (now := self.get(task))["IsCompleted"] and not now.get("Stopping"), seconds)
        return self.get(task)

    def became(self, task: dict[str, Any] | str, *states: str, seconds: float = 5.0) -> dict[str, Any]:
        """Poll until the task is in one of the states."""
        found: dict[str, Any] = eventually_true(
            lambda: now if (now := self.get(task))["State"] in states else None, seconds
        )
        return found


def path_of(task: dict[str, Any] | str) -> str:
    """Return where a task can be got."""
    return f"/task/{task if isinstance(task, str) else task['Id']}"


def loaded(response: TestResponse) -> Any:
    """Return what a JSON answer holds."""
    assert response.mimetype in ("application/json", "application/problem+json"), response.headers
    return response.get_json()


def problem(response: TestResponse, status: int, slug: str) -> dict[str, Any]:
    """Check that an answer is a problem as RFC 9457 and the contract have it; return it."""
    assert response.status_code == status, response.get_data(as_text=True)[:2000]
    assert response.content_type == "application/problem+json"
    assert_not_cached(response)
    document: dict[str, Any] = loaded(response)
    assert document["type"] == f"urn:flask-asyncroute:{slug}"
    assert document["status"] == status
    assert document["title"] and document["detail"] and document["Error"]
    return document


def assert_not_cached(response: TestResponse) -> None:
    """Check the headers that every answer has (A65)."""
    assert response.headers["Cache-Control"] == "no-store"
    vary = {name.strip() for name in response.headers["Vary"].split(",")}
    assert vary == {"Accept", "Authorization", "Cookie"}
