"""Tasks in tests: inside the request, without an app, or in the background."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from flask import Flask, Request, request, request_started
from flask.json.provider import DefaultJSONProvider
from flask.testing import FlaskClient
from requests.utils import parse_header_links
from werkzeug.exceptions import HTTPException
from werkzeug.test import TestResponse

from ..current_task import CurrentTask, running
from ..executors.execution import Execution
from ..runtime import EXTENSION, runtime_of


class inline:  # noqa: N801
    """Run each task of ``app`` inside the request that starts it, with the store ``memory://``.

    Call it once before the app's first request, or use it as a context manager, which deletes its
    tasks at the end. The response status is still 202, but the task is finished.
    """

    def __init__(self, app: Flask) -> None:
        self._runtime = runtime_of(app)
        self._before = self._runtime.is_inline
        self._runtime.reset(is_inline=True)

    def __enter__(self) -> inline:
        return self

    def __exit__(self, *error: object) -> None:
        self._runtime.reset(is_inline=self._before)


@contextmanager
def fake_task(
    task_id: str = "fake", user: str | None = None, timeout: float | None = None
) -> Iterator[CurrentTask]:
    """Create a fake :data:`~flask_asyncroute.current_task`, to call a view in a unit test.

    Inside the block, calling an async route calls its view, except in requests of a test client.
    Progress can be read from the task; events are dropped; nothing is stored.

    :param timeout: in seconds; None: no timeout.
    """

    def wake() -> None:
        execution.take_events()  # so that send_event() never waits

    execution = Execution(task_id, wake=wake)
    execution.begin(user, 1, timeout)
    dispatched: set[Request] = set()

    def note(app: Flask, **extra: Any) -> None:
        dispatched.add(request._get_current_object())  # type: ignore[attr-defined]

    with (
        request_started.connected_to(note),
        running(execution, DefaultJSONProvider.default, dispatched) as task,
    ):
        yield task


def wait_task(client: FlaskClient, response: TestResponse, timeout: float = 10.0) -> dict[str, Any]:
    """Wait until the task that a request has started has ended; return the task object.

    Whether the client may read the task does not matter.

    :param client: the test client that sent the request.
    :param response: its response: a task object, or an answer of the route's ``respond``.
    :param timeout: in seconds.
    :raises AssertionError: if the request has not started a task.
    :raises TimeoutError: if the task has not ended after ``timeout``.
    """
    app = client.application
    task_id = _task_id(app, response)
    task = runtime_of(app).runner.notifier.wait(task_id, lambda each: each.is_completed, timeout)
    if task is None:
        raise AssertionError(f"Task {task_id} does not exist; perhaps it was removed.")
    if not task.is_completed:
        raise TimeoutError(
            f"Task {task_id} has not ended within {timeout:g} s: its State is {task.state}."
        )
    return task.to_dict()


def close(app: Flask) -> None:
    """End the threads of ``app`` and close its store. The next use opens the store again.

    Running views are not stopped.
    """
    runtime_of(app).close()


def _task_id(app: Flask, response: TestResponse) -> str:
    """Return the id of the task that a request has started."""
    links = parse_header_links(response.headers.get("Link", ""))
    targets = [link["url"] for link in links if link.get("rel") == "status"]
    document = None if targets or not response.is_json else response.get_json(silent=True)
    if isinstance(document, dict) and "Id" in document and "State" in document:
        return str(document["Id"])
    if not targets and response.status_code < 400 and "Location" in response.headers:
        targets.append(response.headers["Location"])
    for target in targets:
        path = urlsplit(target).path.removeprefix(response.request.root_path)
        adapter = app.url_map.bind_to_environ(response.request.environ)
        try:
            endpoint, arguments = adapter.match(path, "GET")
        except HTTPException:
            continue
        if endpoint == f"{EXTENSION}.get" and "task_id" in arguments:
            return str(arguments["task_id"])
    raise AssertionError(
        f"The request has started no task. The response is {response.status}: "
        f"{response.get_data(as_text=True)[:500]}"
    )


__all__ = ["close", "fake_task", "inline", "wait_task"]
