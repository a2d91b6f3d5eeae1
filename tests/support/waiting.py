"""Wait for a condition, with a deadline."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable
from typing import Any


def eventually_true(
    condition: Callable[[], Any], seconds: float = 5.0, interval: float = 0.005, otherwise: str = ""
) -> Any:
    """Return the first true value of ``condition``, which is called every ``interval`` seconds.

    :param otherwise: the message of the failure.
    :raises AssertionError: if there is no true value within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not (value := condition()):
        if time.monotonic() >= deadline:
            raise AssertionError(
                otherwise or f"{_source(condition)} was not true within {seconds} s."
            )
        pause.wait(interval)
    return value


def _source(condition: Callable[[], Any]) -> str:
    try:
        return inspect.getsource(condition).strip()
    except (OSError, TypeError):
        return repr(condition)
