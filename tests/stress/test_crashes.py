"""Child processes crash in various ways; other tasks in threads and children are not affected."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from benchmarks.calls import call, environ_of
from flask_asyncroute.runtime import runtime_of
from tests.support.apps.children import CRASHES, create_app
from tests.support.waiting import eventually_true

COUNT = 1_000
PATIENCE = 60.0
ERRORS = {
    "exit": "exit code 3",
    "SIGKILL": "SIGKILL",
    "SIGSEGV": "SIGSEGV",
    "SIGABRT": "SIGABRT",
    "C": "SIGSEGV",
}
CLIENTS = 2


@pytest.mark.covers("F03", "F06", "F07")
def test_crashes_affect_no_other_task(
    tmp_path: Path, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    count = scaled(COUNT, 20)
    logger = logging.getLogger("flask_asyncroute")
    logger.setLevel(logging.CRITICAL)
    app = create_app(str(tmp_path))
    try:
        for path in ("/innocent/process", "/innocent/thread"):
            _run(app, path)
        before = _descriptors()
        trial = _Trial(app)
        trial.run(count)
        eventually_true(
            lambda: _descriptors() <= before, PATIENCE, 0.05, "descriptors were not closed"
        )
    finally:
        runtime_of(app).close()
        logger.setLevel(logging.NOTSET)
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(trial.crashed.items()))
    innocents = sum(trial.innocents.values())
    figures(f"{count} crashes ({kinds}), {innocents} other tasks in threads and children")


class _Trial:
    def __init__(self, app: Flask) -> None:
        self.app = app
        self.crashed: Counter[str] = Counter()
        self.innocents: Counter[str] = Counter()
        self._is_over = threading.Event()
        self._failures: list[BaseException] = []

    def run(self, count: int) -> None:
        """Crash children from some clients while others run innocent tasks."""
        kinds = [CRASHES[number % len(CRASHES)] for number in range(count)]
        guilty = [
            threading.Thread(target=self._guarded, args=(self._crash, kinds[n::CLIENTS]))
            for n in range(CLIENTS)
        ]
        paths = ("/innocent/process", "/innocent/thread")
        others = [threading.Thread(target=self._guarded, args=(self._live, path)) for path in paths]
        for thread in (*guilty, *others):
            thread.start()
        for thread in guilty:
            thread.join()
        self._is_over.set()
        for thread in others:
            thread.join()
        if self._failures:
            raise self._failures[0]
        assert all(self.innocents.values()), "no innocent task ran"

    def _guarded(self, function: Any, argument: Any) -> None:
        try:
            function(argument)
        except BaseException as error:
            self._failures.append(error)
            self._is_over.set()

    def _crash(self, kinds: list[str]) -> None:
        for kind in kinds:
            if self._is_over.is_set():
                return
            task = _run(self.app, f"/crash/{kind}")
            expected = ("Failed", f"Process died: {ERRORS[kind]}")
            assert (task["State"], task.get("Error")) == expected, (
                f"a crash by {kind} ended as {task}"
            )
            self.crashed[kind] += 1

    def _live(self, path: str) -> None:
        while not self._is_over.is_set():
            task = _run(self.app, path)
            assert (
                task["State"] == "Completed"
                and task["Result"] == {"Done": 10}
                and task["Progress"] == 100
            ), f"an innocent task was harmed: {task}"
            self.innocents[path] += 1


def _descriptors() -> int:
    """Return the number of open sockets and pipes of this process."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{name}").startswith(("socket:", "pipe:"))
        except FileNotFoundError:
            pass  # It was closed meanwhile.
    return count


def _run(app: Flask, path: str) -> Any:
    """Start a task and return it when it has ended."""
    task_id = call(app, environ_of("PUT", path), 202).json()["Id"]
    path = f"/task/{task_id}"

    def ended() -> Any:
        task = call(app, environ_of("GET", path), 200).json()
        return task if task["IsCompleted"] else None

    return eventually_true(ended, PATIENCE, 0.003)
