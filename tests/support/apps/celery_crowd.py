"""The tasks of `crowd`, and some more, on Celery workers.

Web servers and workers read the arguments of the app from the environment variable
``CELERY_CROWD``. Without it, the module has no Celery app.
"""

from __future__ import annotations

import ctypes
import json
import os
import time
from typing import Any

from flask import Flask, g, request

from flask_asyncroute import (
    AsyncRoute,
    AsyncRouteTask,
    Callback,
    Retry,
    RetryRequested,
    callback_sent,
    current_task,
)
from tests.support.apps import crowd
from tests.support.brokers import new_celery

ENVIRON = "CELERY_CROWD"
MODULE = __name__
APP = f"{__name__}:create_app()"


def environ(folder: Any, broker: str, queue: str, **config: Any) -> dict[str, str]:
    """Return the environment for the processes of one app.

    :param config: ``ASYNCROUTE_*`` keys without their prefix in lower case, or Celery's settings.
    """
    given = {"folder": str(folder), "broker": broker, "queue": queue, **config}
    return {ENVIRON: json.dumps(given)}


def create_app() -> Flask:
    """Return the app. Its Celery app is set after ``init_app``."""
    config = json.loads(os.environ[ENVIRON])
    folder, broker, queue = (config.pop(name) for name in ("folder", "broker", "queue"))
    settings = {
        name: config.pop(name)
        for name in list(config)
        if name.startswith(("task_", "worker_", "broker_", "result_"))
    }
    is_old = config.pop("is_old", False)
    config = {"executor": "celery", "list_anonymous": True, "app": APP, **config}
    app = crowd.create_app(folder, **config)
    app.extensions["celery"] = new_celery(broker, queue, **settings)
    app.extensions["celery"].flask_app = app
    async_routes: AsyncRoute = app.extensions["async_routes"]
    note = app.extensions["crowd.note"]

    @async_routes.before_task
    def prepare() -> None:
        g.prepared_in = os.getpid()

    @app.put("/echo/<int:number>")
    @async_routes.task(arguments={"fixed": "yes"})
    def echo(number: int, fixed: str) -> Any:
        upload = request.files.get("file")
        return {
            "number": number, "fixed": fixed, "id": current_task.id, "json": request.get_json(silent=True),
            "header": request.headers.get("X-Own"), "size": len(upload.read()) if upload else len(request.get_data()),
            "pid": os.getpid(), "prepared_in": g.prepared_in, "remaining": current_task.remaining(),
        }  # fmt: skip

    @app.put("/talk/<int:count>")
    @async_routes.task()
    def talk(count: int) -> str:
        note("begin", current_task.id)
        for number in range(count):
            current_task.set_progress(100 * number / count)
            current_task.send_event({"n": number, "at": time.monotonic()}, "word")
            time.sleep(0.02)
        return "said"

    @app.put("/retry/<int:times>")
    @async_routes.task(retry=Retry(times=2, delay=0.2, jitter=0))
    def retry(times: int) -> int:
        note("begin", current_task.id)
        if current_task.attempt <= times:
            raise ValueError(f"attempt {current_task.attempt}")
        return current_task.attempt

    @app.put("/later/<float:seconds>")
    @async_routes.task(retry=Retry(times=1))
    def later(seconds: float) -> int:
        note("begin", current_task.id)
        if current_task.attempt == 1:
            raise RetryRequested(after=seconds)
        return current_task.attempt

    @app.put("/unique/<name>")
    @async_routes.task(unique=True)
    def unique(name: str) -> None:
        note("begin", current_task.id)
        current_task.sleep(60)

    @app.put("/impatient")
    @async_routes.task(start_timeout=1)
    def impatient() -> None:
        note("begin", current_task.id)

    @app.put("/calling")
    @async_routes.task(callback=Callback(send_result=True))
    def calling() -> str:
        return "called"

    def on_callback_sent(sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        note("sent", task.id)

    callback_sent.connect(on_callback_sent, sender=app, weak=False)

    def gil() -> None:
        """Sleep in C with the GIL, so that no other thread of the process runs."""
        note("begin", current_task.id)
        ctypes.PyDLL(None).usleep(60_000_000)

    app.put("/gil", endpoint="gil")(async_routes.task()(gil))
    app.put("/short-gil", endpoint="short-gil")(async_routes.task(timeout=0.5)(gil))

    @app.put("/named/<name>")
    @async_routes.task(id_generator=lambda: (request.view_args or {})["name"])
    def named(name: str) -> None:
        note("begin", current_task.id)
        current_task.sleep(60 if request.args.get("long") else 0)

    @app.put("/quick")
    @async_routes.task()
    def quick() -> dict[str, int]:
        return {"answer": 42}

    # The same work as a plain Celery task with a result backend.
    def answer() -> dict[str, int]:
        return {"answer": 42}

    plain = app.extensions["celery"].task(name="plain", ignore_result=False)(answer)

    @app.put("/plain")
    def start_plain() -> Any:
        return {"Id": plain.delay().id}, 202

    @app.get("/plain/<task_id>")
    def get_plain(task_id: str) -> Any:
        result = plain.AsyncResult(task_id)
        return {"Result": result.get() if result.ready() else None}

    if not is_old:

        @app.put("/new")
        @async_routes.task()
        def new() -> None:
            """Exist only in the newer release."""
            note("begin", current_task.id)

    return app


if ENVIRON in os.environ:
    flask_app = create_app()
    celery = flask_app.extensions["celery"]
