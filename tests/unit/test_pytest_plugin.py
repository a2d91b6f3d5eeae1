"""The fixtures for pytest, in a project of their own."""

from __future__ import annotations

import configparser
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import flask_asyncroute_pytest

ROOT = Path(__file__).parents[2]

PROJECT = """
import pytest
from flask import Flask
from flask_asyncroute import AsyncRoute, Callback, current_task
from flask_asyncroute.testing import close, wait_task

async_routes = AsyncRoute()


@pytest.fixture
def app(tmp_path):
    app = Flask(__name__)
    app.config.update(TESTING=True, ASYNCROUTE_STORE=f"sqlite:///{tmp_path}/tasks.db")

    @async_routes.route("/double/<int:number>", methods=["POST"], timeout=60, callback=Callback())
    def double(number):
        current_task.set_progress(50)
        return 2 * number

    async_routes.init_app(app)
    yield app
    close(app)


@pytest.fixture
def client(app):
    return app.test_client()


"""


@pytest.fixture
def passes(pytester: pytest.Pytester) -> Callable[..., pytest.RunResult]:
    """Return ``passes(test, *options)``, which runs a test of `PROJECT` and checks that it passes."""

    def run(test: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile(PROJECT + test)
        found = pytester.runpytest_subprocess(
            "-p", "flask_asyncroute_pytest", "-p", "no:cacheprovider", "-W", "error", *options
        )
        found.assert_outcomes(passed=1)
        return found

    return run


TESTS = {
    "inline": """
def test_inline(asyncroute_inline, client):
    response = client.post("/double/21")
    assert (response.json["State"], response.json["Result"]) == ("Completed", 42)
""",
    "clock": """
def test_clock(asyncroute_clock, client):
    response = client.post("/double/1")
    assert wait_task(client, response)["Result"] == 2
    asyncroute_clock.advance(86_400 + 1)
    assert client.get(response.headers["Location"]).status_code == 404
""",
    "callbacks": """
def test_callbacks(client, asyncroute_callbacks):
    response = client.post("/double/1", json={"callbackUrl": asyncroute_callbacks.url})
    call, = asyncroute_callbacks.wait()
    assert call.data["Id"] == response.json["Id"]
""",
    "task": """
def test_task(app, asyncroute_task):
    assert app.view_functions["double"](21) == 42
    assert asyncroute_task.progress == 50
""",
}


@pytest.mark.parametrize("name", TESTS)
def test_each_fixture_works(passes: Callable[..., pytest.RunResult], name: str) -> None:
    assert passes(TESTS[name]).ret == 0


def test_the_plugin_imports_neither_flask_nor_the_package() -> None:
    code = (
        "import sys, flask_asyncroute_pytest\n"
        "assert not {'flask', 'flask_asyncroute', 'sqlalchemy'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_entry_point_names_the_plugin() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", "utf-8")
    name = flask_asyncroute_pytest.__name__
    # With another name, `pytest_plugins` and the entry point would load the module twice.
    assert parser["options.entry_points"]["pytest11"].split() == [name, "=", name]
    assert parser["options"]["py_modules"].split() == [name]


def test_the_names_of_the_fixtures_have_a_prefix() -> None:
    fixtures = [
        name
        for name, value in vars(flask_asyncroute_pytest).items()
        if isinstance(value, type(flask_asyncroute_pytest.asyncroute_clock))
    ]
    assert sorted(fixtures) == [f"asyncroute_{name}" for name in sorted(TESTS)]
    page = (ROOT / "docs" / "reference" / "python.rst").read_text("utf-8")
    assert [name for name in fixtures if f"``{name}``" not in page] == []
