"""An app in the script that was started, ``__main__``: children import it under another name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os
import sys

from flask import Flask
from flask_asyncroute import AsyncRoute

app = Flask(__name__)
async_routes = AsyncRoute(app)


@app.post("/work")
@async_routes.task(executor="process")
def work():
    assert "FLASK_RUN_FROM_CLI" not in os.environ
    return [__name__, os.getpid()]


if __name__ == "__main__":
    client = app.test_client()
    task = client.post("/work").get_json()
    with app.app_context():
        name, pid = async_routes.wait(task["Id"], 30).result
    print(name, pid != os.getpid())
    sys.exit()

app.run(port=1)
"""


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("command", [("script_app.py",), ("-m", "script_app")])
def test_a_child_imports_the_script(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "script_app.py").write_text(SCRIPT, "utf-8")
    done = run(tmp_path, *command)
    assert done.stdout.splitlines()[-1:] == ["script_app True"], done.stderr


def test_a_script_whose_name_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    (tmp_path / "script-app.py").write_text(SCRIPT, "utf-8")
    done = run(tmp_path, "script-app.py")
    assert done.returncode != 0
    assert "ASYNCROUTE_APP" in done.stderr


def test_an_app_with_another_name_in_the_script(tmp_path: Path) -> None:
    script = SCRIPT.replace("app = Flask(__name__)", "app = None\nadmin = Flask(__name__)")
    script = script.replace("AsyncRoute(app)", "AsyncRoute(admin)").replace("@app.", "@admin.")
    script = script.replace("= app.test", "= admin.test").replace("with app.", "with admin.")
    script = script.replace("app.run(port=1)", "admin.run(port=1)").replace(
        "async_routes =", 'admin.config["ASYNCROUTE_APP"] = "__main__:admin"\nasync_routes ='
    )
    (tmp_path / "script_app.py").write_text(script, "utf-8")
    done = run(tmp_path, "script_app.py")
    assert done.stdout.splitlines()[-1:] == ["script_app True"], done.stderr


def test_a_script_that_a_debugger_runs_is_refused_or_works(tmp_path: Path) -> None:
    """pdb replaces ``__main__``, and older versions leave out its attributes."""
    (tmp_path / "script_app.py").write_text(SCRIPT, "utf-8")
    done = run(tmp_path, "-m", "pdb", "-c", "continue", "-c", "quit", "script_app.py")
    assert "script_app True" in done.stdout or "Set ASYNCROUTE_APP" in done.stdout + done.stderr


def test_a_script_whose_name_another_module_has_is_refused(tmp_path: Path) -> None:
    script = SCRIPT.replace(
        "import sys\n", "import sys\nsys.modules['script_app'] = sys.modules['__main__']\n", 1
    )
    (tmp_path / "script_app.py").write_text(script, "utf-8")
    done = run(tmp_path, "script_app.py")
    assert "ConfigurationError" in done.stderr and "ASYNCROUTE_APP" in done.stderr
