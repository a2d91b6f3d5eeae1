"""The HTML pages of tasks, lists and problems, and the forms that lead to them."""

from __future__ import annotations

import functools
import io
import re
import threading
from collections.abc import Callable
from html import unescape
from typing import Any

import jinja2
import pytest
from flask import Flask, Response, redirect, request
from flask_wtf.csrf import CSRFProtect
from itsdangerous import URLSafeTimedSerializer
from werkzeug.test import TestResponse

from flask_asyncroute import Access, AsyncRoute, Permission, current_task
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.testing import inline
from tests.support.apps import close_app
from tests.support.flow import IN_MEMORY, Flow

MakeFlow = Callable[..., Flow]

ACCEPT = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
HOSTILE = """"'><script>alert(1)</script>{{ 7*7 }}<img src=x onerror=alert(1)>"""


def browse(flow: Flow, path: str, method: str = "GET", **values: Any) -> TestResponse:
    """Send a request as a browser."""
    headers = {"Accept": ACCEPT, **values.pop("headers", {})}
    return flow.request(method, path, headers=headers, **values)


def page(flow: Flow, path: str, *, status: int = 200, **values: Any) -> str:
    """Return the HTML of a page."""
    response = browse(flow, path, **values)
    assert response.status_code == status, response.get_data(as_text=True)[:2000]
    assert response.content_type == "text/html; charset=utf-8"
    return response.get_data(as_text=True)


def send_form(flow: Flow, path: str = "/work", **values: Any) -> TestResponse:
    return browse(flow, path, "POST", **{"data": {"title": "x"}, **values})


def fields_of(html: str) -> list[tuple[str, str]]:
    """Return the hidden fields of a page's form."""
    found = re.findall(r'<input type="hidden" name="([^"]*)" value="([^"]*)">', html)
    return [(name, unescape(value)) for name, value in found]


def data_of(html: str) -> dict[str, list[str]]:
    data: dict[str, list[str]] = {}
    for name, value in fields_of(html):
        data.setdefault(name, []).append(value)
    return data


def action_of(html: str) -> str:
    (action,) = re.findall(r'<form method="post" action="([^"]*)">', html)
    return unescape(action)


@pytest.fixture
def running(make_flow: MakeFlow, gate: threading.Event) -> Flow:
    """Return an app whose route ``/work`` runs until the gate opens."""
    flow = make_flow()

    @flow.route()
    def work() -> str:
        current_task.set_progress(25, "halfway to half")
        gate.wait()
        return "done"

    return flow


def test_a_form_is_redirected_to_the_page_of_its_task(flow: Flow) -> None:
    @flow.route()
    def work() -> Any:
        return {"title": request.form["title"], "bytes": len(request.files["f"].read())}

    response = send_form(flow, data={"title": "Report", "f": (io.BytesIO(b"12345"), "a.txt")})
    assert (response.status_code, response.data) == (303, b"")
    assert response.headers["Cache-Control"] == "no-store"
    path = response.location
    assert path.startswith("/task/")
    flow.ended(path.removeprefix("/task/"))
    html = page(flow, path)
    assert "Completed" in html and "&#34;bytes&#34;: 5" in html
    assert "data-live" not in html and "http-equiv" not in html and "<form" not in html


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("POST", {"json": {"title": "x"}}),
        ("POST", {"data": b"x", "content_type": "text/plain"}),
        ("PUT", {"data": {"title": "x"}}),
        ("POST", {"data": {"title": "x"}, "headers": {"Accept": "*/*"}}),
        ("POST", {"data": {"title": "x"}, "headers": {"Accept": "application/json"}}),
    ],
)
def test_other_starts_get_the_task_object(
    make_flow: MakeFlow, method: str, options: dict[str, Any]
) -> None:
    flow = make_flow()
    flow.route(methods=["POST", "PUT"])(lambda: None)
    response = browse(flow, "/work", method, **options)
    assert (response.status_code, response.content_type) == (202, "application/json")


def test_the_page_of_a_running_task_refreshes_itself(running: Flow, eventually: Any) -> None:
    path = send_form(running).location
    eventually(lambda: "halfway to half" in page(running, path))
    html = page(running, path)
    assert '<progress max="100" value="25"' in html
    assert "data-live" in html and 'http-equiv="refresh"' in html
    assert f'data-events="{path}/events"' in html
    assert "Stop</button>" in html


def test_pages_are_not_cached_and_have_no_etag(running: Flow) -> None:
    path = send_form(running).location
    response = browse(running, f"{path}?wait=20", headers={"If-None-Match": "*"})
    assert response.status_code == 200
    assert "ETag" not in response.headers
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["Vary"] == "Accept, Authorization, Cookie"
    head = browse(running, path, "HEAD")
    assert (head.status_code, head.data) == (200, b"")


@pytest.mark.parametrize(
    "executor_options", [{"executor": "immediate"}, {}], ids=["immediate", "inline"]
)
def test_a_task_that_ran_in_the_request_shows_its_result_at_once(
    make_flow: MakeFlow, executor_options: dict[str, Any]
) -> None:
    flow = make_flow()
    if not executor_options:
        inline(flow.app)
    flow.route(**executor_options)(lambda: "the result")
    assert "the result" in page(flow, send_form(flow).location)


def test_prefer_wait_does_not_delay_a_form(running: Flow) -> None:
    response = send_form(running, headers={"Prefer": "wait=20"})
    assert response.status_code == 303
    assert "Preference-Applied" not in response.headers


def test_a_repeated_form_is_redirected_to_the_same_task(running: Flow) -> None:
    headers = {"Idempotency-Key": "k" * 30}
    locations = {send_form(running, headers=headers).location for _ in range(2)}
    assert len(locations) == 1


def test_a_form_with_a_used_unique_key_is_redirected_to_the_unfinished_task(
    make_flow: MakeFlow, gate: threading.Event
) -> None:
    flow = make_flow()
    flow.route(unique=True)(lambda: gate.wait() and None)
    flow.headers = {"X-User": "anna"}
    assert send_form(flow).location == send_form(flow).location
    html = send_form(flow, headers={"X-User": "bert"})
    assert html.status_code == 409 and html.content_type.startswith("text/html")


@pytest.mark.parametrize(
    ("config", "options", "data", "status"),
    [
        ({}, {"queue_size": 0}, {"title": "x"}, 503),
        ({"ASYNCROUTE_MAX_BODY": 10}, {}, {"title": "x" * 20}, 413),
        ({}, {"permission": Permission()}, {"title": "x"}, 401),
    ],
)
def test_a_refused_form_gets_a_page(
    make_flow: MakeFlow,
    config: dict[str, Any],
    options: dict[str, Any],
    data: dict[str, str],
    status: int,
    gate: threading.Event,
) -> None:
    flow = make_flow(**config)
    flow.route(max_workers=1, **options)(lambda: gate.wait() and None)
    if status == 503:
        flow.start()
        flow.became(flow.ids()[0], "Running")
        flow.start(status=503)
    response = send_form(flow, data=data)
    assert (response.status_code, response.mimetype) == (status, "text/html")
    program = flow.request("POST", "/work", data=data)
    for name in ("Retry-After", "WWW-Authenticate"):
        assert (name in response.headers) == (name in program.headers)


def test_a_user_over_the_quota_gets_a_page(make_flow: MakeFlow, gate: threading.Event) -> None:
    flow = make_flow(ASYNCROUTE_MAX_TASKS_PER_USER=1)
    flow.route()(lambda: gate.wait() and None)
    flow.headers = {"X-User": "anna"}
    assert send_form(flow).status_code == 303
    response = send_form(flow)
    assert (response.status_code, response.mimetype) == (429, "text/html")
    assert "Retry-After" in response.headers


@pytest.mark.covers("A86")
@pytest.mark.parametrize("jinja_options", [{}, {"autoescape": False}], ids=["usual", "unescaped"])
def test_all_strings_on_pages_are_escaped(
    make_app: Callable[..., Flask], jinja_options: dict[str, Any]
) -> None:
    app = make_app(ASYNCROUTE_STORE="memory://")
    app.jinja_options = jinja_options
    async_routes = AsyncRoute(app)
    async_routes.identity_loader(lambda: {"id": HOSTILE})
    flow = Flow(app, async_routes)

    @flow.route("/result", name=HOSTILE)
    def result() -> Any:
        current_task.set_progress(50, HOSTILE)
        return {HOSTILE: HOSTILE}

    @flow.route("/text", name=HOSTILE)
    def text() -> Any:
        return HOSTILE

    @flow.route("/error", name=HOSTILE)
    def error() -> None:
        current_task.set_progress(50, HOSTILE)
        raise ValueError(HOSTILE)

    tasks = [flow.run(path) for path in ("/result", "/text", "/error")]
    shown = [page(flow, f"/task/{task['Id']}?next=/{HOSTILE}") for task in tasks]
    shown += [
        page(flow, "/tasks"),
        page(flow, f"/tasks?{HOSTILE}=1", status=400),
        page(flow, f"/tasks?cursor={HOSTILE}", status=400),
        page(flow, f"/task/{HOSTILE}", status=404),
        page(flow, f"/task?Id={HOSTILE}", status=404),
    ]
    for html in shown:
        assert "<script>alert" not in html and "<img" not in html
        assert "\"'>" not in html
    for html in shown[:3]:
        assert "&lt;script&gt;alert(1)&lt;/script&gt;{{ 7*7 }}" in html


def test_the_next_page_of_a_list_keeps_its_query_escaped(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.route(endpoint="work")(lambda: None)
    for _ in range(3):
        flow.run()
    html = page(flow, '/tasks?limit=2&filter[Method][NE]="><script>')
    (url,) = re.findall(r'<a href="([^"]*)" rel="next">', html)
    assert "<script>" not in html
    assert page(flow, unescape(url)).count("<tr>") == 2


def test_odd_text_is_shown(make_flow: MakeFlow) -> None:
    """Text that UTF-8 or XML cannot hold must not break the page."""
    flow = make_flow()

    @flow.route(endpoint="work")
    def work() -> Any:
        current_task.set_progress(1, "\ud800\x00\x1b[31m")
        return {"surrogate": "\ud800", "nul": "\x00", "rtl": "\u202e", "emoji": "\U0001f600"}

    @flow.route("/error", endpoint="error")
    def error() -> None:
        raise ValueError("\ud800\x00")

    for path in ("/work", "/error"):
        page(flow, f"/task/{flow.run(path)['Id']}")
    page(flow, "/tasks")


@pytest.mark.parametrize("value", [None, "", 0, False, [], {}, "text", 1.5, [1, "two"]])
def test_every_kind_of_result_is_shown(make_flow: MakeFlow, value: Any) -> None:
    flow = make_flow()
    flow.route()(lambda: value)
    html = page(flow, f"/task/{flow.run()['Id']}")
    assert ("The task has no result" in html) == (value is None)


def test_a_long_result_is_cut_and_linked(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.route()(lambda: "x" * 100_000)
    task = flow.run()
    html = page(flow, f"/task/{task['Id']}")
    assert len(html) < 70_000
    assert f'href="/task/{task["Id"]}/result"' in html


def test_pages_have_strict_headers(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.route()(lambda: None)
    task = flow.run()
    for path in (f"/task/{task['Id']}", "/tasks", "/task/missing"):
        response = browse(flow, path)
        headers = response.headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and "*" not in policy
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        html = response.get_data(as_text=True)
        assert not re.search(r"<script(?! src=)|<style| style=| on\w+=", html)


@pytest.mark.covers("A89")
@pytest.mark.parametrize(
    "path", ["/", "/thanks", "/thanks?a=1&b=%2F#top", "/a%20b", "/a:b@c", "/~x/..y", "/?q=/../"]
)
def test_next_is_linked_when_the_task_has_ended(
    make_flow: MakeFlow, gate: threading.Event, path: str
) -> None:
    flow = make_flow()
    flow.route()(lambda: gate.wait() and None)
    location = send_form(flow, "/work", query_string={"next": path}).location
    link = f'<a class="button" href="{path.replace("&", "&amp;")}">'
    assert link not in page(flow, location)
    gate.set()
    flow.ended(location.partition("?")[0].removeprefix("/task/"))
    assert link in page(flow, location)


@pytest.mark.covers("A89")
@pytest.mark.parametrize(
    "target",
    [
        "//evil.example", "///evil.example", "/\\evil.example", "\\\\evil.example", "https:evil", "https://evil.example",
        "https:/evil", "javascript:alert(1)", "data:text/html,x", "/x\r\nSet-Cookie: a=b", "/\t/evil.example", "/\n/evil",
        " /x", "/x y", "evil", "", "?x", "#x", "/\x00", "/é", "/x\\..\\..", "/..//evil.example", "/./x", "/a/../b",
        "/%2e%2e/x", "/a/%2E./b", "/a/.", "/a/..?x", "/" + "x" * 3000,
    ],
)  # fmt: skip
def test_next_that_is_not_a_path_of_the_app_is_ignored(make_flow: MakeFlow, target: str) -> None:
    flow = make_flow()
    flow.route(executor="immediate")(lambda: None)
    response = send_form(flow, query_string={"next": target})
    assert response.status_code == 303
    assert "?" not in response.location
    html = page(flow, response.location, query_string={"next": target})
    assert "Continue" not in html


@pytest.mark.covers("A89")
def test_next_that_is_not_utf_8_is_ignored(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.route(executor="immediate")(lambda: None)
    response = send_form(flow, environ_overrides={"QUERY_STRING": "next=/\xff"})
    assert response.status_code == 303
    assert "Continue" not in page(flow, response.location)


@pytest.mark.covers("A89")
@pytest.mark.parametrize(
    ("target", "is_linked"),
    [
        ("/app", True), ("/app/", True), ("/app/thanks", True), ("/app?x", True),
        ("/", False), ("/other", False), ("/application", False), ("/app/../other", False), ("/app%2f..", False),
    ],
)  # fmt: skip
def test_under_a_prefix_next_stays_in_the_app(
    make_flow: MakeFlow, target: str, is_linked: bool
) -> None:
    flow = make_flow()
    flow.route(executor="immediate")(lambda: None)
    mounted = {"environ_overrides": {"SCRIPT_NAME": "/app"}}
    location = send_form(flow, query_string={"next": target}, **mounted).location
    assert location.startswith("/app/task/")
    html = page(flow, location.removeprefix("/app"), **mounted)
    assert ("Continue" in html) == is_linked


def stop(flow: Flow, html: str, **values: Any) -> TestResponse:
    """Press the stop button of a page."""
    return browse(flow, action_of(html), "POST", **{"data": data_of(html), **values})


def test_the_stop_button_stops_the_task_and_returns_to_its_page(running: Flow) -> None:
    location = send_form(running, query_string={"next": "/thanks"}).location
    assert "next=" in location
    response = stop(running, page(running, location))
    assert (response.status_code, response.location) == (303, location)
    html = page(running, location)
    assert "Aborted by the user" in html and 'href="/thanks"' in html


def test_the_stop_button_of_a_finished_task_returns_to_its_page(
    running: Flow, gate: threading.Event
) -> None:
    location = send_form(running).location
    html = page(running, location)
    gate.set()
    running.ended(location.removeprefix("/task/"))
    response = stop(running, html)
    assert (response.status_code, response.location) == (303, location)
    assert "Completed" in page(running, location)


@pytest.mark.covers("A90")
def test_a_stop_needs_the_token_of_the_task_and_the_caller(
    make_flow: MakeFlow, gate: threading.Event, monkeypatch: Any
) -> None:
    flow = make_flow()
    anyone = Permission(write=Access(users=["bert"]))
    flow.route(permission=anyone)(lambda: gate.wait() and None)
    flow.headers = {"X-User": "anna"}
    one, two = (send_form(flow).location for _ in range(2))
    of_one, of_two = (data_of(page(flow, path)) for path in (one, two))
    of_bert = data_of(page(flow, one, headers={"X-User": "bert"}))
    key = runtime_of(flow.app).runner.store.secret()
    old = URLSafeTimedSerializer(key, salt="another").dumps([one.removeprefix("/task/"), "anna"])
    refused: list[Any] = [
        {}, of_two, of_bert, {"csrf_token": ""}, {"csrf_token": "é.b.c"}, {"csrf_token": "x" * 10_000},
        {"csrf_token": [value + "x" for value in of_one["csrf_token"]]}, {"csrf_token": old},
        {"token": of_one["csrf_token"]},
    ]  # fmt: skip
    for data in refused:
        response = browse(flow, f"{one}/stop", "POST", data=data)
        assert response.status_code == 403, data
        assert "has expired" in response.get_data(as_text=True)
    assert browse(flow, f"{one}/stop", "POST", json=of_one).status_code == 403
    assert flow.get(one.removeprefix("/task/"))["State"] in ("NotStarted", "Running")
    with monkeypatch.context() as patch:
        patch.setattr("time.time", lambda: 4_000_000_000.0)
        assert browse(flow, f"{one}/stop", "POST", data=of_one).status_code == 403
    logged_out = browse(flow, f"{one}/stop", "POST", data=of_one, headers={"X-User": "carl"})
    assert logged_out.status_code == 404
    assert browse(flow, f"{one}/stop", "POST", data=of_one).status_code == 303


def test_a_token_of_a_user_is_worthless_after_the_logout(
    make_flow: MakeFlow, gate: threading.Event
) -> None:
    flow = make_flow()
    flow.route(permission=Permission(read=Access(groups=["g"])))(lambda: gate.wait() and None)
    flow.headers = {"X-User": "anna"}
    location = send_form(flow).location
    data = data_of(page(flow, location))
    flow.headers = {}
    assert browse(flow, f"{location}/stop", "POST", data=data).status_code == 404
    flow.headers = {"X-User": "bert;groups=g"}
    assert "<form" not in page(flow, location)
    assert browse(flow, f"{location}/stop", "POST", data=data).status_code == 403


@pytest.mark.covers("A90")
def test_a_stop_from_another_site_is_refused(running: Flow) -> None:
    location = send_form(running).location
    html = page(running, location)
    headers = {"Sec-Fetch-Site": "cross-site", "Cookie": "session=x"}
    running.client = running.app.test_client(use_cookies=False)
    assert stop(running, html, headers=headers).status_code == 403
    assert stop(running, html, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 303


def test_a_large_form_does_not_stop_a_task(running: Flow) -> None:
    location = send_form(running).location
    data = {**data_of(page(running, location)), "title": "x" * 1_100_000}
    response = browse(running, f"{location}/stop", "POST", data=data)
    assert (response.status_code, response.mimetype) == (413, "text/html")


@pytest.mark.parametrize("options", [{"cancellable": False}, {"permission": True}])
def test_without_permission_to_stop_there_is_no_button(
    make_flow: MakeFlow, gate: threading.Event, options: dict[str, Any]
) -> None:
    flow = make_flow()
    if "permission" in options:
        options = {"permission": Permission(read=Access(users=["bert"]))}
    flow.route(**options)(lambda: gate.wait() and None)
    location = send_form(flow, headers={"X-User": "anna"}).location
    reader = {"X-User": "anna" if "cancellable" in options else "bert"}
    html = page(flow, location, headers=reader)
    assert "<form" not in html
    response = browse(flow, f"{location}/stop", "POST", data={}, headers=reader)
    assert (response.status_code, response.mimetype) == (403, "text/html")


@pytest.mark.covers("A90")
@pytest.mark.parametrize("field", ["csrf_token", "form_token"])
@pytest.mark.parametrize("is_exempt", [False, True])
def test_the_stop_button_works_with_flask_wtf(
    make_app: Callable[..., Flask], gate: threading.Event, field: str, is_exempt: bool
) -> None:
    """Over HTTPS, Flask-WTF also needs the Referer."""
    app = make_app(ASYNCROUTE_STORE="memory://", SECRET_KEY="x", WTF_CSRF_FIELD_NAME=field)
    csrf = CSRFProtect(app)
    async_routes = AsyncRoute(app)
    flow = Flow(app, async_routes)
    flow.route()(lambda: gate.wait() and None)
    if is_exempt:
        csrf.exempt(async_routes.blueprint)
    base = {"base_url": "https://localhost"}
    assert send_form(flow, **base).status_code == 400, "the app's own rules protect the start"
    app.config["WTF_CSRF_CHECK_DEFAULT"] = False
    task_id = flow.start()["Id"]
    app.config["WTF_CSRF_CHECK_DEFAULT"] = True
    response = browse(flow, f"/task/{task_id}", **base)
    assert response.headers["Referrer-Policy"] == "same-origin"
    html = response.get_data(as_text=True)
    referer = {"Referer": f"https://localhost/task/{task_id}"}
    own = [value for name, value in fields_of(html) if name == "csrf_token"][-1]
    if not is_exempt:
        only_own = browse(flow, action_of(html), "POST", data={"csrf_token": own}, headers=referer, **base)  # fmt: skip
        assert only_own.status_code == 400
    assert stop(flow, html, headers=referer, **base).status_code == 303
    assert "Aborted by the user" in page(flow, f"/task/{task_id}", **base)


def test_the_page_works_if_flask_wtf_is_switched_off(
    make_app: Callable[..., Flask], gate: threading.Event
) -> None:
    app = make_app(ASYNCROUTE_STORE="memory://", WTF_CSRF_ENABLED=False)
    CSRFProtect(app)
    flow = Flow(app, AsyncRoute(app))
    flow.route()(lambda: gate.wait() and None)
    html = page(flow, send_form(flow).location)
    assert [name for name, _ in fields_of(html)] == ["csrf_token"]
    assert stop(flow, html).status_code == 303


@pytest.mark.covers("A90")
@pytest.mark.parametrize("is_forbidden", [False, True])
def test_the_rules_of_the_app_decide_about_a_form_of_another_site(
    running: Flow, is_forbidden: bool
) -> None:
    @running.app.before_request
    def same_origin_only() -> Response | None:
        is_foreign = request.headers.get("Sec-Fetch-Site") == "cross-site"
        return Response(status=403) if is_foreign and is_forbidden else None

    headers = {"Sec-Fetch-Site": "cross-site", "Cookie": "session=x"}
    assert send_form(running, headers=headers).status_code == (403 if is_forbidden else 303)


def test_another_user_sees_nothing_of_a_task(make_flow: MakeFlow, gate: threading.Event) -> None:
    flow = make_flow()
    flow.route(name="secret name")(lambda: gate.wait() and None)
    location = send_form(flow, headers={"X-User": "anna"}).location
    task_id = location.removeprefix("/task/")
    unknown = "x" * len(task_id)
    for headers in ({}, {"X-User": "bert"}):
        for path in ("", "/result", "/stop"):
            method = "POST" if path == "/stop" else "GET"
            answers = [
                browse(flow, f"/task/{an_id}{path}", method, headers=headers)
                for an_id in (task_id, unknown)
            ]
            assert [answer.status_code for answer in answers] == [404, 404]
            texts = [answer.get_data(as_text=True) for answer in answers]
            assert texts[0].replace(task_id, unknown) == texts[1]
        html = page(flow, "/tasks", headers=headers)
        assert task_id not in html and "secret name" not in html


@pytest.mark.parametrize("places", [("query",), ("path",), ("query", "path"), ("cookie", "query")])
def test_links_work_under_prefixes_and_with_the_id_in_the_query(
    make_flow: MakeFlow, gate: threading.Event, places: tuple[str, ...]
) -> None:
    flow = make_flow(ASYNCROUTE_TASK_ID_IN=places, ASYNCROUTE_URL_PREFIX="/api")
    flow.route()(lambda: gate.wait() and None)
    mounted = {"environ_overrides": {"SCRIPT_NAME": "/app"}}

    def path_of(url: str) -> str:
        assert url.startswith("/app/api/"), url
        return unescape(url).removeprefix("/app")

    location = send_form(flow, query_string={"next": "/app/x"}, **mounted).location
    html = page(flow, path_of(location), **mounted)
    for url in re.findall(r'(?:href|src)="(/[^"]*)"', html):
        response = browse(flow, path_of(url), **mounted)
        assert response.status_code == 200, url
        response.close()
    listed = page(flow, "/api/tasks", **mounted)
    (link,) = re.findall(r'<td class="name"><a href="([^"]*)">', listed)
    page(flow, path_of(link), **mounted)
    response = browse(flow, path_of(action_of(html)), "POST", data=data_of(html), **mounted)
    assert (response.status_code, response.location) == (303, location)


@pytest.mark.parametrize("places", [("header",), ("cookie",), ("header", "cookie")])
def test_without_a_url_of_the_task_a_form_gets_the_task_object(
    make_flow: MakeFlow, places: tuple[str, ...]
) -> None:
    flow = make_flow(ASYNCROUTE_TASK_ID_IN=places)
    flow.route(executor="immediate")(lambda: None)
    response = send_form(flow)
    assert (response.status_code, response.mimetype) == (202, "application/json")
    assert "<a " not in page(flow, "/tasks")
    with_header = {"headers": {"Id": response.get_json()["Id"]}}
    if "header" in places:
        assert "Completed" in page(flow, "/task", **with_header)


@pytest.mark.parametrize(
    ("operations", "redirects", "stops", "lists"),
    [
        (["get"], True, False, False),
        (["get", "stop"], True, True, False),
        (["get", "query"], True, False, True),
        (["stop", "query", "events"], False, False, True),
        (["events"], False, False, False),
    ],
)
def test_pages_link_only_to_registered_operations(
    make_flow: MakeFlow,
    gate: threading.Event,
    operations: list[str],
    redirects: bool,
    stops: bool,
    lists: bool,
) -> None:
    flow = make_flow(ASYNCROUTE_OPERATIONS=operations)
    flow.route()(lambda: gate.wait() and None)
    response = send_form(flow)
    assert response.status_code == (303 if redirects else 202)
    if redirects:
        html = page(flow, response.location)
        assert ("<form" in html, "All tasks" in html) == (stops, lists)
        assert "data-events" not in html and "data-live" in html
    elif lists:
        assert "<a " not in page(flow, "/tasks")
        task_id = response.get_json()["Id"]
        assert browse(flow, f"/task/{task_id}/stop", "POST").status_code in (404, 405)


def test_a_route_without_events_is_polled(make_flow: MakeFlow, gate: threading.Event) -> None:
    flow = make_flow()
    flow.route(sse=False)(lambda: gate.wait() and None)
    html = page(flow, send_form(flow).location)
    assert "data-live" in html and "data-events" not in html


@pytest.mark.parametrize("matching", ["subdomain_matching", "host_matching"])
def test_links_stay_on_the_host_of_the_request(matching: str, tmp_path: Any) -> None:
    options: dict[str, Any] = {matching: True}
    if matching == "host_matching":
        options["static_host"] = "app.example"
    app = Flask("app", instance_path=str(tmp_path), **options)
    app.config.update(TESTING=True, SERVER_NAME="app.example", ASYNCROUTE_STORE="memory://")
    async_routes = AsyncRoute(app)
    flow = Flow(app, async_routes)
    place = {"host": "a.app.example"} if matching == "host_matching" else {"subdomain": "a"}
    flow.route(executor="immediate", **place)(lambda: None)
    base = {"base_url": "http://a.app.example"}
    html = page(flow, send_form(flow, **base).location, **base)
    urls = re.findall(r'(?:href|src)="([^"]*)"', html)
    for url in urls:
        if url != "data:,":
            assert url.startswith("/") and not url.startswith("//")
            response = browse(flow, url, **base)
            assert response.status_code == 200
            response.close()
    page(flow, "/tasks", **base)
    close_app(app)


@pytest.mark.parametrize(
    "name",
    ["../config.py", "..%2fconfig.py", "%2e%2e/config.py", "/etc/passwd", "x/../../config.py", "no.css", "..\\config.py"],
)  # fmt: skip
def test_assets_cannot_leave_their_folder(make_flow: MakeFlow, name: str) -> None:
    flow = make_flow()
    assert browse(flow, f"/task-pages/{name}").status_code in (404, 308)


def test_assets_need_no_login_but_pages_do(make_flow: MakeFlow) -> None:
    def login_required(view: Any) -> Any:
        @functools.wraps(view)
        def wrapped(*args: Any, **values: Any) -> Any:
            return view(*args, **values) if "X-User" in request.headers else redirect("/login")

        return wrapped

    flow = make_flow(decorators=[login_required])
    flow.route(executor="immediate")(lambda: None)
    location = send_form(flow).location
    assert browse(flow, location).location == "/login"
    assert browse(flow, "/tasks").location == "/login"
    assert browse(flow, f"{location}/stop", "POST").location == "/login"
    for name, mimetype in (("pages.css", "text/css"), ("pages.js", "text/javascript")):
        response = browse(flow, f"/task-pages/{name}")
        assert (response.status_code, response.mimetype) == (200, mimetype)
        response.close()


@pytest.mark.parametrize("name", ["base", "task"])
def test_an_app_can_replace_a_template(make_app: Callable[..., Flask], name: str) -> None:
    app = make_app(ASYNCROUTE_STORE="memory://")
    source = "<title>ours</title>{% block content %}{{ task.id }}{% endblock %}"
    app.jinja_loader = jinja2.DictLoader({f"asyncroute/{name}.html": source})
    flow = Flow(app, AsyncRoute(app))
    flow.route(executor="immediate")(lambda: "the result")
    response = browse(flow, send_form(flow).location)
    assert "<title>ours</title>" in response.get_data(as_text=True)
    assert ("Content-Security-Policy" in response.headers) == (name != "base")
    assert response.headers["X-Frame-Options"] == "DENY"


def test_an_app_with_strict_templates_has_pages(make_app: Callable[..., Flask]) -> None:
    app = make_app(ASYNCROUTE_STORE="memory://")
    app.jinja_env.undefined = jinja2.StrictUndefined
    flow = Flow(app, AsyncRoute(app))
    flow.route(executor="immediate")(lambda: None)

    @app.context_processor
    def shadow() -> dict[str, Any]:
        return {"task": "wrong", "problem": "wrong", "tasks": "wrong", "words": "wrong"}

    assert "Completed" in page(flow, send_form(flow).location)
    page(flow, "/tasks")
    page(flow, "/task/missing", status=404)
    page(flow, "/task?x=1", status=400)


def test_a_context_processor_that_fails_does_not_lose_a_task(
    make_app: Callable[..., Flask],
) -> None:
    app = make_app(ASYNCROUTE_STORE="memory://", PROPAGATE_EXCEPTIONS=False)
    flow = Flow(app, AsyncRoute(app))
    flow.route(executor="immediate")(lambda: None)

    @app.context_processor
    def fail() -> dict[str, Any]:
        raise ValueError("the app's error")

    location = send_form(flow).location
    assert browse(flow, location).status_code == 500
    assert flow.get(location.removeprefix("/task/"))["State"] == "Completed"


@IN_MEMORY
def test_an_empty_list_says_so(flow: Flow) -> None:
    assert "There are no tasks here that you may see." in page(flow, "/tasks")
