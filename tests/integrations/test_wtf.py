"""Flask-WTF: forms that CSRFProtect has parsed, tokens and forms in a task, and the operations."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from flask import render_template_string, session
from flask_wtf import CSRFProtect, FlaskForm
from flask_wtf.csrf import generate_csrf
from flask_wtf.file import FileField, FileRequired
from wtforms import IntegerField, StringField
from wtforms.validators import DataRequired

from tests.support.flow import Flow, path_of

MakeFlow = Callable[..., Flow]


class UploadForm(FlaskForm):
    name = StringField(validators=[DataRequired()])
    year = IntegerField()
    table = FileField(validators=[FileRequired()])


@pytest.fixture
def csrf_flow(flow: Flow) -> Flow:
    """Return an app with CSRFProtect. ``flow.token()`` returns a token of the client's session."""
    flow.app.extensions["test.csrf"] = CSRFProtect(flow.app)

    @flow.app.get("/token")
    def token() -> str:
        session["user"] = "ann"
        return generate_csrf()

    return flow


def token_of(flow: Flow) -> str:
    return flow.client.get("/token").get_data(as_text=True)


def upload(token: str, **fields: Any) -> dict[str, Any]:
    return {"csrf_token": token, "table": (io.BytesIO(b"a;b\n1;2\n"), "t.csv"), **fields}


def test_a_form_with_a_file_is_validated_in_the_task(
    csrf_flow: Flow, warnings_of: Callable[[], list[str]]
) -> None:
    @csrf_flow.route()
    def work() -> Any:
        form = UploadForm()
        if not form.validate_on_submit():
            return form.errors
        return [
            form.name.data,
            form.year.data,
            form.table.data.filename,
            len(form.table.data.read()),
        ]

    token = token_of(csrf_flow)
    assert csrf_flow.result(data=upload(token, name="é", year="2031")) == ["é", 2031, "t.csv", 8]
    errors = csrf_flow.result(data=upload(token, year="2031"))
    assert list(errors) == ["name"]
    assert warnings_of() == []


def test_without_a_token_nothing_is_started(csrf_flow: Flow) -> None:
    @csrf_flow.route()
    def work() -> None: ...

    token_of(csrf_flow)
    for token in ("", "forged"):
        assert csrf_flow.request("POST", "/work", data=upload(token)).status_code == 400
    assert csrf_flow.ids() == []
    csrf_flow.result(data=upload(token_of(csrf_flow)))


def test_a_template_with_a_form_is_rendered_in_a_task(
    csrf_flow: Flow, warnings_of: Callable[[], list[str]]
) -> None:
    """Its token is valid, because it is created from the token in the session."""

    @csrf_flow.route()
    def work() -> Any:
        return render_template_string(
            "{{ csrf_token() }} {{ form.hidden_tag() }}", form=UploadForm()
        )

    token = token_of(csrf_flow)
    page = csrf_flow.result(headers={"X-CSRFToken": token})
    made, _, field = page.partition(" ")
    assert made in field
    csrf_flow.result(headers={"X-CSRFToken": made})
    assert warnings_of() == []


def test_a_token_in_a_task_without_a_session_is_dropped_with_a_warning(
    flow: Flow, warnings_of: Callable[[], list[str]]
) -> None:
    @flow.route()
    def work() -> Any:
        return render_template_string("{{ form.csrf_token }}", form=UploadForm())

    assert 'name="csrf_token"' in flow.result()
    (warning,) = warnings_of()
    assert "'csrf_token'" in warning


def test_operations_that_write_need_a_token_unless_the_blueprint_is_exempt(csrf_flow: Flow) -> None:
    @csrf_flow.route()
    def work() -> None: ...

    token = {"X-CSRFToken": token_of(csrf_flow)}
    task = csrf_flow.run(headers=token)
    for method, path, status in (
        ("POST", "/tasks/query", 200),
        ("DELETE", f"{path_of(task)}?purge=true", 204),
    ):
        assert csrf_flow.request(method, path, json={}).status_code == 400
        assert csrf_flow.request(method, path, json={}, headers=token).status_code == status


def test_an_exempt_blueprint(csrf_flow: Flow) -> None:
    """Starts stay protected, and a stop sent by a page of another site is refused."""
    csrf_flow.app.extensions["test.csrf"].exempt(csrf_flow.async_routes.blueprint)

    @csrf_flow.route()
    def work() -> None: ...

    task = csrf_flow.run(headers={"X-CSRFToken": token_of(csrf_flow)})
    assert csrf_flow.request("POST", "/tasks/query", json={}).get_json() == [csrf_flow.get(task)]
    foreign = csrf_flow.purge(task, status=403, headers={"Sec-Fetch-Site": "cross-site"})
    assert "another site" in foreign.get_json()["detail"]
    csrf_flow.purge(task)
    assert csrf_flow.request("POST", "/work").status_code == 400
