"""The reference names every public name, option, key, signal, error, endpoint and `make` target.

Each must occur in a page of ``docs/reference/`` or in the README. The Python blocks of all pages
are run, and the test functions in them.
"""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r"^( *)\.\. code-block:: python\n(?:\1 +:.*\n)*\n((?:\1 +\S.*\n|[ \t]*\n)+)", re.MULTILINE
)
NOT_OURS = (
    "apiflask", "celery", "flask_babel", "flask_caching", "flask_cors", "flask_executor", "flask_httpauth",
    "flask_jwt_extended", "flask_limiter", "flask_login", "flask_restx", "flask_smorest",
    "flask_wtf", "opentelemetry", "rich", "sentry_sdk", "sseclient",
    "tqdm",
)  # fmt: skip
"""Other packages that blocks import. These blocks run if the package is installed."""


def part(name: str) -> Any:
    """Return a module of the package. Called in a test, so that an import error fails only that
    test.
    """
    return importlib.import_module(f"flask_asyncroute{name}")


def pages(*patterns: str) -> str:
    found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return "\n".join(path.read_text("utf-8") for path in found)


def missing(names: Iterable[str], text: str) -> list[str]:
    """Return those of ``names`` that do not occur in ``text`` as whole words."""
    names = sorted(set(names))
    assert names, "no names to look for"
    return [name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)]


def reference() -> str:
    return pages("docs/reference/**/*.rst", "README.rst")


def kinds_of(error: type[Any]) -> Iterator[type[Any]]:
    yield error
    for kind in error.__subclasses__():
        if kind.__module__.startswith("flask_asyncroute."):
            yield from kinds_of(kind)


def test_public_names() -> None:
    assert missing(part("").__all__, reference()) == []


def test_configuration_keys() -> None:
    config = part(".config")
    assert missing((config.PREFIX + key for key in config.KEYS), reference()) == []


def test_signals() -> None:
    assert (
        missing(
            (signal.name.replace("-", "_") for signal in part(".signals").PUBLIC_SIGNALS),
            reference(),
        )
        == []
    )


def test_errors_that_are_named_can_be_imported_from_the_package() -> None:
    package = part("")
    named = re.findall(r"\b[A-Z][A-Za-z]+\b", pages("docs/**/*.rst", "README.rst"))
    for value in map(package.__dict__.get, package.__all__):
        for member in (value, *vars(value).values()) if isinstance(value, type) else (value,):
            named += re.findall(r":raises (\w+):", getattr(member, "__doc__", None) or "")
    errors = {kind.__name__ for kind in kinds_of(package.AsyncRouteError)} | {"TaskAborted"}
    found = errors & set(named)
    assert len(found) >= 10
    assert found - set(package.__all__) == set()


def test_errors() -> None:
    refused = part(".errors").RequestRefused
    assert missing((kind.slug for kind in kinds_of(refused)), reference()) == []


def test_endpoints() -> None:
    app = Flask(__name__)
    app.config["ASYNCROUTE_STORE"] = "memory://"
    blueprint = part("").AsyncRoute(app).blueprint
    endpoints = [
        rule.endpoint
        for rule in app.url_map.iter_rules()
        if rule.endpoint.startswith(f"{blueprint.name}.")
    ]
    assert missing(endpoints, reference()) == []


def test_commands() -> None:
    page = pages("docs/reference/command-line.rst")
    commands = part(".cli").group.commands
    assert [name for name in commands if f"\n{name}\n{'-' * len(name)}\n" not in page] == []
    assert [name for name in commands if f".. command-help:: {name}\n" not in page] == []


def test_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = re.findall(r"^([\w-]+):.*##", makefile, re.MULTILINE)
    assert (
        missing((f"make {target}" for target in targets), pages("docs/**/*.rst", "README.rst"))
        == []
    )


def test_options() -> None:
    options = part(".options")
    assert missing({*options.DEFAULTED, *options.OWN}, pages("docs/reference/python.rst")) == []


def test_fields() -> None:
    assert missing(part(".query.model").FIELDS, pages("docs/reference/http.rst")) == []
    assert missing(part(".query.model").Operator, pages("docs/reference/http.rst")) == []


def test_fields_of_the_task() -> None:
    task = part(".task").AsyncRouteTask(
        "id", "[Post]/", "view", part("").State.ABORTED, True, "ann", "http://localhost/", "POST", 1, 2, 3, 4,
        progress=1.0, progress_message="half", result_json=b"1", error="Timeout", stopping=True, sse_group="view",
        sse_url="/task/id/events",
    )  # fmt: skip
    assert missing(task.to_dict(), pages("docs/reference/task.rst")) == []


def test_log_messages() -> None:
    source = "\n".join(
        path.read_text("utf-8") for path in sorted((ROOT / "flask_asyncroute").rglob("*.py"))
    )
    messages = re.findall(r"""logger\.(?:info|warning|error|exception)\(\s*"([^"]+)""", source)
    page = re.sub(r"\s+", " ", pages("docs/reference/log-messages.rst"))
    beginnings = [
        re.split(r"%[\d.]*[a-z]", message)[0].split(",")[0].rstrip(" .:(;") for message in messages
    ]
    assert len(beginnings) >= 10
    assert [message for message in beginnings if message not in page] == []


def blocks() -> Iterator[Any]:
    """Yield each Python block of the pages, with its page and first line."""
    for pattern in ("README.rst", "docs/**/*.rst"):
        for path in sorted(ROOT.glob(pattern)):
            text = path.read_text("utf-8")
            for found in BLOCK.finditer(text):
                line = text.count("\n", 0, found.start(2)) + 1
                name = f"{path.relative_to(ROOT)}:{line}"
                yield pytest.param("\n" * (line - 1) + textwrap.dedent(found[2]), name, id=name)


def test_blocks_are_found() -> None:
    written = pages("README.rst", "docs/**/*.rst").count(".. code-block:: python\n")
    assert len(list(blocks())) == written >= 20


@pytest.mark.parametrize(("source", "name"), list(blocks()))
def test_python_in_the_pages_runs(
    source: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = compile(source, name, "exec")
    if not re.search(r"^(import|from) ", source, re.MULTILINE):
        return  # an excerpt that does not run alone
    for module in NOT_OURS:
        if re.search(rf"^(import|from) {module}\b", source, re.MULTILINE):
            pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "documented"}
    try:
        exec(code, names)
        for value in list(names.values()):
            # A function with parameters needs pytest's fixtures.
            if inspect.isfunction(value) and value.__name__.startswith("test_"):
                if not inspect.signature(value).parameters:
                    value()
    finally:
        apps = [
            value
            for value in names.values()
            if isinstance(value, Flask) and "asyncroute" in value.extensions
        ]
        for app in apps:
            runtime = part(".runtime").runtime_of(app)
            runtime.prepare()
            runtime.close()
            for signal in part(".signals").PUBLIC_SIGNALS:
                for receiver in list(signal.receivers_for(app)):
                    signal.disconnect(receiver)
