"""How long the commands take with very many tasks, compared with the start of Flask."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import queries
from tests.support.machine import slowness
from tests.support.server import ROOT

STORED = 100_000
ROUNDS = 10
LIMIT_MS = 150.0
"""The limit for a command, in addition to the start of Flask with an app that uses SQLAlchemy."""

APP = """
import os
from flask import Flask
from flask_asyncroute import AsyncRoute

if os.environ.get("WITH_SQLALCHEMY"):
    import sqlalchemy

app = Flask("many", instance_path={folder!r})
AsyncRoute(app)
"""


def shortest(app: Path, *words: str, environ: dict[str, str] | None = None) -> float:
    """Return the milliseconds of the fastest of several runs of ``flask``.

    The modules are compiled once, as when a package is installed.
    """
    variables = {
        **os.environ,
        "PYTHONPYCACHEPREFIX": str(app.parent / "compiled"),
        **(environ or {}),
    }
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    took = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "flask", "--app", str(app), *words], cwd=ROOT, env=variables,
            capture_output=True, check=True, timeout=60,
        )  # fmt: skip
        took.append((time.perf_counter() - began) * 1000)
        assert done.stdout
    return min(took)


def test_list_and_show_with_many_tasks(figures: Callable[[str], None], tmp_path: Path) -> None:
    slower = slowness()
    with queries.filled(STORED) as filled:
        app = tmp_path / "many_app.py"
        app.write_text(APP.format(folder=str(filled.folder)), "utf-8")
        listed = subprocess.run(
            [sys.executable, "-m", "flask", "--app", str(app), "asyncroute", "list"], cwd=ROOT,
            stdout=subprocess.PIPE, check=True, timeout=60,
        )  # fmt: skip
        assert len(listed.stdout.splitlines()) == 51
        task_id = listed.stdout.splitlines()[1].split()[0].decode()
        start = shortest(app, "routes")
        with_sql = shortest(app, "routes", environ={"WITH_SQLALCHEMY": "1"})
        commands = {
            "list": ["list"], "list State=Failed": ["list", "State=Failed"], "show": ["show", task_id]
        }  # fmt: skip
        took = {name: shortest(app, "asyncroute", *words) for name, words in commands.items()}
    parts = ", ".join(
        f"{name} {ms:.0f} ms (+{ms - start:.0f}, +{ms - with_sql:.0f}, {ms / start:.2f} times)"
        for name, ms in took.items()
    )
    figures(
        f"{STORED:,} tasks; flask routes {start:.0f} ms, with SQLAlchemy imported {with_sql:.0f} ms; "
        f"{parts}; limit +{LIMIT_MS * slower:.0f}"
    )
    late = {name: ms for name, ms in took.items() if ms - with_sql > LIMIT_MS * slower}
    assert not late
