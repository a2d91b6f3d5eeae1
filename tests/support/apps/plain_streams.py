"""Streams in plain Flask, with a generator and a queue for each client. A function puts each event
into all queues. The paths are those of `news`; nothing is stored.
"""

from __future__ import annotations

import json
import random
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from flask import Flask, Response


def create_app(folder: str) -> Flask:
    """Return the app. A job ends when the folder has a file ``open``."""
    app = Flask(__name__)
    gate = Path(folder) / "open"
    jobs: dict[str, dict[str, Any]] = {}
    listeners: dict[str | None, set[SimpleQueue[bytes]]] = {None: set()}
    lock = threading.Lock()

    def send(job_id: str, name: str, data: Any) -> None:
        frame = f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
        with lock:
            for listener in (*listeners[None], *listeners[job_id]):
                listener.put(frame)

    def run(job_id: str, milliseconds: int) -> None:
        pause = threading.Event()
        number = 0
        pause.wait(random.random() * milliseconds / 1000)  # not all jobs at once
        while not gate.exists():
            number += 1
            jobs[job_id]["Progress"] = number % 100
            send(job_id, "step", {"n": number, "filling": "x" * 200})
            send(job_id, "task.progress", jobs[job_id])
            pause.wait(milliseconds / 1000)
        jobs[job_id]["State"] = "Completed"
        send(job_id, "task.completed", jobs[job_id])

    @app.put("/flow/<int:milliseconds>")
    def flow(milliseconds: int) -> tuple[dict[str, Any], int]:
        job_id = str(uuid.uuid4())
        jobs[job_id] = {"Id": job_id, "State": "Running"}
        listeners[job_id] = set()
        threading.Thread(target=run, args=(job_id, milliseconds), daemon=True).start()
        return jobs[job_id], 202

    @app.get("/task/<job_id>")
    def get(job_id: str) -> dict[str, Any]:
        return jobs[job_id]

    @app.get("/tasks/events")
    @app.get("/task/<job_id>/events")
    def events(job_id: str | None = None) -> Response:
        def generate() -> Iterator[bytes]:
            listener: SimpleQueue[bytes] = SimpleQueue()
            with lock:
                listeners[job_id].add(listener)
            try:
                yield b":\n\n"
                while True:
                    frame = listener.get()
                    yield frame
                    if job_id is not None and frame.startswith(b"event: task.completed"):
                        return
            finally:
                with lock:
                    listeners[job_id].remove(listener)

        return Response(generate(), content_type="text/event-stream")

    return app
