"""The app with which each server is tested: tasks with bodies and events, and the tasks of `crowd`."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from flask import Flask, request

from flask_asyncroute import current_task
from flask_asyncroute.runtime import runtime_of
from tests.support.apps import crowd


def create_app(folder: str, **config: Any) -> Flask:
    """Return the app; parameters as for `crowd.create_app`."""
    app = crowd.create_app(folder, list_anonymous=True, namespace="served", **config)
    async_routes = app.extensions["async_routes"]
    note = app.extensions["crowd.note"]

    @app.get("/slots")
    def slots() -> dict[str, int]:
        """Return the free slots of this process for streams and waits."""
        return {"Left": runtime_of(app).runner.stream_slots._value}

    @app.put("/stream-age/<int:seconds>")
    def set_stream_age(seconds: int) -> dict[str, int]:
        """Set the maximum age of streams that begin later."""
        runner = runtime_of(app).runner
        runner.config = replace(runner.config, stream_age=seconds)
        return {"Seconds": seconds}

    @app.put("/body")
    @async_routes.task(name="body")
    def body() -> dict[str, int]:
        return {"Size": len(request.get_data())}

    @app.put("/talk")
    @async_routes.task()
    def talk() -> None:
        """Send numbered events. Each waits for a file that confirms that the client has the
        previous event.
        """
        for number in count():
            current_task.send_event({"n": number}, "word")
            while not (Path(folder) / f"heard-{number}").exists():
                if (Path(folder) / "enough").exists():
                    return
                current_task.sleep(0.02)

    @app.put("/chatter")
    @async_routes.task()
    def chatter() -> None:
        """Send events until it is stopped."""
        for number in count():
            current_task.send_event({"n": number}, "word")
            current_task.sleep(0.1)
            current_task.check()

    @app.put("/once-more")
    @async_routes.task(on_loss="restart")
    def once_more() -> None:
        """Run until stopped; return at once on the second run."""
        begun = Path(folder) / current_task.id
        note("begin", current_task.id)
        if not begun.exists():
            begun.touch()
            current_task.sleep(60)
            current_task.check()

    return app
