"""An app whose views run in child processes, which import this module."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from flask import (
    Flask,
    Response,
    abort,
    current_app,
    g,
    got_request_exception,
    request,
    session,
    url_for,
)

from flask_asyncroute import AsyncRoute, Retry, TaskNotFound, current_task, task_completed

APP = "tests.support.apps.child_app:create_app()"
LOADED: list[str] = []
"""Has one entry for each app that this process has created."""


def create_app(**config: Any) -> Flask:
    """Return the app, by default on ``memory://``."""
    LOADED.append("app")
    app = Flask(
        "tests.support.apps.child_app",
        instance_path=config.pop("instance_path", "/nonexistent/instance"),
    )
    app.config.update(
        {
            "SECRET_KEY": "not secret",
            "ASYNCROUTE_APP": APP,
            "ASYNCROUTE_STORE": "memory://",
            **config,
        }
    )
    async_routes = AsyncRoute(app)
    app.extensions["child_app"] = async_routes

    def route(rule: str, **options: Any) -> Any:
        return async_routes.route(rule, **{"methods": ["POST"], "executor": "process", **options})

    @async_routes.before_task
    def prepare() -> None:
        g.prepared_in = os.getpid()

    @app.teardown_request
    def tear_down(error: BaseException | None) -> None:
        path = request.args.get("teardown")
        if path:
            with open(path, "a") as file:
                file.write(f"{os.getpid()} {type(error).__name__}\n")

    def on_exception(sender: Flask, exception: BaseException, **extra: Any) -> None:
        path = request.args.get("exceptions")
        if path:
            with open(path, "a") as file:
                file.write(f"{os.getpid()} {type(exception).__name__}\n")

    got_request_exception.connect(on_exception, sender=app, weak=False)

    def on_completed(sender: Flask, **extra: Any) -> None:
        completed.append(os.getpid())

    completed: list[int] = []
    task_completed.connect(on_completed, sender=app, weak=False)

    @route("/submits/<int:n>")
    def submits(n: int) -> Any:
        task = async_routes.submit("squares", {"n": n}, user=current_task.user)
        return [task.id, os.getpid()]

    @route("/squares/<int:n>", executor="thread")
    def squares(n: int) -> Any:
        depth = request.headers.get("Asyncroute-Depth")
        return [n * n, os.getpid(), current_task.user, depth]

    @route("/submits-at-once")
    def submits_at_once() -> Any:
        return async_routes.submit("at_once").id

    @route("/at-once", executor="immediate")
    def at_once() -> None: ...

    @route("/where")
    def where() -> Any:
        return {
            "pid": os.getpid(), "session": os.getsid(0), "group": os.getpgid(0), "prepared_in": g.prepared_in,
            "main": getattr(sys.modules["__main__"], "__file__", None), "threads": threading.active_count(),
            "loaded": len(LOADED),
        }  # fmt: skip

    @route("/echo/<int:number>", arguments={"fixed": "yes"})
    def echo(number: int, fixed: str) -> Any:
        upload = request.files.get("file")
        size = 0
        while upload is not None and (piece := upload.stream.read(65536)):
            size += len(piece)
        return {
            "number": number, "fixed": fixed, "id": current_task.id, "user": current_task.user, "args": request.args,
            "form": request.form, "json": request.get_json(silent=True), "header": request.headers.get("X-Own"),
            "session": session.get("name"), "url": url_for("plain"), "size": size, "app": current_app.name,
            "remaining": current_task.remaining(),
        }  # fmt: skip

    @route("/size")
    def size() -> Any:
        total = 0
        while piece := request.stream.read(1 << 20):
            total += len(piece)
        return {"size": total}

    @route("/return/<what>")
    def return_(what: str) -> Any:
        return {
            "none": None, "big": "x" * 2_000_000, "set": {1}, "response": Response("x"), "text": "é\ud800", "list": [1, None],
            "half": "x" * 1_000_000,
        }[what]  # fmt: skip

    @route("/raise/<what>")
    def raise_(what: str) -> Any:
        class Local(Exception):
            def __init__(self, one: int, two: int) -> None:
                super().__init__("odd")
                self.lock = threading.Lock()

            def __reduce__(self) -> Any:
                raise TypeError("no pickle of this")

        class Mute(Exception):
            def __str__(self) -> str:
                raise RuntimeError("no words")

        if what == "http":
            abort(404, "no such thing")
        if what == "recursion":
            return deeper()
        raise {
            "value": ValueError("bad thing"), "local": Local(1, 2), "mute": Mute(), "long": ValueError("x" * 10_000_000),
            "exit": SystemExit(4), "interrupt": KeyboardInterrupt(), "unknown": TaskNotFound("gone"),
        }[what]  # fmt: skip

    @route("/retried/<how>", retry=Retry(times=1, delay=0.02))
    def retried(how: str) -> Any:
        if current_task.attempt == 1 or how == "always":
            if how == "raise":
                raise ValueError("no")
            if how == "exit":
                os._exit(3)
            if how == "retry":
                current_task.retry(after=0.01, reason="busy")
            os.kill(os.getpid(), signal.SIGKILL)
        return [current_task.attempt, len(request.get_data())]

    @route("/die/<how>")
    def die(how: str) -> Any:
        if how.startswith("exit"):
            os._exit(int(how[4:]))
        if how.startswith("signal"):
            os.kill(os.getpid(), int(how[6:]))
            time.sleep(10)
        if how == "segfault":
            ctypes.string_at(0)
        if how == "memory":
            with open("/proc/self/statm") as file:
                limit = int(file.read().split()[0]) * resource.getpagesize() + (1 << 26)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            return len([bytearray(1 << 24) for _ in range(100)])
        if how == "processor":
            resource.setrlimit(resource.RLIMIT_CPU, (1, 5))
            while True:
                pass
        if how == "close":
            os.closerange(3, 256)
        if how == "rubbish":
            for descriptor in range(3, 64):
                if is_socket(descriptor):
                    os.write(descriptor, b"\xff" * 100_000)
        if how == "half":
            for descriptor in range(3, 64):
                if is_socket(descriptor):
                    os.write(descriptor, b"O" + (255).to_bytes(8, "big") + b"{")
            os._exit(5)
        if how == "huge":
            for descriptor in range(3, 64):
                if is_socket(descriptor):
                    os.write(descriptor, b"O" + b"\xff" * 8 + b"x" * 100)
            time.sleep(10)
        if how == "lie":
            for descriptor in range(3, 64):
                if is_socket(descriptor):
                    text = b'{"state":"Running","report":{"progress":null,"message":null}}'
                    os.write(descriptor, b"O" + len(text).to_bytes(8, "big") + text)
            time.sleep(10)
        if how == "stdout":
            for _ in range(200):
                os.write(1, b"x" * 4096 + b"\n")
        return "alive"

    @route("/spin")
    def spin() -> Any:
        current_task.set_progress(10, "spinning")
        while True:
            pass

    @route("/sleep/<float:seconds>")
    def sleep(seconds: float) -> Any:
        current_task.set_progress(1)
        time.sleep(seconds)
        return "slept"

    @route("/unique", unique=True)
    def unique() -> None:
        current_task.set_progress(1)
        time.sleep(30)

    @route("/brief", timeout=0.3)
    def brief() -> Any:
        time.sleep(30)

    @route("/deaf")
    def deaf() -> Any:
        import signal

        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        current_task.set_progress(1)
        while True:
            try:
                time.sleep(30)
            except BaseException:
                pass

    @route("/family")
    def family() -> Any:
        child = subprocess.Popen(["sleep", "300"])
        with open(request.args["pids"], "w") as file:
            file.write(f"{os.getpid()} {child.pid}\n")
        current_task.set_progress(1)
        if request.args.get("returns"):
            return "returned"
        child.wait()

    @route("/events")
    def events() -> None:
        for number in range(1500):
            current_task.send_event({"n": number}, "step")
        current_task.set_progress(50)
        current_task.send_event("bye")

    @route("/progress")
    def progress() -> Any:
        for number in range(100_000):
            current_task.set_progress(number / 1000, f"step {number}")
        return current_task.progress

    @route("/timed_progress")
    def timed_progress() -> Any:
        current_task.progress_over(0.3, 0.1, 80)
        time.sleep(0.8)
        return "climbed"

    @route("/stays", max_workers=1)
    def stays() -> Any:
        threading.Thread(target=time.sleep, args=(60,)).start()
        return os.getpid()

    @route("/async")
    async def coroutine() -> Any:
        await asyncio.sleep(0.01)
        return await asyncio.gather(asyncio.sleep(0, 1), asyncio.sleep(0, 2))

    @route("/store/<what>")
    def store(what: str) -> Any:
        if what == "state":
            return async_routes.state.apply("hits", lambda hits: hits + 1, default=0)
        if what == "get":
            found = async_routes.get(current_task.id)
            return found and found.state
        if what == "query":
            return len(list(async_routes.query()))
        if what == "stop":
            async_routes.stop(current_task.id)
            time.sleep(30)
        if what == "start":
            return current_app.test_client().post("/thread").json
        if what == "client":
            return current_app.test_client().get(f"/task/{current_task.id}").json
        return None

    @route("/signals")
    def signals() -> Any:
        return completed

    @route("/nested")
    def nested() -> Any:
        import multiprocessing

        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(os.getppid) == os.getpid()

    @route("/calling/<int:number>")
    def calling(number: int) -> Any:
        return [current_task.id, spare()["pid"], *(calling(number - 1) if number else [])]

    @route("/write")
    def write() -> Any:
        session["name"] = "x"
        return session["name"]

    @route("/log")
    def log() -> Any:
        logging.getLogger("child_app").warning("logged in the child")
        print("printed in the child")
        return None

    @route("/spare", min_workers=1, max_workers=2)
    def spare() -> Any:
        return {"pid": os.getpid()}

    @async_routes.route("/thread", methods=["POST"])
    def thread() -> Any:
        return {"pid": os.getpid()}

    @async_routes.route("/wait/<float:seconds>", methods=["POST"], max_workers=8)
    def wait(seconds: float) -> Any:
        return current_task.sleep(seconds)

    @app.get("/plain")
    def plain() -> Any:
        return "plain"

    return app


def disconnect_receivers(app: Flask) -> None:
    """Disconnect the receivers that `create_app` has connected."""
    for sent in (got_request_exception, task_completed):
        for receiver in list(sent.receivers_for(app)):
            sent.disconnect(receiver)


def deeper() -> Any:
    """Recurse endlessly."""
    return deeper()


def is_socket(descriptor: int) -> bool:
    """Return whether a descriptor is a socket."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    except OSError:
        return False
