"""Helpers for an app's tests.

The fixtures for pytest are in the separate module ``flask_asyncroute_pytest``.
"""

from __future__ import annotations

from .clock import Clock
from .receiver import CallbackReceiver, ReceivedCallback
from .tasks import close, fake_task, inline, wait_task

__all__ = [
    "CallbackReceiver", "Clock", "ReceivedCallback", "close", "fake_task", "inline", "wait_task",
]  # fmt: skip
