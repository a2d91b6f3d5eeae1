"""Flask-Babel: a task has the locale of its request, and lazy strings are translated in it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from flask import abort, g, request, session
from flask_babel import Babel, force_locale, format_datetime, get_locale, gettext, lazy_gettext

from tests.support.flow import Flow

GERMAN = {"Accept-Language": "de"}


@pytest.fixture
def make_babel(make_flow: Callable[..., Flow], translations: Path) -> Callable[..., Flow]:
    """Return ``make_babel(locale, **config)``, an app with the locale ``locale()``."""

    def make(
        locale: Callable[[], Any] = lambda: request.accept_languages.best_match(["en", "de"]),
        **config: Any,
    ) -> Flow:
        flow = make_flow(BABEL_TRANSLATION_DIRECTORIES=str(translations), **config)
        Babel(flow.app, locale_selector=locale, timezone_selector=lambda: "Europe/Berlin")
        return flow

    return make


def test_the_locale_and_time_zone_of_the_request(make_babel: Callable[..., Flow]) -> None:
    flow = make_babel()

    @flow.route()
    def work() -> Any:
        at_noon = datetime(2031, 7, 1, 12)
        return [str(get_locale()), gettext("Report"), format_datetime(at_noon, "d. MMM HH:mm")]

    assert flow.result(headers=GERMAN) == ["de", "Bericht", "1. Juli 14:00"]
    assert flow.result() == ["en", "Report", "1. Jul 14:00"]


def test_the_locale_in_the_session(make_babel: Callable[..., Flow]) -> None:
    flow = make_babel(lambda: session.get("locale", "en"))

    @flow.app.get("/german")
    def german() -> str:
        session["locale"] = "de"
        return ""

    @flow.route()
    def work() -> Any:
        return gettext("Report")

    flow.client.get("/german")
    assert flow.result() == "Bericht"


@pytest.mark.parametrize("has_before_task", [True, False])
def test_a_locale_that_before_request_keeps_in_g(
    make_babel: Callable[..., Flow], has_before_task: bool
) -> None:
    """``g`` is fresh in a task: a before_task function has to set it as well."""
    flow = make_babel(lambda: g.locale)

    def set_locale() -> None:
        g.locale = request.args["locale"]

    flow.app.before_request(lambda: set_locale() if request.endpoint == "work" else None)
    if has_before_task:
        flow.async_routes.before_task(set_locale)

    @flow.route()
    def work() -> Any:
        return gettext("Report")

    if has_before_task:
        assert flow.result("/work?locale=de") == "Bericht"
    else:
        assert flow.error("/work?locale=de").startswith("AttributeError: g.locale is not set")


def test_a_forced_locale(make_babel: Callable[..., Flow]) -> None:
    flow = make_babel()

    @flow.route()
    def work() -> Any:
        with force_locale("de"):
            inside = gettext("Report")
        return [inside, gettext("Report")]

    assert flow.result() == ["Bericht", "Report"]


REPORT = lazy_gettext("Report")


def test_lazy_strings_are_translated_at_the_end_of_the_task(
    make_babel: Callable[..., Flow],
) -> None:
    flow = make_babel()

    @flow.route("/text")
    def text() -> Any:
        return {"Title": str(REPORT)}

    @flow.route("/lazy")
    def lazy() -> Any:
        return {"Title": REPORT}

    assert flow.result("/text", headers=GERMAN) == {"Title": "Bericht"}
    assert flow.result("/lazy", headers=GERMAN) == {"Title": "Bericht"}


def test_messages_of_errors_are_in_the_locale_of_the_request(
    make_babel: Callable[..., Flow],
) -> None:
    flow = make_babel()

    @flow.route("/abort")
    def aborting() -> None:
        abort(404, lazy_gettext("No such report"))

    @flow.route("/raise")
    def raising() -> None:
        raise LookupError(lazy_gettext("No such report"))

    assert flow.error("/raise", headers=GERMAN) == "LookupError: Kein solcher Bericht"
    assert flow.error("/abort", headers=GERMAN) == "404 Not Found: Kein solcher Bericht"
