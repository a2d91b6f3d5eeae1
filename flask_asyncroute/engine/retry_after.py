"""Estimate the ``Retry-After`` header from the durations of each route's recent tasks."""

from __future__ import annotations

import math

from ..task import AsyncRouteTask

WEIGHT = 0.2  # weight of the newest duration; the mean covers about ten tasks
LEAST_SECONDS = 1
MOST_SECONDS = 60  # a client that polls less often notices a stop or failure too late


class RunTimes:
    """Keeps a running mean of the task durations of each endpoint. Thread-safe.

    All estimates are from 1 to 60 seconds. The estimate is 1 if no task of the endpoint has ended.
    """

    # If two tasks end at the same time, one of the durations can be lost.

    def __init__(self) -> None:
        self._means_us: dict[str, float] = {}

    def note(self, task: AsyncRouteTask, completed_us: int | None) -> None:
        """Include the duration of a task in the mean, unless the task was stopped or never started.

        :param completed_us: when the view ended, in microseconds since the epoch; None: it has not
            ended.
        """
        if completed_us is None or task.started_us is None or task.stopping:
            return
        took = completed_us - task.started_us
        mean = self._means_us.get(task.endpoint, took)
        self._means_us[task.endpoint] = mean + WEIGHT * (took - mean)

    def rest(self, task: AsyncRouteTask, now_us: int) -> int:
        """Estimate the seconds until an unfinished task ends."""
        elapsed = 0 if task.started_us is None else now_us - task.started_us
        return _seconds(self._means_us.get(task.endpoint, 0) - elapsed)

    def until_free(self, endpoint: str, workers: int) -> int:
        """Estimate the seconds until the first of ``workers`` busy workers is free."""
        return _seconds(self._means_us.get(endpoint, 0) / workers)


def _seconds(microseconds: float) -> int:
    return min(max(math.ceil(microseconds / 1_000_000), LEAST_SECONDS), MOST_SECONDS)
