"""Fixtures of the stress tests. ``--share`` scales counts; figures go to the summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.databases import new_postgresql_database

FIGURES = pytest.StashKey[dict[str, str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/stress/" in item.nodeid:
            item.add_marker(pytest.mark.stress)


@pytest.fixture
def share(request: pytest.FixtureRequest) -> float:
    """Return the share of each count to run: over 0, at most 1."""
    return float(request.config.getoption("share"))


@pytest.fixture
def scaled(share: float) -> Callable[..., int]:
    """Return ``scaled(count, least=1)``, which returns the share of a count, but at least
    ``least``.
    """

    def scale(count: int, least: int = 1) -> int:
        return max(round(count * share), least)

    return scale


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return ``figures(text)``, which prints what a test has measured in the terminal summary."""

    def keep(text: str) -> None:
        request.config.stash.setdefault(FIGURES, {})[request.node.nodeid] = text

    return keep


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the URL of a new store of each kind that several processes can share."""
    if request.param == "sqlite":
        yield "sqlite:///asyncroute.db"
    else:
        with new_postgresql_database(request.getfixturevalue("postgresql_server")) as url:
            yield url


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for nodeid, text in config.stash.get(FIGURES, {}).items():
        terminalreporter.write_line(f"{nodeid.removeprefix('tests/stress/')}: {text}")
