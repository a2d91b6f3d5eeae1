"""The task record and its JSON form."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute.permissions import Access, Permission
from flask_asyncroute.stores.sql.tables import RECORD
from flask_asyncroute.task import AsyncRouteTask, State, moment, now_us, rfc3339

NewTask = Callable[..., AsyncRouteTask]
T0 = 1_700_000_000_000_000
OPTIONAL = {
    "started_us": (T0, "StartingTime", "2023-11-14T22:13:20.000000Z"),
    "completed_us": (T0 + 1, "CompletedTime", "2023-11-14T22:13:20.000001Z"),
    "expires_us": (T0 + 999_999, "ExpireTime", "2023-11-14T22:13:20.999999Z"),
    "user": ("anna", "User", "anna"),
    "progress": (0.0, "Progress", 0),
    "progress_message": ("", "ProgressMessage", ""),
    "result_json": (b"null", "Result", None),
    "error": ("", "Error", ""),
    "stopping": (True, "Stopping", True),
}
ALWAYS = {
    "Id": "task", "AsyncRouteId": "[Put]/work", "State": "NotStarted", "IsCompleted": False, "Cancellable": True,
    "CreationTime": "2023-11-14T22:13:20.000000Z", "Url": "http://localhost/work", "Method": "PUT",
}  # fmt: skip


def test_required_fields(make_task: NewTask) -> None:
    assert make_task().to_dict() == ALWAYS


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_fields_are_present_if_set(make_task: NewTask, name: str) -> None:
    value, wire_name, wire_value = OPTIONAL[name]
    wire = make_task(**{name: value}).to_dict()
    assert wire.pop(wire_name) == wire_value
    if name == "user":
        wire.pop("Permission")
    assert wire == ALWAYS


@pytest.mark.parametrize("state", list(State))
def test_is_completed_follows_the_state(make_task: NewTask, state: State) -> None:
    task = make_task(state=state)
    assert task.is_completed is state.is_terminal
    wire = task.to_dict()
    assert (wire["State"], wire["IsCompleted"]) == (state.value, state.is_terminal)
    assert type(wire["State"]) is str


def test_the_stored_json_of_a_result_is_not_encoded_again(make_task: NewTask) -> None:
    task = make_task(result_json='{"InnerValue": "é", "n": [1, 2.5, null]}'.encode())
    assert task.result == {"InnerValue": "é", "n": [1, 2.5, None]}
    assert task.to_dict()["Result"] == task.result
    assert b'"Result":{"InnerValue": "\xc3\xa9", "n": [1, 2.5, null]}' in msgspec.json.encode(
        task.to_wire()
    )
    assert make_task().result is None


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, "0"), (50.0, "50"), (33.33, "33.33"), (100.0, "100"), (0.01, "0.01")],
)
def test_integral_progress_is_shown_as_an_integer(
    make_task: NewTask, progress: float, expected: str
) -> None:
    assert (
        msgspec.json.encode(make_task(progress=progress).to_wire()["Progress"]).decode() == expected
    )


def test_times_are_timezone_aware_and_exact(make_task: NewTask) -> None:
    task = make_task(created_us=T0 + 123_456, started_us=T0, completed_us=None, expires_us=T0 + 1)
    assert task.creation_time == datetime(2023, 11, 14, 22, 13, 20, 123456, UTC)
    assert task.starting_time == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert task.completed_time is None
    assert task.expire_time is not None and task.expire_time.utcoffset() == timedelta(0)
    assert make_task().starting_time is None
    assert make_task().expire_time is None


@given(st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(9999, 12, 31)))
def test_every_time_round_trips_with_microseconds(value: datetime) -> None:
    aware = value.replace(tzinfo=UTC)
    microseconds = (aware - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    assert moment(microseconds) == aware
    text = rfc3339(microseconds)
    assert len(text) == 27 and text.endswith("Z")
    assert datetime.fromisoformat(text) == aware


def test_now_us_is_the_current_time() -> None:
    before = datetime.now(UTC)
    assert (
        before - timedelta(milliseconds=1)
        <= moment(now_us())
        <= datetime.now(UTC) + timedelta(milliseconds=1)
    )


def test_only_a_task_with_neither_owner_nor_permission_has_no_permission(
    make_task: NewTask,
) -> None:
    permission = Permission(Access(("ben",)))
    task = make_task(permission_json=msgspec.json.encode(permission))
    assert make_task().permission is None
    assert (task.permission, task.to_dict()["Permission"]) == (permission, permission.to_dict())


def test_the_owner_is_listed_in_read_and_write_users(make_task: NewTask) -> None:
    empty: dict[str, list[str]] = {"Groups": [], "Roles": [], "Scopes": []}
    only_anna = {"Users": ["anna"], **empty}
    assert make_task(user="anna").to_dict()["Permission"] == {"Read": only_anna, "Write": only_anna}
    granted = Permission(Access(("ben",), ("g",), ("r",), ("s",)), Access(("anna",)))
    task = make_task(user="anna", permission_json=msgspec.json.encode(granted))
    assert task.granted == granted
    assert task.to_dict()["Permission"] == {
        "Read": {"Users": ["anna", "ben"], "Groups": ["g"], "Roles": ["r"], "Scopes": ["s"]},
        "Write": only_anna,
    }


def test_a_record_is_immutable(make_task: NewTask) -> None:
    task = make_task()
    with pytest.raises(AttributeError):
        task.state = State.FAILED  # type: ignore[misc]


def test_a_record_has_the_json_fields_in_snake_case(make_task: NewTask) -> None:
    full: dict[str, Any] = {name: value for name, (value, _, _) in OPTIONAL.items()}
    task = make_task(**full)
    for wire_name, value in task.to_dict().items():
        name = "".join(
            f"_{letter.lower()}" if letter.isupper() else letter for letter in wire_name
        ).lstrip("_")
        assert hasattr(task, name), wire_name
        if isinstance(value, (str, bool)) and not wire_name.endswith("Time"):
            assert getattr(task, name) == value, wire_name


def test_the_columns_are_in_the_order_of_the_fields() -> None:
    assert [column.name for column in RECORD] == list(AsyncRouteTask.__struct_fields__)
