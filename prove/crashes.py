"""Children that crash in every way, with innocent tasks beside them in threads and other children: none is harmed."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections import Counter
from typing import Any

from flask import Flask

from benchmarks.calls import call, environ_of
from flask_asyncroute.runtime import runtime_of

from . import check, scaled
from .apps.children import CRASHES, create_app

COUNT = 1_000
PATIENCE = 60.0
ERRORS = {"exit": "exit code 3", "SIGKILL": "SIGKILL", "SIGSEGV": "SIGSEGV", "SIGABRT": "SIGABRT", "C": "SIGSEGV"}
CLIENTS = 2


def prove(share: float) -> str:
    """Crash very many children; return the figures."""
    count = scaled(COUNT, share, 20)
    logger = logging.getLogger("flask_asyncroute")
    logger.setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="asyncroute-prove-") as folder:
        app = create_app(folder)
        try:
            for path in ("/innocent/process", "/innocent/thread"):
                _run(app, path)
            descriptors = len(os.listdir("/proc/self/fd"))
            trial = _Trial(app)
            trial.run(count)
            check(
                len(os.listdir("/proc/self/fd")) <= descriptors + 10,
                f"{len(os.listdir('/proc/self/fd')) - descriptors} descriptors were lost",
            )
        finally:
            runtime_of(app).close()
            logger.setLevel(logging.NOTSET)
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(trial.crashed.items()))
    innocents = sum(trial.innocents.values())
    return f"{count} crashes ({kinds}), {innocents} innocent tasks in threads and children beside them, 0 harmed"


class _Trial:
    def __init__(self, app: Flask) -> None:
        self.app = app
        self.crashed: Counter[str] = Counter()
        self.innocents: Counter[str] = Counter()
        self._is_over = threading.Event()
        self._failures: list[BaseException] = []

    def run(self, count: int) -> None:
        """Have some clients crash children while others run innocent tasks."""
        kinds = [CRASHES[number % len(CRASHES)] for number in range(count)]
        guilty = [threading.Thread(target=self._guarded, args=(self._crash, kinds[n::CLIENTS])) for n in range(CLIENTS)]
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
        check(all(self.innocents.values()), "nobody innocent was there")

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
            check((task["State"], task.get("Error")) == expected, f"a crash by {kind} ended as {task}")
            self.crashed[kind] += 1

    def _live(self, path: str) -> None:
        while not self._is_over.is_set():
            task = _run(self.app, path)
            check(
                task["State"] == "Completed" and task["Result"] == {"Done": 10} and task["Progress"] == 100,
                f"an innocent task was harmed: {task}",
            )
            self.innocents[path] += 1


def _run(app: Flask, path: str) -> Any:
    """Start a task and return it as it is when it has ended."""
    task_id = call(app, environ_of("PUT", path), 202).json()["Id"]
    deadline = time.monotonic() + PATIENCE
    while True:
        task = call(app, environ_of("GET", f"/task/{task_id}"), 200).json()
        if task["IsCompleted"]:
            return task
        check(time.monotonic() < deadline, f"a task does not end: {task}")
        time.sleep(0.003)
