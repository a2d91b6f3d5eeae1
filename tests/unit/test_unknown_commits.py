"""What a write reports after a lost commit if the database stays away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flask_asyncroute.errors import (
    CommitUnknown,
    KeyTaken,
    StoreUnavailable,
    TooManyTasks,
    UniqueTaken,
)
from flask_asyncroute.stores.sql.database import Duplicate, ensure_written


def raising(*errors: Exception) -> Callable[[], Any]:
    """Return a function that raises these errors one after the other."""
    left = list(errors)

    def fail() -> Any:
        raise left.pop(0)

    return fail


@pytest.mark.parametrize("where", ["find", "second write"])
def test_a_second_outage_does_not_make_an_unknown_commit_a_failed_one(where: str) -> None:
    """The caller undoes unknown writes later, but not failed ones."""
    lost, away = CommitUnknown("lost"), StoreUnavailable("away")
    write = raising(lost, away) if where == "second write" else raising(lost)
    find = (lambda: None) if where == "second write" else raising(away)
    with pytest.raises(CommitUnknown) as raised:
        ensure_written(write, find)
    assert raised.value.__cause__ is away


REFUSALS = [Duplicate(), UniqueTaken("x"), KeyTaken("x"), TooManyTasks("x")]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda error: type(error).__name__)
def test_a_first_write_that_commits_late_is_found_after_the_second_is_refused(
    refusal: Exception,
) -> None:
    """The first write has taken the key, or the last task of the quota."""
    found = [None, "stored"]
    write = raising(CommitUnknown("lost"), refusal)
    assert ensure_written(write, lambda: found.pop(0)) == "stored"


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda error: type(error).__name__)
def test_a_second_write_that_another_task_refuses_raises(refusal: Exception) -> None:
    with pytest.raises(type(refusal)) as raised:
        ensure_written(raising(CommitUnknown("lost"), refusal), lambda: None)
    assert raised.value is refusal
