"""Tasks of a given duration that record their events in one file for all processes."""

from __future__ import annotations

import ctypes
import json
import os
import time
from pathlib import Path
from typing import Any

from flask import Flask, request

from flask_asyncroute import (
    AsyncRoute,
    AsyncRouteTask,
    Callback,
    Retry,
    current_task,
    task_finished,
    task_retried,
)
from tests.support.apps.naming import name_process
from tests.support.processes import parent

STEP = 0.005
"""Seconds between two checks for a stop."""


RETRY = Retry(times=3, delay=0.5, factor=1.5)


def create_app(folder: str, **config: Any) -> Flask:
    """Return the app.

    :param folder: for its store and for ``journal``.
    :param config: ``ASYNCROUTE_*`` keys without their prefix, in lower case.
    """
    app = Flask(__name__, instance_path=folder)
    app.config.update({f"ASYNCROUTE_{name.upper()}": value for name, value in config.items()})
    app.config.setdefault("ASYNCROUTE_APP", f"{__name__}:create_app({folder!r})")
    async_routes = AsyncRoute(app)
    app.extensions["async_routes"] = async_routes
    journal = Path(folder) / "journal"

    def note(what: str, task_id: str, **more: Any) -> None:
        line = {"what": what, "id": task_id, "pid": os.getpid(), "at": time.monotonic(), **more}
        number = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(number, json.dumps(line).encode() + b"\n")
        finally:
            os.close(number)

    app.extensions["crowd.note"] = note
    name_process(app)

    @app.put("/work/<int:milliseconds>")
    @async_routes.task(max_workers=8)
    def work(milliseconds: int) -> dict[str, int]:
        end = time.monotonic() + milliseconds / 1000
        note("begin", current_task.id)
        while time.monotonic() < end:
            if current_task.stop_requested:
                note("told", current_task.id)
                break
            time.sleep(STEP)
        else:
            note("end", current_task.id)
        return {"Pid": os.getpid()}

    @app.put("/slow/<int:milliseconds>")
    @async_routes.task(max_workers=1, interrupt_after=None)
    def slow(milliseconds: int) -> dict[str, int]:
        note("begin", current_task.id)
        current_task.sleep(milliseconds / 1000)
        note("end", current_task.id)
        return {"Pid": os.getpid()}

    @app.put("/again/<int:milliseconds>")
    @async_routes.task(max_workers=8, on_loss="restart")
    def again(milliseconds: int) -> dict[str, int]:
        note("begin", current_task.id)
        current_task.sleep(milliseconds / 1000)
        current_task.check()
        note("end", current_task.id)
        return {"Pid": os.getpid()}

    @app.put("/child/<int:milliseconds>")
    @async_routes.task(executor="process", max_workers=4)
    def child(milliseconds: int) -> dict[str, int]:
        """Sleep in a child process. Its fork server is a child of the worker."""
        note("begin", current_task.id, worker=parent(os.getppid()))
        time.sleep(milliseconds / 1000)
        note("end", current_task.id)
        return {"Pid": os.getpid()}

    @app.put("/deaf/<int:milliseconds>")
    @async_routes.task(max_workers=8)
    def deaf(milliseconds: int) -> None:
        """Sleep in C without the GIL."""
        note("begin", current_task.id)
        time.sleep(milliseconds / 1000)

    @app.put("/lonely/<int:milliseconds>")
    @async_routes.task(max_workers=1)
    def lonely(milliseconds: int) -> None:
        """Like deaf, in a pool of one thread."""
        note("begin", current_task.id)
        time.sleep(milliseconds / 1000)

    @app.put("/frozen/<int:milliseconds>")
    @async_routes.task(max_workers=8)
    def frozen(milliseconds: int) -> None:
        """Sleep in C with the GIL, so that no other thread of the process runs."""
        note("begin", current_task.id)
        ctypes.PyDLL(None).usleep(milliseconds * 1000)
        note("end", current_task.id)

    @app.put("/fail")
    @async_routes.task(max_workers=8)
    def fail() -> None:
        raise ValueError("on purpose")

    def add_retried(name: str, on_loss: str) -> None:
        @app.put(f"/{name}/<int:failures>", endpoint=name)
        @async_routes.task(max_workers=8, retry=RETRY, on_loss=on_loss, callback=Callback())
        def retried(failures: int) -> int:
            """Fail as often as the client wants, the first time with its delay, if any."""
            attempt = current_task.attempt
            note("begin", current_task.id, attempt=attempt, time=time.time())
            time.sleep(STEP)
            if attempt == 1 and failures and "after" in request.args:
                current_task.retry(after=float(request.args["after"]))
            if attempt <= failures:
                raise ValueError("on purpose")
            return attempt

    add_retried("retried", "abort")
    add_retried("retried-again", "restart")

    @app.put("/loop")
    @async_routes.task(max_workers=8)
    def loop() -> None:
        note("begin", current_task.id)
        try:
            while True:
                sum(range(100))
        finally:
            note("told", current_task.id)

    @app.put("/short")
    @async_routes.task(max_workers=8, timeout=0.5)
    def short() -> None:
        note("begin", current_task.id)
        while True:
            sum(range(100))

    @app.put("/fork")
    @async_routes.task()
    def fork() -> dict[str, bool]:
        """Fork, and let the child return from the view too."""
        copy = os.fork()
        if copy == 0:
            return {"Copy": True}
        os.waitpid(copy, 0)
        return {"Copy": False}

    @app.put("/copy")
    @async_routes.task()
    def copy() -> None:
        """Read all files of the app's folder repeatedly, as a backup does.

        Closing a file drops all POSIX locks that the process holds on it.
        """
        note("begin", current_task.id)
        while not current_task.stop_requested:
            for path in Path(folder).iterdir():
                path.read_bytes()

    @app.put("/exit/<int:code>")
    @async_routes.task(max_workers=8)
    def leave(code: int) -> None:
        note("begin", current_task.id)
        os._exit(code)

    def on_finished(sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        note("finished", task.id, state=task.state.value)

    def on_retried(sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        assert task.next_attempt_time is not None
        due = task.next_attempt_time.timestamp()
        note("retried", task.id, attempt=task.attempt, due=due)

    task_finished.connect(on_finished, sender=app, weak=False)
    task_retried.connect(on_retried, sender=app, weak=False)
    return app


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """Return the complete lines."""
    path = folder / "journal"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
