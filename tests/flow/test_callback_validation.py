"""Callback expressions, URLs that may not be called, headers and signatures, from the start of a
task to the callback.
"""

from __future__ import annotations

import io
import json
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from flask import Flask, jsonify, request
from pytest_httpserver import HTTPServer
from standardwebhooks import Webhook, WebhookVerificationError
from werkzeug import Request, Response

from flask_asyncroute import (
    Access,
    Callback,
    Permission,
    task_completed,
)
from flask_asyncroute.errors import CallbackRefused
from flask_asyncroute.webhooks import client as attempt
from flask_asyncroute.webhooks import sender
from flask_asyncroute.webhooks.sender import signature_headers
from tests.support.flow import Flow, problem
from tests.support.waiting import eventually_true

MakeFlow = Callable[..., Flow]
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "whsec_c2VjcmV0IHNlY3JldCBzZWNyZXQgc2VjcmV0IHNlY3JldA=="


class Receiver:
    """A callback receiver on loopback. It sends ``answers`` in order and repeats the last."""

    def __init__(self, server: HTTPServer) -> None:
        self.requests: list[Request] = []
        self.answers: list[Response] = [Response(status=204)]
        self.most = 0
        self._now = 0
        self._lock = threading.Lock()
        self.held = threading.Event()
        self.held.set()
        self.host = f"127.0.0.1:{server.port}"
        self.url = f"http://{self.host}/hook"
        server.expect_request("/hook").respond_with_handler(self._take)

    def _take(self, taken: Request) -> Response:
        taken.get_data(cache=True)
        with self._lock:
            self.requests.append(taken)
            self._now += 1
            self.most = max(self.most, self._now)
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.held.wait(10)
        with self._lock:
            self._now -= 1
        return answer

    def taken(self, count: int = 1, seconds: float = 5) -> list[Request]:
        """Wait for ``count`` requests; return all of them."""
        eventually_true(lambda: len(self.requests) >= count, seconds)
        return self.requests


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with HTTPServer("127.0.0.1", threaded=True) as server:
        made = Receiver(server)
        yield made
        made.held.set()


@pytest.fixture(autouse=True)
def without_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send repeated attempts without long delays."""
    monkeypatch.setattr(sender, "DELAYS", (0.0, 0.01, 0.02, 0.03))


def after_callback(
    flow: Flow, task: Any, state: str = "Completed", seconds: float = 5
) -> dict[str, Any]:
    """Poll until the callback of a task has a state; return its CallbackInfo."""
    found: dict[str, Any] = eventually_true(
        lambda: now if (now := flow.get(task)["CallbackInfo"])["State"] == state else None, seconds
    )
    return found


def test_a_callback_has_the_configured_message_and_headers(
    make_flow: MakeFlow, receiver: Receiver
) -> None:
    flow = make_flow()
    flow.route(callback=Callback(f"{receiver.url}?key=secret", headers={"X-Key": "sesame"}))(
        lambda: {"x": 1}
    )
    task = flow.start()
    assert task["CallbackSettings"] == {
        "UrlField": receiver.url, "Method": "POST", "ContentType": "application/json", "SendResult": False,
        "EventName": "[Post]/work", "HeaderFields": ["X-Key"],
    }  # fmt: skip
    assert task["CallbackInfo"] == {"State": "NotStarted", "Tentative": 0, "Url": receiver.url}
    (taken,) = receiver.taken()
    assert (taken.method, taken.mimetype, taken.query_string) == (
        "POST",
        "application/json",
        b"key=secret",
    )
    assert taken.get_json() == {
        "Id": task["Id"],
        "Url": "http://localhost/work",
        "Method": "POST",
        "EventName": "[Post]/work",
        "State": "Completed",
    }
    assert (taken.headers["X-Key"], taken.headers["Asyncroute-Depth"]) == ("sesame", "1")
    assert after_callback(flow, task) == {"State": "Completed", "Tentative": 1, "Url": receiver.url}
    ended = flow.get(task)
    assert (
        ended["State"] == "Completed"
        and "secret" not in json.dumps(ended)
        and "sesame" not in json.dumps(ended)
    )
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("kind", ["application/json", "application/xml", "application/yaml"])
def test_the_message_in_each_content_type(
    make_flow: MakeFlow, receiver: Receiver, kind: str
) -> None:
    flow = make_flow()
    flow.route(
        "/<int:x>",
        callback=Callback(
            receiver.url, content_type=kind, send_result=True, event_name="done & <é>"
        ),
    )(lambda x: {"x": [x, None]})
    task = flow.start("/7")
    (taken,) = receiver.taken()
    body = taken.get_data()
    charset = {"application/xml": "; charset=utf-8", "application/yaml": "; charset=utf-8"}.get(
        kind, ""
    )
    assert taken.headers["Content-Type"] == kind + charset
    if kind == "application/xml":
        root = ElementTree.fromstring(body)
        assert (
            root.tag == "Callback"
            and root.findtext("Id") == task["Id"]
            and root.findtext("EventName") == "done & <é>"
        )
        assert [item.text for item in root.iterfind("Result/x/item")] == ["7", None]
        return
    document = json.loads(body) if kind == "application/json" else yaml.safe_load(body)
    assert document == {
        "Id": task["Id"],
        "Url": "http://localhost/7",
        "Method": "POST",
        "EventName": "done & <é>",
        "State": "Completed",
        "Result": {"x": [7, None]},
    }


@pytest.mark.parametrize("send_result", [True, False])
def test_errors_are_sent_and_results_only_with_send_result(
    make_flow: MakeFlow, receiver: Receiver, send_result: bool, gate: threading.Event
) -> None:
    flow = make_flow()
    callback = Callback(receiver.url, send_result=send_result)

    @flow.route("/fails", callback=callback)
    def fails() -> None:
        raise ValueError("because")

    flow.route("/waits", callback=callback, endpoint="waits")(lambda: gate.wait(10))
    flow.route("/nothing", callback=callback, endpoint="nothing")(lambda: None)
    flow.start("/fails")
    assert (
        receiver.taken(1)[0].get_json().items()
        >= {"State": "Failed", "Error": "ValueError: because"}.items()
    )
    task = flow.start("/waits")
    flow.stop(task)
    found = receiver.taken(2)[1].get_json()
    assert (found["State"], found["Error"]) == (
        "Aborted",
        "Aborted by the user",
    ) and "Result" not in found
    flow.start("/nothing")
    found = receiver.taken(3)[2].get_json()
    assert found["State"] == "Completed" and "Result" not in found and "Error" not in found


@pytest.mark.parametrize("name", ["User-Agent", "user-agent"])
def test_an_app_may_set_the_user_agent(make_flow: MakeFlow, receiver: Receiver, name: str) -> None:
    flow = make_flow()
    flow.route("/own", callback=Callback(receiver.url, headers={name: "shop/1"}), endpoint="own")(
        lambda: None
    )
    flow.route(callback=Callback(receiver.url))(lambda: None)
    flow.start("/own")
    receiver.taken(1)
    flow.start()
    assert [taken.headers.getlist("User-Agent") for taken in receiver.taken(2)] == [
        ["shop/1"],
        ["flask-asyncroute"],
    ]


def test_expressions_of_every_kind(make_flow: MakeFlow, receiver: Receiver) -> None:
    flow = make_flow()
    callback = Callback(
        f"http://{receiver.host}/hook?u={{$url}}&p={{$request.path.name}}&b={{$request.body#/a~1b/1}}",
        method="$request.query.verb",
        content_type="$request.header.X-Type",
        headers={
            "X-Method": "$method",
            "X-Auth": "Bearer {$request.header.X-Token}",
            "X-Gone": "{$request.query.gone}",
            "X-Body": "$request.body#/é",
        },
    )
    flow.route("/go/<name>", callback=callback)(lambda name: None)
    task = flow.start(
        "/go/a b?verb=patch",
        json={"a/b": [0, "x&y=/é"], "é": "straße"},
        headers={"X-Type": "application/yaml", "X-Token": "t&1"},
    )
    (taken,) = receiver.taken()
    assert taken.args.to_dict() == {
        "u": "http://localhost/go/a%20b?verb=patch",
        "p": "a b",
        "b": "x&y=/é",
    }
    assert (taken.method, taken.mimetype) == ("PATCH", "application/yaml")
    assert (taken.headers["X-Method"], taken.headers["X-Auth"]) == ("POST", "Bearer t&1")
    assert "X-Gone" not in taken.headers
    assert taken.headers["X-Body"].encode("latin-1").decode() == "straße"
    settings = flow.get(task)["CallbackSettings"]
    assert (settings["Method"], settings["ContentType"], settings["UrlField"]) == (
        "PATCH",
        "application/yaml",
        receiver.url,
    )


@pytest.mark.parametrize("kind", ["json", "form", "multipart", "vendor"])
@pytest.mark.parametrize("size", [0, 100_000])
def test_body_expressions_read_json_and_forms(
    make_flow: MakeFlow, receiver: Receiver, kind: str, size: int
) -> None:
    flow = make_flow(ASYNCROUTE_CALLBACK_ALLOWED_HOSTS=["127.0.0.0/8"])
    flow.route(callback=Callback(send_result=True))(
        lambda: (
            len(request.form.get("x", ""))
            or len((request.get_json(silent=True) or {}).get("x", ""))
        )
    )
    fields = {"callbackUrl": receiver.url, "x": "x" * size}
    given: dict[str, Any] = {
        "json": {"json": fields}, "form": {"data": fields},
        "multipart": {"data": {**fields, "file": (io.BytesIO(b"file"), "name.txt")}},
        "vendor": {"data": json.dumps(fields), "content_type": "application/vnd.x+json; "
                                                               "charset=utf-8"},
    }[kind]  # fmt: skip
    task = flow.start(**given)
    assert task["CallbackSettings"]["UrlField"] == "$request.body#/callbackUrl"
    assert receiver.taken()[0].get_json()["Result"] == size, "the view reads the whole body"


@pytest.mark.covers("A14")
@pytest.mark.parametrize(
    "given",
    [{}, {"json": {}}, {"json": {"callbackUrl": None}}, {"json": []}, {"json": "text"}, {"json": 5}, {"json": None}, {"data": b"", "content_type": "application/json"},
     {"data": b"x", "content_type": "text/plain"}, {"data": {"other": "x"}}, {"data": b"<callbackUrl>http://x/</callbackUrl>", "content_type": "application/xml"}],
    ids=str,
)  # fmt: skip
def test_without_a_url_there_is_no_callback(make_flow: MakeFlow, given: dict[str, Any]) -> None:
    flow = make_flow()
    flow.route(callback=Callback())(lambda: None)
    task = flow.ended(flow.start(**given))
    assert "CallbackSettings" not in task and "CallbackInfo" not in task
    with flow.app.app_context(), pytest.raises(CallbackRefused):
        flow.async_routes.redeliver(task["Id"])


def refused(flow: Flow, path: str = "/work", **given: Any) -> str:
    response = flow.request("POST", path, **given)
    detail = str(problem(response, 400, "callback-refused")["detail"])
    assert flow.query() == [], "no task is stored"
    return detail


@pytest.mark.covers("A14")
@pytest.mark.parametrize(
    "value", [["http://a.example/"], {"a": "b"}, 5, 1.5, True, False, [], {}, ""], ids=repr
)
def test_a_url_that_is_not_a_string_is_refused(make_flow: MakeFlow, value: Any) -> None:
    flow = make_flow()
    flow.route(callback=Callback())(lambda: None)
    assert "URL" in refused(flow, json={"callbackUrl": value})


@pytest.mark.covers("A01", "A02", "A03", "A06", "A11", "A12", "A13")
@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/latest/meta-data", "http://[::1]/", "http://0.0.0.0/", "http://LOCALHOST./", "http://127.1/", "http://2130706433/", "http://0x7f000001/",
     "http://0177.0.0.1/", "http://10.0.0.1/", "http://[fc00::1]/", "http://[fe80::1]/", "http://224.0.0.1/", "file:///etc/passwd", "gopher://x.example/",
     "javascript:alert(1)", "http://x.example:0/", "http://x.example:99999/", "http://x.example:-1/", "http://x.example/\r\nX: y", "http://x.example/\t", "http://x.example/\0",
     "http://x.example/ ", "http://x.example/" + "x" * 2048, "http://①②⑦.⓪.⓪.①/", "//x.example/", "/x", "http://u:p@x.example/", "", "x", "http://x.example\\@y/"],
)  # fmt: skip
def test_a_forbidden_url_is_refused(make_flow: MakeFlow, url: str) -> None:
    flow = make_flow()
    flow.route(callback=Callback())(lambda: None)
    refused(flow, json={"callbackUrl": url})
    flow.route("/header", callback=Callback("http://{$request.query.host}/x"), endpoint="header")


@pytest.mark.covers("A06")
def test_allowed_hosts(make_flow: MakeFlow, receiver: Receiver) -> None:
    flow = make_flow(ASYNCROUTE_CALLBACK_ALLOWED_HOSTS=["127.0.0.1/32", "hooks.internal"])
    flow.route(callback=Callback())(lambda: None)
    task = flow.start(json={"callbackUrl": receiver.url})
    after_callback(flow, task)
    response = flow.request("POST", "/work", json={"callbackUrl": "http://127.0.0.2/"})
    problem(response, 400, "callback-refused")


@pytest.mark.covers("A15")
@pytest.mark.parametrize(
    "text", ["a\r\nX-Injected: y", "a\nb", "a\rb", "a\0b", "a\x7fb", "\x1b[0m", "x" * 8193]
)
@pytest.mark.parametrize("template", ["$request.body#/x", "v {$request.body#/x}"])
def test_control_characters_in_a_header_are_refused(
    make_flow: MakeFlow, text: str, template: str
) -> None:
    flow = make_flow()
    flow.route(callback=Callback("https://hooks.example/", headers={"X-Value": template}))(
        lambda: None
    )
    assert "X-Value" in refused(flow, json={"x": text})


@pytest.mark.covers("A15")
@pytest.mark.parametrize("text", ["a\r\nX: y", "a\nb", "a\0b", "a\x7fb", "\x1b[0m"])
@pytest.mark.parametrize(
    "callback",
    [
        {"content_type": "$request.body#/x"},
        {"content_type": "application/json; a={$request.body#/x}"},
        {"method": "$request.body#/x"},
        {"url": "https://hooks.example/{$request.body#/x}"},
        {"url": "https://hooks.example/?a={$request.body#/x}"},
        {"url": "$request.body#/x"},
    ],
    ids=str,
)
def test_control_characters_in_any_value_are_refused(
    make_flow: MakeFlow, text: str, callback: dict[str, str]
) -> None:
    flow = make_flow()
    flow.route(callback=Callback(**{"url": "https://hooks.example/", **callback}))(lambda: None)
    values = {"x": f"application/json; a={text}" if "content_type" in callback else text}
    assert "control character" in refused(flow, json=values)


@pytest.mark.parametrize("value", [5, True, [], {}])
@pytest.mark.parametrize("field", ["method", "content_type", "headers"])
def test_values_that_are_not_strings_are_refused(
    make_flow: MakeFlow, field: str, value: Any
) -> None:
    flow = make_flow()
    expression: Any = "$request.body#/x" if field != "headers" else {"X": "$request.body#/x"}
    flow.route(callback=Callback("https://hooks.example/", **{field: expression}))(lambda: None)
    refused(flow, json={"x": value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("method", "GET"), ("method", "HEAD"), ("method", "CONNECT"), ("method", "P OST"), ("method", "POST\r\n"), ("method", ""), ("method", "x" * 33),
     ("content_type", "text/html"), ("content_type", ""), ("content_type", "application/json\r\nX: "
                                                                           "y")],
)  # fmt: skip
def test_invalid_methods_and_content_types_are_refused(
    make_flow: MakeFlow, field: str, value: str
) -> None:
    flow = make_flow()
    flow.route(callback=Callback("https://hooks.example/", **{field: "$request.body#/x"}))(
        lambda: None
    )  # type: ignore[arg-type]
    refused(flow, json={"x": value})


def test_parameters_of_a_content_type_are_dropped(make_flow: MakeFlow, receiver: Receiver) -> None:
    """Most clients send a charset. The message is always UTF-8."""
    flow = make_flow()
    flow.route(callback=Callback(receiver.url, content_type="$request.header.Content-Type"))(
        lambda: None
    )
    flow.start(data="{}", content_type="application/json; charset=utf-8")
    (taken,) = receiver.taken()
    assert taken.headers["Content-Type"] == "application/json"


def test_a_missing_method_or_content_type_is_the_default(
    make_flow: MakeFlow, receiver: Receiver
) -> None:
    flow = make_flow()
    flow.route(
        callback=Callback(receiver.url, method="$request.body#/m", content_type="$request.body#/c")
    )(lambda: None)
    flow.start(json={"m": None})
    assert (receiver.taken()[0].method, receiver.requests[0].mimetype) == (
        "POST",
        "application/json",
    )


@pytest.mark.parametrize(
    ("value", "path"),
    [("a/../b", "/hook/a%2F..%2Fb/x"), ("a?b#c", "/hook/a%3Fb%23c/x"), ("é %41", "/hook/%C3%A9%20%2541/x"), ("...", "/hook/.../x"), ("@evil.example", "/hook/%40evil.example/x")],
)  # fmt: skip
def test_values_in_a_url_are_encoded(make_flow: MakeFlow, value: str, path: str) -> None:
    flow = make_flow()
    flow.route(
        callback=Callback("http://hooks.example/hook/{$request.body#/v}/x"), executor="immediate"
    )(lambda: None)
    assert flow.start(json={"v": value})["CallbackInfo"]["Url"] == f"http://hooks.example{path}"


@pytest.mark.parametrize("value", [".", "..", "", "\ud800"])
def test_values_that_cannot_be_a_url_segment_are_refused(make_flow: MakeFlow, value: str) -> None:
    flow = make_flow()
    flow.route(callback=Callback("http://hooks.example/hook/{$request.body#/v}/x"))(lambda: None)
    refused(flow, data=json.dumps({"v": value}), content_type="application/json")


@pytest.mark.parametrize(
    "value",
    ["127.0.0.1", "localhost", "a/b", "x@127.0.0.1", "[::1]", "a:80", "169.254.169.254", "0x7f.1"],
)
def test_a_host_from_the_client_is_guarded(make_flow: MakeFlow, value: str) -> None:
    flow = make_flow()
    flow.route("/host", callback=Callback("http://{$request.body#/v}/x"), endpoint="host")(
        lambda: None
    )
    flow.route(
        "/joined", callback=Callback("http://hooks.example{$request.body#/v}"), endpoint="joined"
    )(lambda: None)
    refused(flow, "/host", json={"v": value})
    refused(flow, "/joined", json={"v": f".{value}" if value.isalpha() else f"@{value}"})


def test_a_trusted_url_may_be_internal(make_flow: MakeFlow, receiver: Receiver) -> None:
    flow = make_flow()
    flow.route(callback=Callback(f"http://{receiver.host}/{{$request.body#/v}}"))(lambda: None)
    after_callback(flow, flow.start(json={"v": "hook"}))


def test_an_untrusted_name_with_an_internal_address_is_not_called(
    make_flow: MakeFlow, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_asyncroute.callbacks.ssrf.resolve", lambda host, port: ["127.0.0.1"])
    flow = make_flow(ASYNCROUTE_CALLBACK_ATTEMPTS=2)
    flow.route(callback=Callback())(lambda: None)
    task = flow.start(json={"callbackUrl": receiver.url.replace("127.0.0.1", "hooks.example")})
    assert after_callback(flow, task, "Failed")["Tentative"] == 2
    assert receiver.requests == []


def test_a_body_over_one_mebibyte_is_not_read_by_expressions(
    make_flow: MakeFlow, receiver: Receiver
) -> None:
    flow = make_flow()
    flow.route(callback=Callback())(lambda: None)
    assert "1048576" in refused(flow, json={"x": "x" * 1024 * 1024})
    flow.start(data=b"x" * 2_000_000, content_type="application/octet-stream")


@pytest.mark.covers("A45")
@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"nonsense",
        b"[" * 100_000,
        b'{"callbackUrl": "\xff"}',
        b"9" * 5000,
        b'{"callbackUrl": 1e9',
    ],
)
def test_a_body_that_is_not_json_is_refused(make_flow: MakeFlow, data: bytes) -> None:
    flow = make_flow()
    flow.route(callback=Callback())(lambda: None)
    assert "JSON" in refused(flow, data=data, content_type="application/json")


@pytest.mark.parametrize(
    "document",
    [
        '{"name": "\\ud800"%s}',
        '{"x": NaN%s}',
        '{"x": 1e999%s}',
        '\ufeff{"x": 1%s}',
        '{"x": 1, "x": 2%s}',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_json_that_flask_accepts_is_accepted(
    make_flow: MakeFlow, receiver: Receiver, document: str, encoding: str
) -> None:
    """The unusual value is in a field that the callback does not use."""
    if encoding == "utf-16":
        document = document.removeprefix("\ufeff")  # The UTF-16 encoder adds a byte order mark.
    flow = make_flow(ASYNCROUTE_CALLBACK_ALLOWED_HOSTS=["127.0.0.0/8"])

    @flow.route(callback=Callback())
    def work() -> Any:
        return sorted(request.get_json())

    for more in "", f', "callbackUrl": "{receiver.url}"':
        task = flow.start(data=(document % more).encode(encoding), content_type="application/json")
        assert flow.ended(task)["State"] == "Completed"
        assert ("CallbackSettings" in task) == bool(more)


@pytest.mark.parametrize(
    "data",
    [
        b'{"callbackUrl": NaN}',
        b'{"callbackUrl": "http://a.example/\\ud800"}',
        b'{"callbackUrl": "\\udfff"}',
    ],
)
def test_an_invalid_string_as_url_is_refused(make_flow: MakeFlow, data: bytes) -> None:
    flow = make_flow()
    flow.route(callback=Callback())(lambda: None)
    assert "URL" in refused(flow, data=data, content_type="application/json")


@pytest.mark.covers("A17")
@pytest.mark.parametrize(
    ("depth", "status"),
    [
        ("0", 202),
        ("3", 202),
        ("03", 202),
        ("4", 400),
        ("999999999", 400),
        ("9" * 30, 400),
        ("-1", 400),
        ("x", 400),
        ("", 400),
        ("1.0", 400),
        ("٣", 400),
    ],
)
def test_the_depth_header_is_checked_and_incremented(
    make_flow: MakeFlow, receiver: Receiver, depth: str, status: int
) -> None:
    flow = make_flow()
    flow.route(callback=Callback(receiver.url))(lambda: None)
    flow.route("/none", callback=Callback(), endpoint="none")(lambda: None)
    headers = {"Asyncroute-Depth": depth.encode().decode("latin-1")}
    flow.start("/none", headers=headers)
    response = flow.request("POST", "/work", headers=headers)
    assert response.status_code == status
    if status == 202:
        assert receiver.taken()[0].headers["Asyncroute-Depth"] == str(int(depth) + 1)


@pytest.mark.covers("A17")
def test_a_callback_loop_ends_at_depth_3(make_flow: MakeFlow, receiver: Receiver) -> None:
    """The receiver starts a task for each callback and passes its depth on."""
    flow = make_flow()
    flow.route(callback=Callback(receiver.url))(lambda: None)
    statuses, depth = [], "0"
    while True:
        response = flow.request(
            "POST", "/work", headers={"Asyncroute-Depth": depth} if depth != "0" else {}
        )
        statuses.append(response.status_code)
        if response.status_code != 202:
            break
        depth = receiver.taken(len(statuses))[-1].headers["Asyncroute-Depth"]
    assert statuses == [202, 202, 202, 202, 400]


@pytest.mark.covers("A18")
def test_each_secret_verifies_the_signature(make_flow: MakeFlow, receiver: Receiver) -> None:
    flow = make_flow(ASYNCROUTE_CALLBACK_SECRET=[SECRET, OTHER])
    flow.route(callback=Callback(receiver.url, send_result=True))(lambda: {"é": "ü"})
    receiver.answers = [Response(status=500), Response(status=204)]
    task = flow.start()
    first, second = receiver.taken(2)
    for taken in (first, second):
        headers = dict(taken.headers)
        for secret in (SECRET, OTHER):
            assert Webhook(secret).verify(taken.get_data(), headers)["Id"] == task["Id"]
        for name, value in (
            ("Webhook-Id", "msg_other"),
            ("Webhook-Timestamp", str(int(headers["Webhook-Timestamp"]) + 1)),
            ("Webhook-Signature", "v1,AAAA"),
        ):
            with pytest.raises(WebhookVerificationError):
                Webhook(SECRET).verify(taken.get_data(), {**headers, name: value})
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(taken.get_data().replace(b"Completed", b"Failed"), headers)
        with pytest.raises(WebhookVerificationError):
            Webhook("whsec_" + "A" * 44).verify(taken.get_data(), headers)
    assert (
        first.headers["webhook-id"] == second.headers["webhook-id"]
        and "." not in first.headers["webhook-id"]
    )


@pytest.mark.covers("A18")
@pytest.mark.parametrize("offset", [-301, 301])
def test_timestamps_off_by_over_300_seconds_are_refused(
    make_flow: MakeFlow, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    fields = signature_headers([SECRET], "msg_x", int(time.time()) + offset, b"{}")
    with pytest.raises(WebhookVerificationError, match="timestamp"):
        Webhook(SECRET).verify(b"{}", fields)
    assert (
        Webhook(SECRET).verify(b"{}", signature_headers([SECRET], "msg_x", int(time.time()), b"{}"))
        == {}
    )


def test_without_a_secret_a_message_has_an_id_and_no_signature(
    make_flow: MakeFlow, receiver: Receiver
) -> None:
    flow = make_flow()
    flow.route(callback=Callback(receiver.url))(lambda: None)
    flow.start()
    (taken,) = receiver.taken()
    assert (
        taken.headers["webhook-id"].startswith("msg_")
        and abs(int(taken.headers["webhook-timestamp"]) - time.time()) < 5
    )
    assert "webhook-signature" not in taken.headers


@pytest.mark.covers("A20")
def test_secrets_are_not_shown_logged_or_kept_in_the_outbox(
    make_flow: MakeFlow, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    receiver.answers = [Response(status=500)]
    flow = make_flow(
        ASYNCROUTE_CALLBACK_SECRET=SECRET,
        ASYNCROUTE_CALLBACK_ATTEMPTS=2,
        ASYNCROUTE_STORE="sqlite:///asyncroute.db",
    )
    flow.route(callback=Callback(receiver.url + "?token=sesame", headers={"X-Key": "open"}))(
        lambda: None
    )
    task = flow.start()
    after_callback(flow, task, "Failed")
    logged = "".join(
        record.getMessage() for record in caplog.records if record.name == "flask_asyncroute"
    )
    shown = json.dumps(flow.get(task)) + json.dumps(flow.query()) + logged
    assert (
        SECRET not in shown
        and SECRET[6:] not in shown
        and "sesame" not in shown
        and "open" not in shown
    )
    with closing(sqlite3.connect(Path(flow.app.instance_path) / "asyncroute.db")) as connection:
        assert connection.execute(
            "SELECT headers, due_us, holder FROM asyncroute_callbacks"
        ).fetchall() == [(b"{}", None, None)], "resolved headers are deleted after the last attempt"


@pytest.mark.covers("A21")
def test_at_most_two_callbacks_at_once_to_one_host(make_flow: MakeFlow, receiver: Receiver) -> None:
    receiver.held.clear()
    flow = make_flow()
    flow.route(callback=Callback(receiver.url), executor="immediate")(lambda: None)
    tasks = [flow.start() for _ in range(30)]
    receiver.taken(2)
    pause = threading.Event()
    pause.wait(0.5)
    assert len(receiver.requests) == 2
    receiver.held.set()
    receiver.taken(30, 20)
    for task in tasks:
        after_callback(flow, task)
    assert receiver.most == 2 and len(receiver.requests) == 30


def test_an_idempotent_replay_sends_one_callback(make_flow: MakeFlow, receiver: Receiver) -> None:
    flow = make_flow()
    flow.headers = {"X-User": "anna"}
    flow.route(callback=Callback(receiver.url))(lambda: None)
    tasks = [
        flow.ended(flow.request("POST", "/work", headers={"Idempotency-Key": "k"}).get_json())
        for _ in range(3)
    ]
    assert len({task["Id"] for task in tasks}) == 1
    after_callback(flow, tasks[0])
    assert len(receiver.requests) == 1


def test_a_header_dropped_from_the_snapshot_is_not_sent(
    make_flow: MakeFlow, receiver: Receiver
) -> None:
    flow = make_flow(ASYNCROUTE_SNAPSHOT_DROP=["Authorization"])
    flow.route(
        callback=Callback(receiver.url, headers={"X-Auth": "$request.header.Authorization"})
    )(lambda: None)
    flow.start(headers={"Authorization": "Bearer secret"})
    assert "X-Auth" not in receiver.taken()[0].headers


def test_a_task_with_a_permission_sends_its_callback(
    make_flow: MakeFlow, receiver: Receiver
) -> None:
    flow = make_flow()
    flow.headers = {"X-User": "anna"}
    flow.route(callback=Callback(receiver.url), permission=Permission(read=Access(groups=("g",))))(
        lambda: None
    )
    task = flow.start(data=b"x" * 100_000)
    after_callback(flow, task)
    assert flow.get(task, status=404, headers={"X-User": "bert"})["status"] == 404


@pytest.mark.covers("A19")
def test_a_flask_receiver_verifies_and_deduplicates(
    make_flow: MakeFlow, receiver: Receiver
) -> None:
    """The receiver is like the one in the guide: verify, check the id, answer at once."""
    flow = make_flow(ASYNCROUTE_CALLBACK_SECRET=SECRET)
    flow.route(callback=Callback(receiver.url))(lambda: None)
    flow.start()
    (taken,) = receiver.taken()
    app = Flask("receiver")
    seen: set[str] = set()

    @app.post("/hook")
    def hook() -> Any:
        try:
            event = Webhook(SECRET).verify(request.get_data(), dict(request.headers))
        except WebhookVerificationError:
            return jsonify(error="signature"), 401
        is_new = request.headers["webhook-id"] not in seen
        seen.add(request.headers["webhook-id"])
        return jsonify(state=event["State"], is_new=is_new)

    client = app.test_client()
    headers = {
        name: value
        for name, value in taken.headers
        if name.lower().startswith("webhook") or name == "Content-Type"
    }
    answers = [
        client.post("/hook", data=taken.get_data(), headers=headers).get_json() for _ in range(2)
    ]
    assert answers == [
        {"state": "Completed", "is_new": True},
        {"state": "Completed", "is_new": False},
    ], "the second delivery is a duplicate"
    assert client.post("/hook", data=b"{}", headers=headers).status_code == 401


@pytest.mark.covers("F25", "F28")
def test_a_hanging_receiver_does_not_change_the_state(
    make_flow: MakeFlow, monkeypatch: pytest.MonkeyPatch, hear: Any
) -> None:
    monkeypatch.setattr(attempt, "ATTEMPT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        flow = make_flow(ASYNCROUTE_CALLBACK_ATTEMPTS=2)
        ends = hear(task_completed)
        flow.route(callback=Callback(f"http://127.0.0.1:{silent.getsockname()[1]}/"))(lambda: 1)
        task = flow.start()
        assert after_callback(flow, task, "Failed")["Tentative"] == 2
        assert flow.get(task)["State"] == "Completed" and len(ends) == 1
