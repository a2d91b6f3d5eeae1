"""What real clients get: people in browsers a page, programs the format that they ask for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.flow import Flow

HTML = "text/html; charset=utf-8"
JSON = "application/json"
PROBLEM = "application/problem+json"
XML = "application/xml; charset=utf-8"

CHROME = (
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8,"
    "application/signed-exchange;v=b3;q=0.7"
)
BROWSERS = {
    "Chrome": CHROME,
    "Chrome 60": "text/html,application/xhtml+xml,application/xml;q=0.9,image/webp,image/apng,*/*;q=0.8",
    "Chrome 10": "application/xml,application/xhtml+xml,text/html;q=0.9,text/plain;q=0.8,image/png,*/*;q=0.5",
    "Edge": CHROME,
    "Edge 18": "text/html, application/xhtml+xml, application/xml; q=0.9, */*; q=0.8",
    "Firefox": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/png,"
               "image/svg+xml,*/*;q=0.8",
    "Firefox 128": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
    "Firefox 3": "text/xml,application/xml,application/xhtml+xml,text/html;q=0.9,text/plain;q=0.8,image/png,*/*;q=0.5",
    "Safari": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
    "Safari 4": "application/xml,application/xhtml+xml,text/html;q=0.9,text/plain;q=0.8,image/png,*/*;q=0.5",
    "Samsung Internet": CHROME,
    "Internet Explorer 11": "text/html, application/xhtml+xml, */*",
    "Opera 12": "text/html, application/xml;q=0.9, application/xhtml+xml, image/png, image/webp, image/jpeg, image/gif, "
                "image/x-xbitmap, */*;q=0.1",
    "Lynx": "text/html, text/plain, text/sgml, text/css, application/xhtml+xml, */*;q=0.01",
    "w3m": "text/html, text/*;q=0.5, image/*",
    "Turbo": "text/vnd.turbo-stream.html, text/html, application/xhtml+xml",
    "a page's own script": "text/html",
    "htmx 4": "text/html",
    "Mastodon's link preview": "text/html",
    "Miniflux, which looks for feeds in pages": "application/xml, application/atom+xml, application/rss+xml, "
                                                "application/rdf+xml, application/feed+json, text/html, */*;q=0.9",
    "jQuery load()": "text/html, */*; q=0.01",
    "Googlebot": "text/html,application/xhtml+xml,application/signed-exchange;v=b3,application/xml;q=0.9,*/*;q=0.8",
    "Bingbot": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
}  # fmt: skip
PROGRAMS: dict[str, tuple[str | None, str, str]] = {
    "curl": ("*/*", JSON, PROBLEM),
    "wget": ("*/*", JSON, PROBLEM),
    "requests": ("*/*", JSON, PROBLEM),
    "httpx": ("*/*", JSON, PROBLEM),
    "urllib": (None, JSON, PROBLEM),
    "Go": (None, JSON, PROBLEM),
    "PowerShell": (None, JSON, PROBLEM),
    "empty": ("", JSON, PROBLEM),
    "fetch": ("*/*", JSON, PROBLEM),
    "axios": ("application/json, text/plain, */*", JSON, PROBLEM),
    "Angular": ("application/json, text/plain, */*", JSON, PROBLEM),
    "jQuery getJSON()": ("application/json, text/javascript, */*; q=0.01", JSON, PROBLEM),
    "htmx 2": ("*/*", JSON, PROBLEM),
    "link previews of Slack, Twitter and Facebook": ("*/*", JSON, PROBLEM),
    "HTTPie": ("application/json, */*;q=0.5", JSON, PROBLEM),
    "Postman": ("*/*", JSON, PROBLEM),
    "Swagger UI": ("application/json", JSON, PROBLEM),
    "a Hydra client": ("application/json, text/html;q=0.5", JSON, PROBLEM),
    "Java": ("text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", JSON, PROBLEM),
    "Java 25": ("text/html, image/gif, image/jpeg, */*; q=0.2", JSON, PROBLEM),
    "RestTemplate": ("application/json, application/*+json", JSON, PROBLEM),
    "Jackson XML": ("application/xml, text/xml, application/json, application/*+xml, application/*+json", JSON,
                    PROBLEM),
    "an image element": ("image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8", JSON, PROBLEM),
    "Internet Explorer 8": ("image/gif, image/jpeg, image/pjpeg, application/x-ms-application, */*", JSON, PROBLEM),
    "feedparser": ("application/atom+xml,application/rdf+xml,application/rss+xml,application/x-netcdf,"
                   "application/xml;q=0.9,text/xml;q=0.2,*/*;q=0.1", XML, "application/problem+xml; charset=utf-8"),
    "SimplePie": ("application/atom+xml, application/rss+xml, application/rdf+xml;q=0.9, application/xml;q=0.8, "
                  "text/xml;q=0.8, text/html;q=0.7, unknown/unknown;q=0.1, application/unknown;q=0.1, */*;q=0.1",
                  XML, "application/problem+xml; charset=utf-8"),
    "NewsBlur": ("application/atom+xml, application/rss+xml, application/xml;q=0.8, text/xml;q=0.6, */*;q=0.2", XML,
                 "application/problem+xml; charset=utf-8"),
    "an XML client": ("application/xml", XML, "application/problem+xml; charset=utf-8"),
}  # fmt: skip


@pytest.fixture
def done(make_flow: Callable[..., Flow]) -> Flow:
    flow = make_flow()
    ids = iter(["done", "other", "third"])
    flow.route(
        endpoint="work",
        id_generator=lambda: next(ids),
        response_types=["application/json", "application/xml"],
    )(lambda: 1)
    flow.run()
    return flow


def headers_of(accept: str | None) -> dict[str, str]:
    return {} if accept is None else {"Accept": accept}


def test_forty_clients_are_tested() -> None:
    assert len(BROWSERS) + len(PROGRAMS) >= 40


@pytest.mark.parametrize("accept", BROWSERS.values(), ids=BROWSERS)
def test_a_browser_gets_pages_and_never_xml_or_a_download(done: Flow, accept: str) -> None:
    answers = {
        path: done.request("GET", path, headers={"Accept": accept})
        for path in ("/task/done", "/tasks", "/task/missing", "/task/missing/result", "/tasks?X=1")
    }
    assert {answer.content_type for answer in answers.values()} == {HTML}
    shown = [
        done.request("GET", "/task/done/result", headers={"Accept": accept}),
        done.request("POST", "/work", json={}, headers={"Accept": accept}),
    ]
    assert {answer.content_type for answer in shown} == {JSON}
    form = done.request("POST", "/work", data={"a": "b"}, headers={"Accept": accept})
    assert (form.status_code, form.location) == (303, "/task/third")


@pytest.mark.parametrize("accept", BROWSERS.values(), ids=BROWSERS)
def test_without_pages_a_browser_gets_json_that_it_displays(
    make_flow: Callable[..., Flow], accept: str
) -> None:
    flow = make_flow(ASYNCROUTE_PAGES=False)
    flow.route(
        endpoint="work",
        id_generator=lambda: "done",
        response_types=["application/xml", "application/json"],
    )(lambda: 1)
    headers = {"Accept": accept}
    answer = flow.request("POST", "/work", data={"a": "b"}, headers=headers)
    assert (answer.status_code, answer.content_type) == (202, JSON)
    flow.ended("done")
    for path in ("/task/done", "/task/done/result", "/tasks", "/task/missing", "/tasks?X=1"):
        assert flow.request("GET", path, headers=headers).content_type == JSON
    assert flow.request("POST", "/task/done/stop").status_code == 404
    assert flow.request("GET", "/task-pages/pages.css").status_code == 404


@pytest.mark.parametrize(("accept", "media_type", "problem_type"), PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_gets_the_format_that_it_asks_for(
    done: Flow, accept: str | None, media_type: str, problem_type: str
) -> None:
    headers = headers_of(accept)
    for path in ("/task/done", "/task/done/result", "/tasks"):
        assert done.request("GET", path, headers=headers).content_type == media_type
    assert done.request("GET", "/task/missing", headers=headers).content_type == problem_type
