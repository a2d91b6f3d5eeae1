"""Apps with the package and an extension by another author, on a store in an SQLite file."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from flask import Flask

from flask_asyncroute import AsyncRoute
from tests.support.flow import Flow


@pytest.fixture
def make_flow(make_app: Callable[..., Flask]) -> Callable[..., Flow]:
    """Return ``make_flow(decorators=(), **config)``, which creates an app with the package."""

    def make(decorators: Any = (), **config: Any) -> Flow:
        app = make_app(**config)
        return Flow(app, AsyncRoute(app, decorators=decorators))

    return make


@pytest.fixture
def flow(make_flow: Callable[..., Flow]) -> Flow:
    """Return an app with the package and the default configuration."""
    return make_flow()


@pytest.fixture
def begun() -> threading.Semaphore:
    """Return a semaphore that views release and tests acquire."""
    return threading.Semaphore(0)


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return a function that returns the package's warnings and errors so far."""
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.name == "flask_asyncroute" and record.levelname != "INFO"
    ]


@pytest.fixture
def translations(tmp_path: Path) -> Path:
    """Return a folder with German translations."""
    folder = tmp_path / "translations" / "de" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    catalog = Catalog(locale="de")
    catalog.add("Report", "Bericht")
    catalog.add("No such report", "Kein solcher Bericht")
    with (folder / "messages.mo").open("wb") as file:
        write_mo(file, catalog)
    return folder.parents[1]
