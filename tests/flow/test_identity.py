"""Valid and invalid return values of the identity loader."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import pytest
from flask import request
from flask.signals import got_request_exception

from flask_asyncroute import Access
from tests.support.flow import Flow, problem

MakeFlow = Callable[..., Flow]


@dataclass
class Role:
    """A model with a name, as in Flask-Security."""

    name: str


class Grade(Enum):
    ADMIN = "admin"


class Row(NamedTuple):
    """A row of a query: a tuple with named fields."""

    name: str
    number: int


class Nameless:
    """A model without a name."""


PEOPLE: dict[str, Any] = {
    "ann": {"id": "ann", "roles": [Role("admin")]},
    "bob": {"id": "bob", "roles": []},
    "eve": {"id": "eve", "roles": "editor", "groups": "admin"},
    "kim": {"id": "kim", "roles": "admin"},
    "max": {"id": "max", "roles": [Nameless(), "admin"]},
    "one": {"id": "one", "roles": Role("admin")},
    "enum": {"id": "enum", "roles": Grade.ADMIN},
    "row": {"id": "row", "roles": Row("admin", 3)},
    "bytes": {"id": "bytes", "roles": b"admin"},
    "long": {"id": "x" * 256},
    "empty": {"id": ""},
    "none": {"id": None},
}


@pytest.fixture
def people(make_flow: MakeFlow) -> Flow:
    """Return an app whose callers are the PEOPLE, with admins by role."""
    flow = make_flow(ASYNCROUTE_ADMINS=Access(roles=("admin",)))
    flow.async_routes.identity_loader(lambda: PEOPLE.get(request.headers.get("X-User", "")))

    @flow.route()
    def work() -> int:
        return 1

    return flow


def as_user(name: str) -> dict[str, Any]:
    return {"headers": {"X-User": name}}


def test_an_object_as_role_counts_by_its_name(people: Flow) -> None:
    task = people.start(**as_user("bob"))
    assert people.get(task, **as_user("ann"))["Id"] == task["Id"]
    people.get(task, **as_user("eve"), status=404)


def test_a_string_as_roles_is_one_name(people: Flow) -> None:
    task = people.start(**as_user("bob"))
    people.get(task, **as_user("kim"))
    own = people.start(**as_user("eve"))
    assert people.ids(**as_user("eve")) == [own["Id"]]


@pytest.mark.parametrize("name", ["one", "enum", "row"])
def test_an_object_as_roles_is_one_name(people: Flow, name: str) -> None:
    task = people.start(**as_user("bob"))
    assert people.get(task, **as_user(name))["Id"] == task["Id"]
    assert people.start(**as_user(name))["User"] == name


def test_bytes_as_roles_are_refused(people: Flow) -> None:
    problem(people.request("POST", "/work", **as_user("bytes")), 500, "cannot-start")


def test_a_role_without_a_name_is_refused_and_logged(
    people: Flow, caplog: pytest.LogCaptureFixture
) -> None:
    detail = problem(people.request("POST", "/work", **as_user("max")), 500, "cannot-start")
    assert "Nameless" not in detail["detail"]
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "Nameless" in record.getMessage() and "name" in record.getMessage()
    assert people.ids(**as_user("ann")) == []


@pytest.mark.parametrize("name", ["long", "empty", "none"])
def test_an_invalid_id_is_an_error_at_the_start_and_matches_no_task(
    people: Flow, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    task = people.start(**as_user("bob"))
    sent: list[BaseException] = []

    def receive(sender: Any, exception: BaseException, **extra: Any) -> None:
        sent.append(exception)

    with got_request_exception.connected_to(receive, people.app):
        problem(people.request("POST", "/work", **as_user(name)), 500, "cannot-start")
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "endpoint work" in record.getMessage() and record.exc_info is not None
    assert len(sent) == 1
    people.get(task, **as_user(name), status=404)
    people.stop(task, **as_user(name), status=404)
    assert people.query(**as_user(name)) == []


def test_an_invalid_identity_is_logged_once_with_a_traceback(
    make_flow: MakeFlow, caplog: pytest.LogCaptureFixture
) -> None:
    flow = make_flow()
    flow.async_routes.identity_loader(lambda: {"id": "ann", "roles": [None]})

    @flow.route()
    def work() -> int:
        return 1

    found = problem(flow.request("POST", "/work"), 500, "cannot-start")
    assert "None" not in found["detail"], "the client does not see a repr"
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "endpoint work" in record.getMessage() and record.exc_info is not None


def test_a_failing_signal_receiver_does_not_change_the_response(
    people: Flow, caplog: pytest.LogCaptureFixture
) -> None:
    def receive(sender: Any, exception: BaseException, **extra: Any) -> None:
        raise LookupError("no monitoring")

    with got_request_exception.connected_to(receive, people.app):
        problem(people.request("POST", "/work", **as_user("empty")), 500, "cannot-start")
    first, second = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "error in the app" in first.getMessage()
    assert "receiver" in second.getMessage() and "work" in second.getMessage()
    assert second.exc_info is not None and second.exc_info[0] is LookupError
