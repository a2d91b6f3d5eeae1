"""How long the commands take with very many tasks, compared with the start of Flask."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import queries
from tests.support.machine import slowness
from tests.support.programs import ROOT

STORED = 100_000
ROUNDS = 10
LIMIT_MS = 150.0
"""The limit for a command, in addition to ``flask routes`` of an app that imports SQLAlchemy.

The import takes about as long as this limit, and ``flask routes`` alone does not need it. The figures
also show the difference from ``flask routes`` without the import.
"""
APP = """
import os
from flask import Flask
from flask_asyncroute import AsyncRoute

if os.environ.get("WITH_SQLALCHEMY"):
    import sqlalchemy

app = Flask("many", instance_path={folder!r})
AsyncRoute(app)
"""


def measure(app: Path, words: list[str], environ: dict[str, str]) -> float:
    """Run ``flask`` once; return its processor time in milliseconds.

    Unlike the elapsed time, it hardly depends on other processes. The modules are compiled once, as
    when a package is installed.
    """
    compiled = {"PYTHONPYCACHEPREFIX": str(app.parent / "compiled")}
    variables = {**os.environ, **compiled, **environ}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "flask", "--app", str(app), *words], cwd=ROOT, env=variables,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return (usage.ru_utime + usage.ru_stime) * 1000


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
        commands: dict[str, tuple[list[str], dict[str, str]]] = {
            "start": (["routes"], {}),
            "start with SQLAlchemy": (["routes"], {"WITH_SQLALCHEMY": "1"}),
            "list": (["asyncroute", "list"], {}),
            "list State=Failed": (["asyncroute", "list", "State=Failed"], {}),
            "show": (["asyncroute", "show", task_id], {}),
        }
        took = dict.fromkeys(commands, float("inf"))
        for _ in range(ROUNDS):  # one after the other, so that a slow phase affects all of them
            for name, (words, environ) in commands.items():
                took[name] = min(took[name], measure(app, words, environ))
    start, with_sql = took.pop("start"), took.pop("start with SQLAlchemy")
    assert start < with_sql, "the machine is too busy to measure"
    parts = ", ".join(
        f"{name} {ms:.0f} ms ({ms - start:+.0f}, {ms - with_sql:+.0f}, {ms / start:.2f} times)"
        for name, ms in took.items()
    )
    figures(
        f"{STORED:,} tasks, processor time: flask routes {start:.0f} ms, with SQLAlchemy "
        f"{with_sql:.0f} ms; {parts}; limit {LIMIT_MS * slower:+.0f} to the second"
    )
    late = {name: ms for name, ms in took.items() if ms - with_sql > LIMIT_MS * slower}
    assert not late
