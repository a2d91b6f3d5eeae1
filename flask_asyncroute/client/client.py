"""The client: starts tasks on a server, finds them and follows them."""

from __future__ import annotations

import json as json_module
import uuid
from collections.abc import Iterator, Mapping
from datetime import date
from typing import Any

import requests
from requests.structures import CaseInsensitiveDict

from .errors import InvalidResponseError
from .follower import Follower
from .task import ID, ProgressHook, RemoteTask, checked, is_task, task_of
from .transport import Answer, Transport


class AsyncRouteClient:
    """A client of an app with async routes, for programs that are not that app.

    Thread-safe, except for changes of the session. Create a new client after a fork. Use it as a
    context manager, or call `close`. Nothing is sent to another origin than that of ``base_url``,
    and redirects are not followed.

    :param base_url: the URL under which the app is mounted, such as ``https://example.com/app``.
    :param session: for authentication, headers, certificates and proxies. The client replaces its
        default adapter for the origin of ``base_url``, to limit times and sizes; with an adapter of
        your own, a malicious server can exceed the limits. Default: a new session.
    :param timeout: seconds for each response.
    :param retry_for: seconds after which the client gives up if the server cannot be reached or
        answers 429, 502, 503 or 504. Starts are repeated with the same ``Idempotency-Key``.
    :param max_response: bytes of each response and event.
    :param task_path: as ``ASYNCROUTE_TASK_PATH`` of the app, with its ``ASYNCROUTE_URL_PREFIX``.
    :param tasks_path: as ``ASYNCROUTE_TASKS_PATH``, with the prefix.
    """

    def __init__(
        self,
        base_url: str,
        session: requests.Session | None = None,
        *,
        timeout: float = 30.0,
        retry_for: float = 60.0,
        max_response: int = 16 * 1024 * 1024,
        task_path: str = "/task",
        tasks_path: str = "/tasks",
    ) -> None:
        self._own_session = None
        if session is None:
            session = self._own_session = requests.Session()
        self._transport = Transport(base_url, session, timeout, retry_for, max_response)
        self._task_url = self._url(task_path)
        self._tasks_url = self._url(tasks_path)
        self._follower = Follower(self._transport, f"{self._tasks_url}/events")

    def __enter__(self) -> AsyncRouteClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop following. Tasks go on, but their unfinished `RemoteTask` objects raise an error."""
        self._follower.close()
        if self._own_session is not None:
            self._own_session.close()

    def start(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        data: Any = None,
        files: Any = None,
        params: Any = None,
        headers: Mapping[str, str] | None = None,
        on_progress: ProgressHook | None = None,
    ) -> RemoteTask:
        """Start a task and follow it.

        The request is repeated with one ``Idempotency-Key`` after network errors and 429, 502, 503
        and 504, so it starts at most one task. A body that cannot be rewound is sent once.

        :param path: of the async route, below ``base_url``.
        :param json: and ``data``, ``files``, ``params``: as for :func:`requests.request`.
        :param headers: can contain an ``Idempotency-Key``; the default is a random one.
        :param on_progress: see :meth:`RemoteTask.add_progress_callback`.
        :raises RefusedError: if the server refuses the request; the subclass says why.
        :raises UnreachableError: if there is no response within ``retry_for`` seconds.
        :raises InvalidResponseError: if the response is not that of an async route.
        """
        fields = CaseInsensitiveDict(headers or {})
        fields.setdefault("Idempotency-Key", str(uuid.uuid4()))
        answer = self._transport.request(
            method, self._url(path), fields, json=json, data=data, files=files, params=params
        )
        # The route can have an answer of its own (the option `respond`), whose Link names the task.
        link = answer.link("status")
        location = link or answer.headers.get("Location")
        url = None if location is None else self._transport.resolve(location, answer.url)
        if url is not None and (link or not is_task(answer)):
            document = task_of(self._transport.request("GET", url))
        else:
            document = task_of(answer)
        return self._remote_task(document, url, answer.retry_after, on_progress)

    def task(self, task_id: str, *, on_progress: ProgressHook | None = None) -> RemoteTask:
        """Find a task by its id and follow it.

        :raises NotFoundError: if it does not exist, or the caller may not read it.
        """
        if not ID.fullmatch(task_id):
            raise ValueError(f"{task_id!r} is not the id of a task.")
        url = f"{self._task_url}/{task_id}"
        answer = self._transport.request("GET", url)
        return self._remote_task(task_of(answer, task_id), url, answer.retry_after, on_progress)

    def query(
        self, conditions: Mapping[str, Any] | None = None, *, sort: str | None = None, **fields: Any
    ) -> Iterator[dict[str, Any]]:
        """Yield all matching task objects, newest first, page by page.

        >>> for task in client.query(State="Running", CreationTime={"op": "GE", "value": since}):
        ...     print(task["Id"], task.get("Progress"))

        :param conditions: as in the JSON style of :doc:`/reference/http`; also as keywords. Any
            other value is compared with EQ.
        :param sort: such as ``-CreationTime``.
        """
        wanted = {
            name: _condition(value) for name, value in {**(conditions or {}), **fields}.items()
        }
        body = json_module.dumps(wanted, default=_plain)
        url = f"{self._tasks_url}/query"
        params = {} if sort is None else {"sort": sort}
        headers = {"Content-Type": "application/json"}
        while True:
            answer = self._transport.request("POST", url, headers, data=body, params=params)
            page = _page(answer)
            yield from page
            target = answer.link("next")
            if target is None:
                return
            following = self._transport.resolve(target, answer.url)
            if not page or following == url:
                raise InvalidResponseError(
                    f"{answer.url}: the server's list of tasks does not end, because a page is "
                    "empty or links to itself."
                )
            url, params = following, {}

    def _url(self, path: str) -> str:
        return f"{self._transport.base_url}/{path.lstrip('/')}"

    def _remote_task(
        self,
        document: dict[str, Any],
        url: str | None,
        after: float | None,
        on_progress: ProgressHook | None,
    ) -> RemoteTask:
        found = self._follower.find(document["Id"])
        if found is None:
            url = url or f"{self._task_url}/{document['Id']}"
            task = RemoteTask(self._transport, url, document, on_progress)
            found = self._follower.follow(task, after)
            if found is task:
                return task
        found.update(document)
        if on_progress is not None:
            found.add_progress_callback(on_progress)
        return found


def _page(answer: Answer) -> list[dict[str, Any]]:
    page = answer.json()
    if not isinstance(page, list):
        raise InvalidResponseError(f"{answer.url} did not answer with a list of tasks.")
    return [checked(document, answer.url) for document in page]


def _condition(value: Any) -> Any:
    return value if isinstance(value, (dict, list)) else {"value": value}


def _plain(value: Any) -> str:
    if isinstance(value, date):
        return value.isoformat()
    raise TypeError(f"A condition has a value of type {type(value).__name__}; use JSON values.")
