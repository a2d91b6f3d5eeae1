"""Problem responses for refused requests, through a real app."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
import yaml
from flask import Flask, request
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute import errors
from flask_asyncroute.errors import NotAuthenticated, QueueFull, RequestRefused, TaskNotFound
from flask_asyncroute.http.responses import problem_response


def client_for(refusal):
    app = Flask(__name__)

    @app.get("/<path:path>")
    def refuse(path):
        raise refusal

    @app.errorhandler(RequestRefused)
    def answer(error):
        return problem_response(error, request.headers.get("Accept"), request.path)

    return app.test_client()


def test_problems_are_json_by_default():
    answer = client_for(TaskNotFound("No task 'x'.", task_id="x")).get("/task/x")
    assert answer.status_code == 404
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Vary"] == "Accept, Authorization, Cookie"
    assert "Retry-After" not in answer.headers
    assert "WWW-Authenticate" not in answer.headers
    assert json.loads(answer.data) == {
        "type": "tag:flask-asyncroute.readthedocs.io,2026:task-not-found",
        "title": "Task not found",
        "status": 404,
        "detail": "No task 'x'.",
        "instance": "/task/x",
        "Id": "x",
        "Error": "No task 'x'.",
    }


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        (None, "application/problem+json"),
        ("*/*", "application/problem+json"),
        ("application/json", "application/problem+json"),
        ("application/problem+json", "application/problem+json"),
        ("application/xml", "application/problem+xml; charset=utf-8"),
        ("text/xml", "application/problem+xml; charset=utf-8"),
        (
            "application/problem+xml, application/json;q=0.5",
            "application/problem+xml; charset=utf-8",
        ),
        ("application/problem+json;q=0.2, application/xml;q=0.1", "application/problem+json"),
        ("application/yaml", "application/yaml; charset=utf-8"),
        ("text/x-yaml", "application/yaml; charset=utf-8"),
        ("text/html", "application/json"),
        ("*/*;q=0", "application/problem+json"),
        ("nonsense", "application/problem+json"),
    ],
)
def test_the_format_follows_accept_and_is_never_refused_with_406(accept, content_type):
    headers = {} if accept is None else {"Accept": accept}
    answer = client_for(TaskNotFound("No such task.")).get("/task/x", headers=headers)
    assert answer.status_code == 404
    assert answer.headers["Content-Type"] == content_type


def test_xml_and_yaml_have_the_same_content_as_json():
    client = client_for(QueueFull("Wait\n<soon>.", task_id="a", retry_after=3))
    document = json.loads(client.get("/run").data)
    root = ElementTree.fromstring(client.get("/run", headers={"Accept": "application/xml"}).data)
    assert root.tag == "Problem"
    assert {child.tag: child.text for child in root} == {
        name: str(value) for name, value in document.items()
    }
    assert (
        yaml.safe_load(client.get("/run", headers={"Accept": "application/yaml"}).data) == document
    )


def test_retry_after_header():
    assert client_for(QueueFull("Full.", retry_after=7)).get("/run").headers["Retry-After"] == "7"


def test_a_401_has_a_www_authenticate_header():
    answer = client_for(NotAuthenticated("Sign in.")).get("/run")
    assert answer.status_code == 401
    assert answer.www_authenticate.type == "app"
    assert answer.www_authenticate.realm


def test_every_refusal_has_a_response():
    kinds = [
        kind
        for name, kind in vars(errors).items()
        if name[0] != "_" and isinstance(kind, type) and issubclass(kind, RequestRefused)
    ]
    assert len(kinds) > 10
    for kind in kinds:
        answer = client_for(kind("Why.")).get("/x")
        assert answer.status_code == kind.status
        assert (
            json.loads(answer.data)["type"]
            == f"tag:flask-asyncroute.readthedocs.io,2026:{kind.slug}"
        )


@pytest.mark.covers("A66")
def test_control_characters_are_escaped_in_every_format():
    client = client_for(TaskNotFound("a\r\nb\x1b[31m\0\ud800\u202ec\uffff é", task_id="i\x07d"))
    shown = "a\\r\\nb\\x1b[31m\ufffd\ufffd\\u202ec\\uffff é"
    for accept in ("application/json", "application/xml", "application/yaml"):
        body = client.get("/x", headers={"Accept": accept}).data
        if accept == "application/xml":
            document = {child.tag: child.text for child in ElementTree.fromstring(body)}
        else:
            document = yaml.safe_load(body)
        assert document["detail"] == document["Error"] == shown
        assert document["Id"] == "i\\x07d"


def test_long_details_are_cut():
    assert len(json.loads(client_for(TaskNotFound("x" * 10_000)).get("/x").data)["detail"]) == 2000


def test_the_instance_is_the_quoted_path():
    client = client_for(TaskNotFound("No."))
    assert json.loads(client.get("/task/a%20b%00%ff\u00e9;x=1,2").data)["instance"] == (
        "/task/a%20b%00%EF%BF%BD%C3%A9;x=1,2"
    )
    assert json.loads(client.get("/a%3Fb%23c").data)["instance"] == "/a%3Fb%23c"
    assert "instance" not in json.loads(client.get("/" + "x" * 3000).data)
    assert "instance" not in json.loads(client.get("/" + "é" * 1000).data)


@given(
    st.text(st.characters()),
    st.text(st.characters()),
    st.sampled_from(["application/json", "text/xml", "text/yaml"]),
)
def test_any_text_gives_a_valid_response(detail, instance, accept):
    body = problem_response(TaskNotFound(detail, task_id=detail), accept, instance).data
    if accept == "text/xml":
        root = ElementTree.fromstring(body)
        assert "encoding" not in {name for element in root for name in element.attrib}
    else:
        assert yaml.safe_load(body)["status"] == 404
