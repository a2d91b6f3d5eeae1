"""Fixtures for pytest. The entry point ``flask_asyncroute_pytest`` loads this module.

It is not in the package ``flask_asyncroute``, because pytest imports it even for tests that use
neither the package nor Flask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from flask import Flask

    from flask_asyncroute.current_task import CurrentTask
    from flask_asyncroute.testing import CallbackReceiver, Clock


@pytest.fixture
def asyncroute_inline(app: Flask) -> Iterator[None]:
    """Run each task of the fixture ``app`` inside the request that starts it."""
    from flask_asyncroute.testing import inline

    with inline(app):
        yield


@pytest.fixture
def asyncroute_clock(app: Flask) -> Iterator[Clock]:
    """Return a clock of the fixture ``app``; ``asyncroute_clock.advance(60)`` sets it ahead."""
    from flask_asyncroute.testing import Clock

    with Clock(app) as clock:
        yield clock


@pytest.fixture
def asyncroute_callbacks(app: Flask) -> Iterator[CallbackReceiver]:
    """Return a running receiver of the callbacks of the fixture ``app``."""
    from flask_asyncroute.testing import CallbackReceiver

    with CallbackReceiver(app) as receiver:
        yield receiver


@pytest.fixture
def asyncroute_task() -> Iterator[CurrentTask]:
    """Set a fake ``current_task``, and return it."""
    from flask_asyncroute.testing import fake_task

    with fake_task() as task:
        yield task
