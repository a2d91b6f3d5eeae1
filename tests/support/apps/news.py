"""Tasks that return their end time and tasks that send events, for waits and streams."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

from flask import Flask, request

from flask_asyncroute import AsyncRoute, Sse, current_task
from tests.support.apps.naming import name_process

PAGE = """<!doctype html>
<title>waiting</title>
<script>
const source = new EventSource("/task/{task_id}/events");
let seen = 0;
source.addEventListener("task.state", () => seen += 1);
source.addEventListener("task.completed", event => {{
  source.close();
  document.title = JSON.parse(event.data).State + " after " + seen;
}});
</script>
"""


def create_app(folder: str, **config: Any) -> Flask:
    """Return the app.

    :param folder: for its store. A task of ``/gate`` runs until it has a file ``open``.
    :param config: ``ASYNCROUTE_*`` keys without their prefix, in lower case.
    """
    app = Flask(__name__, instance_path=folder)
    app.config.update({f"ASYNCROUTE_{name.upper()}": value for name, value in config.items()})
    arguments = "".join(f", {name}={value!r}" for name, value in config.items())
    app.config.setdefault("ASYNCROUTE_APP", f"{__name__}:create_app({folder!r}{arguments})")
    app.config.setdefault("ASYNCROUTE_LIST_ANONYMOUS", True)
    async_routes = AsyncRoute(app)
    app.extensions["async_routes"] = async_routes
    gate = Path(folder) / "open"

    name_process(app)

    @app.get("/page/<task_id>")
    def page(task_id: str) -> str:
        return PAGE.format(task_id=task_id)

    @app.put("/told/<int:milliseconds>")
    @async_routes.task(max_workers=4, sse=Sse(group="told", send_result=True))
    def told(milliseconds: int) -> dict[str, int]:
        """Return the process id, and the wall clock at the end."""
        time.sleep(milliseconds / 1000)
        return {"Pid": os.getpid(), "At": time.time_ns()}

    @app.put("/gate")
    @async_routes.task(max_workers=64, sse=Sse(group="gate"))
    def wait_for_gate() -> None:
        while not gate.exists():
            current_task.sleep(0.1)
            current_task.check()

    @app.put("/flow/<int:milliseconds>")
    @async_routes.task(max_workers=64, sse=Sse(group="gate"))
    def flow(milliseconds: int) -> None:
        """Send an event and report progress at regular intervals until the gate is open."""
        number = 0
        current_task.sleep(random.random() * milliseconds / 1000)  # not all tasks at once
        while not gate.exists():
            number += 1
            current_task.send_event({"n": number, "filling": "x" * 200}, "step")
            current_task.progress = number % 100
            current_task.sleep(milliseconds / 1000)

    @app.put("/burst/thread/<int:count>")
    @async_routes.task(max_workers=4, sse=Sse(group="burst"))
    def burst_in_thread(count: int) -> None:
        burst(count)

    @app.put("/burst/process/<int:count>")
    @async_routes.task(max_workers=2, executor="process", sse=Sse(group="burst"))
    def burst_in_process(count: int) -> None:
        burst(count)

    @app.put("/burst/again/<int:count>")
    @async_routes.task(max_workers=4, on_loss="restart", sse=Sse(group="burst"))
    def burst_again(count: int) -> None:
        burst(count)

    @app.put("/flood/<int:count>")
    @async_routes.task()
    def flood(count: int) -> None:
        """Send many large events; with ``?gate=``, end only when the gate is open."""
        for number in range(count):
            current_task.send_event({"n": number, "filling": "x" * 60_000}, "step")
        if "gate" in request.args:
            wait_for_gate()

    def burst(count: int) -> None:
        """Send numbered events, some fast enough to be stored together, others after a pause."""
        for number in current_task.track(range(count)):
            current_task.send_event({"n": number}, "step")
            if number % 7 == 0:
                time.sleep(0.01)

    return app
