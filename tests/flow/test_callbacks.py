"""Callbacks over HTTP to a real receiver: messages, repeated attempts, refused starts,
``redeliver``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask, request
from pytest_httpserver import HTTPServer
from standardwebhooks import Webhook, WebhookVerificationError
from werkzeug import Request, Response

from flask_asyncroute import AsyncRoute, Callback, callback_failed, callback_sent
from flask_asyncroute.errors import CallbackRefused, TaskNotFound, TaskUnfinished
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.webhooks import sender

MakeApp = Callable[..., Flask]
Eventually = Callable[..., Any]
SECRETS = [
    "whsec_" + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo=",
    "MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkw",
]
STORES = ["memory://", "sqlite:///asyncroute.db"]


@pytest.fixture
def received(httpserver: HTTPServer) -> list[Request]:
    """Return the list of requests that the receiver got so far; it answers 200."""
    found: list[Request] = []

    def record(current: Request) -> Response:
        current.get_data()
        found.append(current)
        return Response(status=200)

    httpserver.expect_request("/hook").respond_with_handler(record)
    return found


@pytest.fixture
def make_served(make_app: MakeApp) -> Iterator[Callable[..., Flask]]:
    def make(callback: Callback | None = None, store: str = "memory://", **config: Any) -> Flask:
        config.setdefault("ASYNCROUTE_CALLBACK_ALLOWED_HOSTS", ["localhost", "127.0.0.1"])
        app = make_app(ASYNCROUTE_STORE=store, **config)
        async_routes = AsyncRoute(app)
        app.extensions["under-test"] = async_routes

        @async_routes.route(
            "/work", methods=["POST"], callback=callback or Callback(send_result=True)
        )
        def work() -> Any:
            return {"answer": 42}

        @async_routes.route("/fails", methods=["POST"], callback=Callback())
        def fails() -> None:
            raise ValueError("broken")

        @async_routes.route("/plain", methods=["POST"])
        def plain() -> None: ...

        return app

    yield make


def start(
    app: Flask, path: str = "/work", *, headers: dict[str, str] | None = None, **body: Any
) -> Any:
    return app.test_client().post(path, json=body, headers=headers)


def info(app: Flask, task_id: str) -> Any:
    return app.test_client().get(f"/task/{task_id}").json["CallbackInfo"]


def routes_of(app: Flask) -> AsyncRoute:
    return app.extensions["under-test"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("store", STORES)
def test_the_outcome_is_sent(
    make_served: Callable[..., Flask],
    httpserver: HTTPServer,
    received: list[Request],
    eventually: Eventually,
    store: str,
) -> None:
    app = make_served(store=store)
    url = httpserver.url_for("/hook?secret=1")
    answer = start(app, callbackUrl=url)
    assert answer.status_code == 202
    bare = url.partition("?")[0]
    assert answer.json["CallbackSettings"] == {
        "UrlField": "$request.body#/callbackUrl", "Method": "POST", "ContentType": "application/json", "SendResult": True,
        "EventName": "[Post]/work", "HeaderFields": [],
    }  # fmt: skip
    assert answer.json["CallbackInfo"] == {"State": "NotStarted", "Tentative": 0, "Url": bare}
    task_id = answer.json["Id"]
    eventually(lambda: info(app, task_id) == {"State": "Completed", "Tentative": 1, "Url": bare})
    [sent] = received
    assert sent.json == {
        "Id": task_id, "Url": "http://localhost/work", "Method": "POST", "EventName": "[Post]/work", "State": "Completed",
        "Result": {"answer": 42},
    }  # fmt: skip
    assert sent.method == "POST" and sent.query_string == b"secret=1"
    assert sent.headers["Asyncroute-Depth"] == "1" and "." not in sent.headers["webhook-id"]
    assert "webhook-signature" not in sent.headers


@pytest.mark.parametrize("store", STORES)
def test_a_failure_is_sent_without_a_result(
    make_served: Callable[..., Flask],
    httpserver: HTTPServer,
    received: list[Request],
    eventually: Eventually,
    store: str,
) -> None:
    start(make_served(store=store), "/fails", callbackUrl=httpserver.url_for("/hook"))
    eventually(lambda: received)
    assert (
        received[0].json["State"] == "Failed" and received[0].json["Error"] == "ValueError: broken"
    )
    assert "Result" not in received[0].json


@pytest.mark.covers("A18")
def test_a_message_is_signed_with_each_secret(
    make_served: Callable[..., Flask],
    httpserver: HTTPServer,
    received: list[Request],
    eventually: Eventually,
) -> None:
    start(make_served(ASYNCROUTE_CALLBACK_SECRET=SECRETS), callbackUrl=httpserver.url_for("/hook"))
    eventually(lambda: received)
    body = received[0].get_data()
    headers = {
        name: received[0].headers[name]
        for name in ("webhook-id", "webhook-timestamp", "webhook-signature")
    }
    for secret in SECRETS:
        assert Webhook(secret).verify(body, headers) == json.loads(body)
        for altered in (
            (body + b" ", headers),
            (body, {**headers, "webhook-id": "msg_other"}),
            (body, {**headers, "webhook-timestamp": str(int(headers["webhook-timestamp"]) - 301)}),
            (body, {**headers, "webhook-timestamp": str(int(headers["webhook-timestamp"]) + 301)}),
        ):
            with pytest.raises(WebhookVerificationError):
                Webhook(secret).verify(*altered)


def test_expressions_are_resolved_from_the_request(
    make_served: Callable[..., Flask],
    httpserver: HTTPServer,
    received: list[Request],
    eventually: Eventually,
) -> None:
    callback = Callback(
        url="$request.query.to", content_type="$request.header.X-Kind", event_name="done",
        headers={"X-Fixed": "1", "X-Token": "Bearer {$request.body#/token}", "X-None": "$request.header.X-Missing"},
    )  # fmt: skip
    app = make_served(callback)
    answer = app.test_client().post(
        f"/work?to={httpserver.url_for('/hook')}",
        json={"token": "s3cret"},
        headers={"X-Kind": "application/xml"},
    )
    assert answer.status_code == 202
    assert answer.json["CallbackSettings"]["HeaderFields"] == ["X-Fixed", "X-Token", "X-None"]
    assert b"s3cret" not in answer.data
    eventually(lambda: received)
    [sent] = received
    assert (sent.headers["X-Fixed"], sent.headers["X-Token"]) == (
        "1",
        "Bearer s3cret",
    ) and "X-None" not in sent.headers
    assert sent.mimetype == "application/xml" and b"<EventName>done</EventName>" in sent.get_data()


@pytest.mark.parametrize("body", [{}, {"callbackUrl": None}])
def test_without_a_url_nothing_is_sent(make_served: Callable[..., Flask], body: Any) -> None:
    answer = start(make_served(), **body)
    assert (
        answer.status_code == 202
        and "CallbackInfo" not in answer.json
        and "CallbackSettings" not in answer.json
    )


@pytest.mark.covers("A01", "A14")
@pytest.mark.parametrize(
    "url",
    [
        "", "x", "http://", "http://169.254.169.254/latest/meta-data", "http://[::1]/", "http://[::]/", "http://0.0.0.0/",
        "http://127.1/", "http://2130706433/", "http://0x7f000001/", "http://0177.0.0.1/", "http://10.0.0.1/",
        "http://100.64.0.1/", "http://[fc00::1]/", "http://[fe80::1]/", "http://224.0.0.1/", "file:///etc/passwd",
        "gopher://x/", "javascript:alert(1)", "http://example.com:0/", "http://example.com:99999/", "http://example.com:-1/",
        "http://exa\tmple.com/", "http://example.com/\r\nX: y", "http://example.com/\0", "http://example.com/" + "x" * 2050,
        ["http://example.com/"], {"a": 1}, 5, True, "http://localhost/", "http://LOCALHOST./",
    ],
)  # fmt: skip
def test_a_forbidden_url_starts_nothing(make_served: Callable[..., Flask], url: Any) -> None:
    app = make_served(ASYNCROUTE_CALLBACK_ALLOWED_HOSTS=[])
    answer = start(app, callbackUrl=url)
    assert (
        answer.status_code == 400
        and answer.json["type"] == "tag:flask-asyncroute.readthedocs.io,2026:callback-refused"
    ), answer.json
    assert app.test_client().get("/tasks").json == []


@pytest.mark.covers("A15")
def test_a_line_break_in_a_header_is_refused(make_served: Callable[..., Flask]) -> None:
    app = make_served(Callback(url="http://example.com/", headers={"X-A": "$request.body#/a"}))
    for value in ("a\r\nX-B: c", "a\nb", "a\0b"):
        assert start(app, a=value).status_code == 400


@pytest.mark.covers("A17")
@pytest.mark.parametrize(
    ("depth", "status"), [("0", 202), ("3", 202), ("4", 400), ("x", 400), ("-1", 400), ("", 400)]
)
def test_a_request_over_depth_3_starts_no_task_with_a_callback(
    make_served: Callable[..., Flask], depth: str, status: int
) -> None:
    app = make_served(Callback(url="http://127.0.0.1:9/"))
    headers = {"Asyncroute-Depth": depth}
    assert start(app, headers=headers).status_code == status
    assert start(app, "/plain", headers=headers).status_code == 202


@pytest.mark.covers("F26")
def test_a_failed_attempt_is_repeated(
    make_served: Callable[..., Flask],
    httpserver: HTTPServer,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sender, "DELAYS", (0.0, 0.05, 0.05, 0.05))
    ids: list[str] = []

    def answer(current: Request) -> Response:
        ids.append(current.headers["webhook-id"])
        return Response(status=503 if len(ids) < 3 else 204)

    httpserver.expect_request("/hook").respond_with_handler(answer)
    app = make_served()
    task_id = start(app, callbackUrl=httpserver.url_for("/hook")).json["Id"]
    eventually(lambda: info(app, task_id)["State"] == "Completed", 10)
    assert info(app, task_id)["Tentative"] == 3 and len(set(ids)) == 1 and len(ids) == 3


@pytest.mark.covers("F26", "F27")
@pytest.mark.parametrize(("status", "attempts"), [(410, 1), (500, 4), (301, 4), (429, 4), (404, 4)])
def test_a_callback_fails_at_410_or_after_four_attempts(
    make_served: Callable[..., Flask], httpserver: HTTPServer, eventually: Eventually, monkeypatch: pytest.MonkeyPatch,
    hear: Any, status: int, attempts: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(sender, "DELAYS", (0.0, 0.02, 0.02, 0.02))
    inside: list[Request] = []
    httpserver.expect_request("/inside").respond_with_handler(
        lambda current: inside.append(current) or Response()
    )
    httpserver.expect_request("/hook").respond_with_data(
        "", status, {"Location": httpserver.url_for("/inside")}
    )
    app = make_served()
    sent_signals = hear(callback_failed, callback_sent)
    task_id = start(app, callbackUrl=httpserver.url_for("/hook")).json["Id"]
    eventually(lambda: info(app, task_id)["State"] == "Failed", 10)
    assert info(app, task_id)["Tentative"] == attempts and not inside
    task = app.test_client().get(f"/task/{task_id}").json
    assert (task["State"], task["Result"]) == ("Completed", {"answer": 42})
    eventually(lambda: [name for name, _ in sent_signals] == ["callback-failed"])


@pytest.mark.covers("F26")
def test_retry_after_of_the_receiver_is_honoured(
    make_served: Callable[..., Flask],
    httpserver: HTTPServer,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sender, "DELAYS", (0.0, 0.02, 0.02, 0.02))
    httpserver.expect_request("/hook").respond_with_data("", 503, {"Retry-After": "100"})
    app = make_served()
    task_id = start(app, callbackUrl=httpserver.url_for("/hook")).json["Id"]
    eventually(lambda: info(app, task_id)["Tentative"] == 1)
    store = runtime_of(app).runner.store
    from flask_asyncroute.task import now_us

    due = eventually(lambda: store.outbox.next_due(now_us()))
    assert 90_000_000 < due - now_us() < 101_000_000


def test_redeliver_sends_a_callback_again(
    make_served: Callable[..., Flask],
    httpserver: HTTPServer,
    received: list[Request],
    eventually: Eventually,
) -> None:
    app = make_served(Callback(headers={"X-Fixed": "1", "X-Token": "$request.body#/token"}))
    async_routes = routes_of(app)
    task_id = start(app, callbackUrl=httpserver.url_for("/hook"), token="t").json["Id"]
    eventually(lambda: info(app, task_id)["State"] == "Completed")
    with app.app_context():
        assert async_routes.redeliver(task_id).callback_state == "NotStarted"
    eventually(lambda: len(received) == 2 and info(app, task_id)["State"] == "Completed")
    first, second = received
    assert (
        first.headers["webhook-id"] == second.headers["webhook-id"]
        and first.get_data() == second.get_data()
    )
    assert (first.headers["X-Token"], second.headers.get("X-Token"), second.headers["X-Fixed"]) == (
        "t",
        None,
        "1",
    )


def test_redeliver_without_a_callback_or_task_raises(
    make_served: Callable[..., Flask], eventually: Eventually
) -> None:
    app = make_served()
    async_routes = routes_of(app)
    plain = start(app, "/plain").json["Id"]
    with app.app_context():
        async_routes.wait(plain, 5)
        with pytest.raises(CallbackRefused):
            async_routes.redeliver(plain)
        with pytest.raises(TaskNotFound):
            async_routes.redeliver("unknown")


def test_redeliver_while_the_callback_is_being_sent_raises(
    make_served: Callable[..., Flask], httpserver: HTTPServer, eventually: Eventually, gate: Any
) -> None:
    """The result of the current attempt would overwrite the new state."""
    httpserver.expect_request("/slow").respond_with_handler(
        lambda request: Response(status=204 if gate.wait(10) else 500)
    )
    app = make_served(Callback())
    task_id = start(app, callbackUrl=httpserver.url_for("/slow")).json["Id"]
    eventually(lambda: info(app, task_id)["State"] == "Running")
    with app.app_context(), pytest.raises(TaskUnfinished, match="is being sent"):
        routes_of(app).redeliver(task_id)
    gate.set()
    eventually(lambda: info(app, task_id)["State"] == "Completed")


def test_redeliver_of_an_unfinished_task_raises(make_app: MakeApp, gate: Any) -> None:
    app = make_app(ASYNCROUTE_STORE="memory://")
    async_routes = AsyncRoute(app)

    @async_routes.route("/work", methods=["POST"], callback=Callback(url="http://example.com/"))
    def work() -> None:
        gate.wait(10)

    task_id = start(app).json["Id"]
    with app.app_context(), pytest.raises(TaskUnfinished):
        async_routes.redeliver(task_id)
    runtime_of(app).runner.sender.is_closing = True


@pytest.mark.covers("F30")
def test_a_new_process_sends_pending_callbacks(
    make_served: Callable[..., Flask],
    httpserver: HTTPServer,
    received: list[Request],
    eventually: Eventually,
    tmp_path: Any,
) -> None:
    store = f"sqlite:///{tmp_path}/shared.db"
    app = make_served(store=store)
    runner = runtime_of(app).prepare() and runtime_of(app).runner
    runner.sender.is_closing = True
    task_id = start(app, callbackUrl=httpserver.url_for("/hook")).json["Id"]
    with app.app_context():
        routes_of(app).wait(task_id, 5)
    assert not received and info(app, task_id)["State"] == "NotStarted"
    runtime_of(app).close()
    other = make_served(store=store)
    assert other.test_client().get("/tasks").status_code == 200
    eventually(lambda: received, 10)
    eventually(lambda: info(other, task_id)["State"] == "Completed")


def test_a_purge_removes_a_pending_callback(
    make_served: Callable[..., Flask], httpserver: HTTPServer, eventually: Eventually
) -> None:
    httpserver.expect_request("/hook").respond_with_data("", 503)
    app = make_served()
    client = app.test_client()
    task_id = start(app, callbackUrl=httpserver.url_for("/hook")).json["Id"]
    eventually(lambda: info(app, task_id)["Tentative"] == 1)
    assert client.delete(f"/task/{task_id}?purge=true").status_code == 204
    assert runtime_of(app).runner.store.outbox.next_due(2**61) is None


def test_a_delivered_callback_sends_callback_sent(
    make_served: Callable[..., Flask],
    httpserver: HTTPServer,
    received: list[Request],
    eventually: Eventually,
    hear: Any,
) -> None:
    sent_signals = hear(callback_sent, callback_failed)
    app = make_served()
    task_id = start(app, callbackUrl=httpserver.url_for("/hook")).json["Id"]
    eventually(lambda: sent_signals)
    assert [(name, task.id, task.callback_state) for name, task in sent_signals] == [
        ("callback-sent", task_id, "Completed")
    ]


def test_the_callback_of_the_configuration_applies_to_all_routes(
    make_app: MakeApp, httpserver: HTTPServer, received: list[Request], eventually: Eventually
) -> None:
    app = make_app(
        ASYNCROUTE_STORE="memory://", ASYNCROUTE_CALLBACK=Callback(url=httpserver.url_for("/hook"))
    )
    async_routes = AsyncRoute(app)

    @async_routes.route("/work", methods=["POST"])
    def work() -> None:
        assert request.path == "/work"

    start(app)
    eventually(lambda: received)
