"""Tasks in child processes that crash or run until they are killed, and harmless tasks."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

from flask import Flask

from flask_asyncroute import AsyncRoute, current_task
from tests.support.apps.naming import name_process

CRASHES = ("exit", "SIGKILL", "SIGSEGV", "SIGABRT", "C")
MARK = struct.Struct("d")
TIMEOUT = 0.3


def create_app(folder: str) -> Flask:
    """Return the app.

    :param folder: for its store and for the files that tasks write.
    """
    app = Flask(__name__, instance_path=folder)
    app.config["ASYNCROUTE_APP"] = f"{__name__}:create_app({folder!r})"
    async_routes = AsyncRoute(app)
    app.extensions["async_routes"] = async_routes

    def note_pids(*pids: int) -> None:
        path = Path(folder) / f"pids-{current_task.id}"
        path.with_suffix(".new").write_text(" ".join(map(str, pids)))
        path.with_suffix(".new").rename(path)

    name_process(app)

    @app.put("/crash/<kind>")
    @async_routes.task(executor="process", max_workers=2)
    def crash(kind: str) -> None:
        if kind == "exit":
            os._exit(3)
        if kind == "C":
            ctypes.string_at(0)
        os.kill(os.getpid(), signal.Signals[kind])

    @app.put("/innocent/process")
    @async_routes.task(executor="process", max_workers=2, min_workers=1)
    def innocent_process() -> dict[str, int]:
        return innocent()

    @app.put("/innocent/thread")
    @async_routes.task(max_workers=4)
    def innocent_thread() -> dict[str, int]:
        return innocent()

    def innocent() -> dict[str, int]:
        done = 0
        for _ in current_task.track(range(10)):
            time.sleep(0.002)
            done += 1
        return {"Done": done}

    @app.put("/began")
    @async_routes.task(executor="process")
    def began() -> dict[str, float]:
        return {"At": time.monotonic()}

    @app.put("/began/spare")
    @async_routes.task(executor="process", min_workers=2)
    def began_from_spare() -> dict[str, float]:
        return {"At": time.monotonic()}

    @app.put("/endless/<kind>")
    @async_routes.task(executor="process", max_workers=4, min_workers=1)
    def endless(kind: str) -> Any:
        pids = [os.getpid()]
        if kind == "family":
            # The last process ignores every signal that it can.
            commands = (["sleep", "300"], ["sh", "-c", "trap '' TERM INT HUP; sleep 300 & wait"])
            pids += [subprocess.Popen(command).pid for command in commands]
        note_pids(*pids)
        if kind == "loop":
            while True:
                pass
        while True:
            time.sleep(300)

    @app.put("/overdue")
    @async_routes.task(executor="process", timeout=TIMEOUT)
    def overdue() -> None:
        began = time.monotonic()
        note_pids(os.getpid())
        file = os.open(Path(folder) / f"marks-{current_task.id}", os.O_RDWR | os.O_CREAT, 0o600)
        while True:
            os.pwrite(file, MARK.pack(time.monotonic() - began), 0)

    return app
