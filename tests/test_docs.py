"""What is public is described: every name, option, key, signal, error, endpoint and `make` target stands in the reference.

A page of ``docs/reference/`` or the README has to name it; whether it does so well is for people to see. And the Python
in all pages runs.
"""

from __future__ import annotations

import importlib
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^( *)\.\. code-block:: python\n(?:\1 +:.*\n)*\n((?:\1 +\S.*\n|[ \t]*\n)+)", re.MULTILINE)
NOT_OURS = ("flask_executor", "flask_login", "flask_wtf", "sseclient")
"""What blocks import to show how it goes together; they run where it is installed."""


def part(name: str) -> Any:
    """Return a module of the package; inside a test, so that one that cannot be imported fails that test alone."""
    return importlib.import_module(f"flask_asyncroute{name}")


def pages(*places: str) -> str:
    found = [path for place in places for path in sorted(ROOT.glob(place))]
    return "\n".join(path.read_text("utf-8") for path in found)


def missing(names: Iterable[str], text: str) -> list[str]:
    """Return those of ``names`` that do not stand in ``text`` as a word of their own."""
    names = sorted(set(names))
    assert names, "nothing to look for"
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
    assert missing((signal.name.replace("-", "_") for signal in part(".signals").FACTS), reference()) == []


def test_errors() -> None:
    refused = part(".errors").RequestRefused
    assert missing((kind.slug for kind in kinds_of(refused)), reference()) == []


def test_endpoints() -> None:
    app = Flask(__name__)
    app.config["ASYNCROUTE_STORE"] = "memory://"
    blueprint = part("").AsyncRoute(app).blueprint
    endpoints = [rule.endpoint for rule in app.url_map.iter_rules() if rule.endpoint.startswith(f"{blueprint.name}.")]
    assert missing(endpoints, reference()) == []


def test_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = re.findall(r"^(\w+):.*##", makefile, re.MULTILINE)
    assert missing((f"make {target}" for target in targets), pages("docs/**/*.rst", "README.rst")) == []


def test_options() -> None:
    options = part(".options")
    assert missing({*options.DEFAULTED, *options.OWN}, pages("docs/reference/python.rst")) == []


def test_fields() -> None:
    assert missing(part(".query.fields").FIELDS, pages("docs/reference/http.rst")) == []
    assert missing(part(".query.fields").Operator, pages("docs/reference/http.rst")) == []


def test_fields_of_the_task() -> None:
    task = part(".task").AsyncRouteTask(
        "id", "[Post]/", "view", part("").State.ABORTED, True, "ann", "http://localhost/", "POST", 1, 2, 3, 4,
        progress=1.0, progress_message="half", result_json=b"1", error="Timeout", stopping=True, sse_group="view",
        sse_url="/task/id/events",
    )  # fmt: skip
    assert missing(task.to_dict(), pages("docs/reference/task.rst")) == []


def test_log_messages() -> None:
    source = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "flask_asyncroute").rglob("*.py")))
    messages = re.findall(r"""logger\.(?:info|warning|error|exception)\(\s*"([^"]+)""", source)
    page = re.sub(r"\s+", " ", pages("docs/howto/deployment.rst"))
    told = [re.split(r"%[sr]", message)[0].split(",")[0].rstrip(" .:(;") for message in messages]
    assert len(told) >= 10
    assert [message for message in told if message not in page] == []


def blocks() -> Iterator[Any]:
    """Yield each Python block of the pages, and the first line of it in its page."""
    for place in ("README.rst", "docs/**/*.rst"):
        for path in sorted(ROOT.glob(place)):
            text = path.read_text("utf-8")
            for found in BLOCK.finditer(text):
                line = text.count("\n", 0, found.start(2)) + 1
                name = f"{path.relative_to(ROOT)}:{line}"
                yield pytest.param("\n" * (line - 1) + textwrap.dedent(found[2]), name, id=name)


def test_blocks_are_found() -> None:
    written = pages("README.rst", "docs/**/*.rst").count(".. code-block:: python\n")
    assert len(list(blocks())) == written >= 20


@pytest.mark.parametrize(("source", "name"), list(blocks()))
def test_python_in_the_pages_runs(source: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile(source, name, "exec")
    if not re.search(r"^(import|from) ", source, re.MULTILINE):
        return  # a part of something, shown for itself
    for module in NOT_OURS:
        if re.search(rf"^(import|from) {module}\b", source, re.MULTILINE):
            pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "documented"}
    try:
        exec(code, names)
    finally:
        apps = [value for value in names.values() if isinstance(value, Flask) and "asyncroute" in value.extensions]
        for app in apps:
            runtime = part(".runtime").runtime_of(app)
            runtime.prepare()
            runtime.close()
            for signal in part(".signals").FACTS:
                for receiver in list(signal.receivers_for(app)):
                    signal.disconnect(receiver)
