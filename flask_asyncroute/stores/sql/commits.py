"""Commits of which nobody can say at first whether they happened: the connection was lost before the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ...errors import CommitUnknown
from .database import Duplicate

T = TypeVar("T")


def surely(write: Callable[[], T], look: Callable[[], T | None]) -> T:
    """Write; where it cannot be known whether that happened, look, and write again if it did not.

    :param write: what it returns is true where it has changed something.
    :param look: returns what ``write`` would have, or None where it has not happened.
    :raises StoreUnavailable: where the database is still away; it may have happened.
    """
    try:
        return write()
    except CommitUnknown:
        found = look()
    if found is not None:
        return found
    # The first may have been under way still: a server that waits for a lock does not notice that its client is gone. It may
    # be done by now, and then there is nothing left to do for this one, or what it adds is there.
    try:
        done = write()
    except Duplicate:
        found = look()
        if found is None:
            raise
        return found
    found = None if done else look()
    return done if found is None else found
