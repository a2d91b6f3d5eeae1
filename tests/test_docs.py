"""What is public is described: every name, key, signal, error, endpoint and `make` target stands in the reference.

A page of ``docs/reference/`` or the README has to name it; whether it does so well is for people to see.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flask import Flask

ROOT = Path(__file__).parent.parent


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
