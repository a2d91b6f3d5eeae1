"""Measures processor time."""

from __future__ import annotations

import time
from collections.abc import Callable


def thread_seconds(work: Callable[[], object]) -> float:
    """Return the shortest processor time of three calls, because garbage collection may slow one
    down.
    """
    took = []
    for _ in range(3):
        began = time.thread_time()
        work()
        took.append(time.thread_time() - began)
    return min(took)
