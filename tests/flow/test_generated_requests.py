"""Generated requests with invalid parts: only declared responses occur, no exception is raised, and
each error has a detail.

``ASYNCROUTE_FUZZ`` is the number of requests. The stress tests raise it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from flask import Flask, request
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from werkzeug.exceptions import HTTPException
from werkzeug.test import EnvironBuilder, run_wsgi_app

from flask_asyncroute import Access, AsyncRoute, Permission
from tests.support.flow import identity_of_header

REQUESTS = int(os.environ.get("ASYNCROUTE_FUZZ", "600"))

DECLARED: dict[str, set[int]] = {
    "start": {202, 400, 401, 403, 404, 405, 406, 411, 413, 422, 501, 503},
    "get": {200, 304, 400, 404, 405, 406},
    "result": {200, 400, 404, 405, 406, 409, 410, 500},
    "stop": {200, 204, 400, 403, 404, 405, 406, 409, 410, 423},
    "query": {200, 400, 405, 406, 413, 415},
    "none": {404, 405, 308, 200},
}
"""The statuses that each operation may return. 404 and 405 of a start and all statuses of "none"
come from Flask. 500 of a result is the error of its task.
"""

NASTY = [
    "", " ", "x", "0", "-1", "1e999", "NaN", "null", "true", "True", "Completed", "a,b", "a=b", "a&b", "%", "%00", "%ff", "%ED%A0%80", "%zz", "%252e", "..", "../..", "é",
    "\u0301", "\U0001f600", "\u202e", "\u200b", "\x00", "\n", "\r\nX-Bad: 1", "\t", "'", '"', "`", "\\", "<x>", "{", "}", "[", "]", "[]", "{}", ";", "--", "*", "?", "/", "//", "#",
    "x" * 300, "9" * 400, "2026-01-01T00:00:00Z", "2026-01-01T00:00:00+02:00", "9999-12-31T23:59:60Z", "0000-01-01T00:00:00Z", "${jndi:x}", "{{7*7}}", "'; DROP TABLE x; --", "٣",
    "\xff", "\xed\xa0\x80", "ID", "done", "failed", "private", "missing",
]  # fmt: skip
FIELDS = [
    "Id",
    "AsyncRouteId",
    "State",
    "IsCompleted",
    "Cancellable",
    "User",
    "CreationTime",
    "StartingTime",
    "CompletedTime",
    "ExpireTime",
    "Error",
    "Url",
    "Method",
    "Progress",
    "Colour",
    "state",
]
OPERATORS = ["EQ", "NE", "GT", "LT", "GE", "LE", "LIKE", "NOTLIKE", "eq", "op", "value", "IS", ""]

nasty = st.one_of(
    st.sampled_from(NASTY),
    st.text(max_size=8),
    st.lists(st.sampled_from(NASTY), min_size=2, max_size=3).map("".join),
)
raw = st.one_of(
    nasty.map(lambda text: text.encode("utf-8", "surrogatepass")), st.binary(max_size=12)
)
values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(10**18, 10**40),
        st.floats(),
        nasty,
        st.sampled_from(["Completed", 50, True, "2026-01-01T00:00:00Z"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(nasty, inner, max_size=3)),
    max_leaves=6,
)
conditions = st.one_of(
    st.fixed_dictionaries({"value": values}, optional={"op": st.one_of(st.sampled_from(OPERATORS), values)}), values,
    st.lists(st.fixed_dictionaries({"op": st.sampled_from(OPERATORS), "value": values}), max_size=3),
)  # fmt: skip
documents = st.one_of(
    st.dictionaries(st.one_of(st.sampled_from(FIELDS), nasty), conditions, max_size=3), values
)
bodies = st.one_of(
    raw,
    documents.map(lambda document: json.dumps(document).encode("utf-8", "surrogatepass")),
    documents.map(
        lambda document: json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ),
    documents.map(lambda document: json.dumps(document).encode("utf-16")),
    st.sampled_from(
        [
            b"",
            b"{}",
            b"[" * 5000,
            b'{"State":{"value":"Failed"},"State":{}}',
            b"a=1&b=%ff",
            b"--B\r\n\r\nx\r\n--B--",
            b"\x1f\x8b\x08",
        ]
    ),
)
parameters = st.one_of(
    st.builds("{}={}".format, st.sampled_from(FIELDS), nasty),
    st.builds(
        "filter[{}][{}]={}".format, st.sampled_from(FIELDS), st.sampled_from(OPERATORS), nasty
    ),
    st.builds(
        "{}={}".format,
        st.sampled_from(
            ["limit", "sort", "cursor", "purge", "Id", "id", "filter", "filter[", "wait"]
        ),
        nasty,
    ),
    st.builds("{}={}".format, nasty, nasty),
    st.sampled_from(
        [
            "State=Completed",
            "limit=2",
            "sort=-CreationTime",
            "Id=done",
            "Id=failed",
            "purge=true",
            "IsCompleted=true,Cancellable=false",
            "&&",
            "=",
        ]
    ),
    nasty,
)
TYPES = [
    "application/json",
    "application/json; charset=utf-8",
    "application/json; charset=\xff",
    "multipart/form-data; boundary=B",
    "multipart/form-data",
    "application/x-www-form-urlencoded",
    "text/plain",
    "",
]
HEADERS: dict[str, st.SearchStrategy[str]] = {
    "HTTP_ACCEPT": st.one_of(st.sampled_from(["*/*", "application/json", "text/xml", "application/yaml", "text/html", "application/xml;q=0.5, */*;q=0", "q=", ";;,,"]), nasty),
    "HTTP_X_USER": st.one_of(st.sampled_from(["anna", "bert", "bert;groups=g", "root;roles=admin", "x;scopes=s"]), nasty),
    "HTTP_IF_NONE_MATCH": st.one_of(st.sampled_from(["*", '"1-json"', 'W/"3-xml"']), nasty),
    "HTTP_COOKIE": st.one_of(st.sampled_from(["Id=done", "session=x", "id=failed; Id=done"]), nasty),
    "HTTP_ID": nasty,
    "HTTP_IDEMPOTENCY_KEY": st.one_of(st.just("AAAAAAAAAAAAAAAAAAAAAQ"), nasty),
    "HTTP_PREFER": nasty,
    "HTTP_AUTHORIZATION": st.one_of(st.sampled_from(["Basic !!!", "Bearer x", "Basic YTpi"]), nasty),
    "HTTP_SEC_FETCH_SITE": st.sampled_from(["cross-site", "same-origin", "none", "nonsense"]),
    "HTTP_ORIGIN": nasty,
    "HTTP_CONTENT_ENCODING": st.one_of(st.just("gzip"), nasty),
    "HTTP_HOST": st.sampled_from(["localhost", "evil.example:81", "a@b", "[::1]:80", ""]),
    "HTTP_X_HTTP_METHOD_OVERRIDE": st.sampled_from(["DELETE", "PATCH"]),
    "CONTENT_TYPE": st.one_of(st.sampled_from(TYPES), nasty),
    "CONTENT_LENGTH": st.one_of(st.sampled_from(["0", "5", "99999999", "-1", "abc", ""]), nasty),
}  # fmt: skip


@dataclass
class GeneratedRequest:
    """A request as a server passes it on: one character for each byte (PEP 3333)."""

    method: str
    path: bytes
    query: bytes
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    is_chunked: bool = False
    is_terminated: bool = True

    def environ(self) -> dict[str, Any]:
        environ = EnvironBuilder(
            method=self.method if self.method.isascii() else "GET"
        ).get_environ()
        for name in ("CONTENT_LENGTH", "CONTENT_TYPE"):
            environ.pop(name, None)
        environ.update(
            {
                "PATH_INFO": self.path.decode("latin-1"),
                "QUERY_STRING": without_breaks(self.query),
                "wsgi.input": Input(self.body),
            }
        )
        if self.is_terminated:
            environ["wsgi.input_terminated"] = True
        if self.is_chunked:
            environ["HTTP_TRANSFER_ENCODING"] = "chunked"
        elif self.body:
            environ["CONTENT_LENGTH"] = str(len(self.body))
        for name, value in self.headers.items():
            environ[name] = without_breaks(value.encode("utf-8", "surrogatepass"))
        return environ


def without_breaks(text: bytes) -> str:
    """Decode as a server does, without line breaks, which would end a header, and without NUL."""
    return text.decode("latin-1").translate(dict.fromkeys(map(ord, "\r\n\x00")))


class Input:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, size: int = -1) -> bytes:
        size = len(self._data) if size < 0 else size
        piece, self._data = self._data[:size], self._data[size:]
        return piece

    def readline(self, size: int = -1) -> bytes:
        return self.read(size)


KNOWN = [b"done", b"failed", b"private", b"fixed", b"missing"]
ids = st.one_of(st.sampled_from(KNOWN), st.sampled_from(KNOWN), raw)
queries = st.lists(
    st.one_of(parameters.map(lambda text: text.encode("utf-8", "surrogatepass")), raw), max_size=2
).map(b"&".join)
some_headers = st.lists(st.sampled_from(sorted(HEADERS)), max_size=2, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: HEADERS[name] for name in names})
)
as_json = st.sampled_from(
    [{"CONTENT_TYPE": "application/json"}, {"CONTENT_TYPE": "application/json; charset=utf-8"}]
)


def requests(
    methods: list[str], paths: st.SearchStrategy[bytes], **more: Any
) -> st.SearchStrategy[GeneratedRequest]:
    given: dict[str, Any] = {
        "query": queries,
        "body": st.just(b""),
        "headers": some_headers,
        **more,
    }
    return st.builds(
        GeneratedRequest,
        method=st.sampled_from(methods),
        path=paths,
        is_chunked=st.booleans(),
        is_terminated=st.booleans(),
        **given,
    )


generated = st.one_of(
    requests(["GET", "GET", "HEAD"], ids.map(lambda one: b"/task/" + one)),
    requests(["GET"], ids.map(lambda one: b"/task/" + one + b"/result")),
    requests(
        ["DELETE"],
        ids.map(lambda one: b"/task/" + one),
        query=st.one_of(st.sampled_from([b"", b"purge=true"]), queries),
    ),
    requests(["GET", "DELETE"], st.just(b"/task")),
    requests(["GET"], st.just(b"/tasks")),
    requests(["GET"], st.just(b"/tasks"), headers=st.just({})),
    requests(["POST"], st.sampled_from([b"/tasks", b"/tasks/query"]), body=bodies),
    requests(
        ["POST"],
        st.sampled_from([b"/tasks", b"/tasks/query"]),
        body=bodies,
        headers=as_json,
        query=st.just(b""),
    ),
    requests(["POST", "GET", "HEAD"], st.sampled_from([b"/work", b"/plain/5"]), body=bodies),
    requests(["PUT"], raw.map(lambda piece: b"/named/" + piece), body=bodies),
    requests(
        ["GET", "POST", "DELETE", "PUT", "OPTIONS", "PATCH", "QUERY"],
        st.one_of(raw, raw.map(lambda piece: b"/tasks" + piece)),
        body=bodies,
    ),
)


@pytest.fixture(scope="module", params=["memory://", "sqlite:///asyncroute.db"])
def target(request: pytest.FixtureRequest, make_module_app: Callable[..., Flask]) -> Flask:
    """Return an app with several kinds of routes and tasks, on each store."""
    app = make_module_app(
        "target", ASYNCROUTE_STORE=request.param, PROPAGATE_EXCEPTIONS=True, ASYNCROUTE_MAX_BODY=100_000, ASYNCROUTE_EXECUTOR="immediate",
        ASYNCROUTE_TASK_ID_IN=["path", "query", "header", "cookie"], ASYNCROUTE_ADMINS=Access(roles=("admin",)),
    )  # fmt: skip
    async_routes = AsyncRoute(app)

    @async_routes.identity_loader
    def identify() -> Any:
        found = identity_of_header()
        return found if found is not None and 0 < len(found["id"]) <= 255 else None

    options: dict[str, Any] = {
        "methods": ["GET", "POST"],
        "response_types": ["application/json", "application/xml", "application/yaml"],
    }

    def add(rule: str, view: Callable[..., Any], **more: Any) -> None:
        async_routes.route(rule, endpoint=rule, **{**options, **more})(view)

    add("/stock/done", lambda: {"a": [1, "é\x00"]}, id_generator=lambda: "done")
    add("/stock/failed", lambda: 1 / 0, id_generator=lambda: "failed")
    add(
        "/stock/private",
        lambda: 1,
        id_generator=lambda: "private",
        permission=Permission(read=Access(groups=["g"])),
    )
    add("/stock/fixed", lambda: None, id_generator=lambda: "fixed", cancellable=False)
    add("/work", read_all)
    add("/plain/<int:n>", lambda n: n)
    add("/named/<name>", lambda name: name, methods=["PUT", "POST"])
    return app


def restore_tasks(app: Flask) -> None:
    """Start the tasks with known ids again that a request has purged."""
    client = app.test_client()
    for task_id in ("done", "failed", "private", "fixed"):
        if (
            client.get(f"/task/{task_id}", headers={"X-User": "root;roles=admin"}).status_code
            == 404
        ):
            owner = {"X-User": "anna"} if task_id in ("private", "fixed") else {}
            assert client.post(f"/stock/{task_id}", headers=owner).status_code == 202


def read_all() -> Any:
    """Read all parts of a request, as a view might."""
    for read in (
        lambda: request.args.to_dict(), lambda: request.form.to_dict(), lambda: [file.read() for file in request.files.values()], lambda: request.json,
        lambda: dict(request.cookies), lambda: dict(request.headers), lambda: request.authorization, lambda: request.url, lambda: request.get_data(),
    ):  # fmt: skip
        read()
    return request.args.to_dict(flat=False)


# Not shrunk, because each step sends a request and the failing example is readable anyway.
@settings(
    max_examples=max(REQUESTS // 2, 1),
    suppress_health_check=list(HealthCheck),
    phases=[Phase.reuse, Phase.generate],
)
@given(generated=generated)
def test_only_declared_responses(target: Flask, generated: GeneratedRequest) -> None:
    restore_tasks(target)
    answer, status_line, headers = run_wsgi_app(target, generated.environ(), buffered=True)
    body, status = b"".join(answer), int(status_line.split()[0])
    operation = operation_of(target, generated)
    event(f"{operation}: {status}")
    declared = DECLARED[operation]
    if operation == "start" and "HTTP_IDEMPOTENCY_KEY" in generated.headers:
        declared = declared | {200}  # An earlier start had this key, and its task has finished.
    assert status in declared, (operation, status, body[:500])
    if "Idempotency-Replayed" in headers:
        assert "HTTP_IDEMPOTENCY_KEY" in generated.headers and status in (200, 202)
    for name, value in headers.items():
        f"{name}: {value}".encode("latin-1")
        assert not set(value) & {"\r", "\n", "\0"}
    if status in (204, 304) or generated.method == "HEAD":
        assert body == b""
        return
    kind = headers.get("Content-Type", "").partition(";")[0]
    if (
        kind == "text/html"
        and operation in ("none", "start")
        or status == 405
        and kind == "text/html"
    ):
        return
    if generated.method == "OPTIONS":
        return
    assert headers["Cache-Control"] == "no-store"
    assert {"Accept", "Authorization", "Cookie"} <= {
        name.strip() for name in headers["Vary"].split(",")
    }
    document = parsed(body, kind)
    if status == 202 and kind != "application/xml":
        assert document["IsCompleted"] is True, (
            "a task runs inside its request and always has an outcome"
        )
    if status < 400:
        return
    assert kind in ("application/problem+json", "application/problem+xml", "application/yaml")
    if kind != "application/problem+xml":
        assert document["status"] == status and document["type"].startswith(
            "tag:flask-asyncroute.readthedocs.io,2026:"
        )
        detail = document["detail"]
        assert (
            detail and detail == document["Error"] and detail.isprintable() and len(detail) <= 2000
        )
        assert not any(
            word in detail
            for word in ("Traceback", "sqlite3", "msgspec", "werkzeug", "codec", "object at 0x")
        )


def operation_of(app: Flask, generated: GeneratedRequest) -> str:
    if generated.method == "OPTIONS":
        return "none"
    environ = generated.environ()
    environ["HTTP_HOST"] = "localhost"
    try:
        endpoint, _ = app.url_map.bind_to_environ(environ).match()
    except HTTPException:
        return "none"
    return (
        endpoint.partition(".")[2]
        if endpoint.startswith("asyncroute.")
        else "none"
        if endpoint == "static"
        else "start"
    )


def parsed(body: bytes, kind: str) -> Any:
    """Parse a response body, which must be well formed, by its content type."""
    if kind.endswith("json"):
        return json.loads(body, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    if kind.endswith("xml"):
        return ElementTree.fromstring(body)
    assert kind == "application/yaml", kind
    return yaml.safe_load(body)
