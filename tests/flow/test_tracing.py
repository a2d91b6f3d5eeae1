"""Tasks under a tracer, such as coverage, a debugger or a profiler."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import cProfile, tempfile
from flask import Flask
from flask_asyncroute import AsyncRoute

app = Flask("traced", instance_path=tempfile.mkdtemp())
app.config["ASYNCROUTE_STORE"] = "memory://"
async_routes = AsyncRoute(app)

@async_routes.route("/work", methods=["POST"])
def work():
    return {"done": True}

def start_and_wait():
    task_id = app.test_client().post("/work").get_json()["Id"]
    with app.app_context():
        return async_routes.wait(task_id, 20).state

start_and_wait()
print(cProfile.Profile().runcall(lambda: [start_and_wait() for _ in range(3)]))
"""


def test_tasks_complete_under_a_profiler() -> None:
    """Under a tracer, CPython 3.11 loops forever if an exception for a thread was withdrawn."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout.count("COMPLETED") == 3, ended
