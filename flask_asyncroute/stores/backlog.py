"""Which of the tasks that wait a process takes over: the oldest, and of each route no more than there is room for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def oldest(waiting: Iterable[tuple[str, str]], most: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the first of (id, endpoint) in order, as many of each endpoint as ``most`` says."""
    left = dict(most)
    found = []
    for task_id, endpoint in waiting:
        if left.get(endpoint, 0) > 0:
            left[endpoint] -= 1
            found.append((task_id, endpoint))
    return found
