"""Content negotiation, and the headers of every response."""

from __future__ import annotations

import json
import time
from xml.etree import ElementTree

import msgspec
import pytest
import yaml
from flask import Flask, request, session
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute.encoding import MEDIA_TYPES
from flask_asyncroute.errors import NotAcceptable
from flask_asyncroute.http import responses
from flask_asyncroute.http.responses import ALIASES, negotiate, render

JSON, XML, YAML = MEDIA_TYPES
CHROME = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


class TestNegotiate:
    @pytest.mark.parametrize(
        ("accept", "expected"),
        [
            (None, JSON),
            ("", JSON),
            (" ", JSON),
            (" , ,", JSON),
            ("*/*", JSON),
            ("*", JSON),
            ("application/*", JSON),
            (JSON, JSON),
            (XML, XML),
            (YAML, YAML),
            ("APPLICATION/XML", XML),
            ("text/xml", XML),
            ("text/yaml", YAML),
            ("application/x-yaml", YAML),
            ("text/x-yaml", YAML),
            ("application/xml, application/json", JSON),
            ("application/xml;q=0.9, application/json;q=0.8", XML),
            ("application/json;q=0.1, application/yaml;q=0.2, */*;q=0.05", YAML),
            ("application/json;q=0, */*", XML),
            ("application/json;q=0, application/xml;q=0.0, */*;q=0.1", YAML),
            ("application/xml;q=0.5, application/*;q=0.8, */*", JSON),
            ("*/*, application/yaml", YAML),
            ("application/*;q=0.4, */*;q=0.9", JSON),
            ("text/xml;q=0, application/xml", XML),
            ("text/xml, application/xml;q=0.1, application/json;q=0.5", JSON),
            ("text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", JSON),
            ("application/json;version=2;q=0.3, application/xml;q=0.2", JSON),
            ('application/x;a="b,c;q=1", application/yaml;charset=utf-8', YAML),
            ("application/json;q=nonsense, application/yaml;q=0.1", YAML),
            ("application/json;q=2, application/yaml;q=0.1", YAML),
            ("application/json ; q=0.1 ,application/xml ;q=0.2", XML),
            ("application/json;q=0.1, application/json;q=0.9, application/xml;q=0.5", JSON),
            (CHROME, JSON),
        ],
    )
    def test_the_preferred_media_type_is_chosen(self, accept, expected):
        assert negotiate(accept, MEDIA_TYPES) == expected

    @pytest.mark.parametrize(
        "accept",
        [
            "text/*",
            "application/json;q=0",
            "application/*;q=0",
            "*/*;q=0",
            "json",
            "application/jsonx",
            "application/problem+json",
            "text/json",
        ],
    )
    def test_a_header_that_matches_nothing_is_refused(self, accept):
        with pytest.raises(
            NotAcceptable, match="application/json, application/xml, application/yaml"
        ) as caught:
            negotiate(accept, MEDIA_TYPES)
        assert accept in caught.value.detail

    def test_the_first_offered_type_is_the_default(self):
        offered = [YAML, JSON]
        assert negotiate(None, offered) == YAML
        assert negotiate("*/*;q=0.1", offered) == YAML
        assert negotiate("application/json, */*;q=0.5", offered) == JSON
        with pytest.raises(NotAcceptable, match="use one of: application/yaml, application/json"):
            negotiate(XML, offered)

    def test_the_detail_of_a_refused_header_is_cut_and_escaped(self):
        with pytest.raises(NotAcceptable) as caught:
            negotiate("text/\x1b" + "x" * 9000, MEDIA_TYPES)
        assert "\x1b" not in caught.value.detail
        assert len(caught.value.detail) < 250

    def test_long_headers_are_parsed_but_not_cached(self):
        responses._chosen.cache_clear()
        long = ", ".join(f"text/t{number}" for number in range(5000))
        begun = time.monotonic()
        assert negotiate(f"{long}, application/yaml;q=0.1", MEDIA_TYPES) == YAML
        assert negotiate(
            'text/x;a="' * 6000 + ",application/yaml", (JSON, XML, YAML, "application/problem+json")
        )
        assert time.monotonic() - begun < 2
        assert responses._chosen.cache_info().currsize == 0
        for number in range(1000):
            negotiate(f"text/t{number}, application/json;q=0.5", MEDIA_TYPES)
        assert responses._chosen.cache_info().currsize == 256

    def test_every_media_type_has_aliases(self):
        assert set(MEDIA_TYPES) <= set(ALIASES)

    @given(
        st.text('atex/*;,=q0.1" -jsonplicmuy', max_size=60) | st.text(st.characters(), max_size=30)
    )
    def test_any_header_is_accepted_or_refused(self, accept):
        try:
            assert negotiate(accept, MEDIA_TYPES) in MEDIA_TYPES
        except NotAcceptable:
            pass


DOCUMENT = {"Id": "é1", "Result": {"n": 1}}


@pytest.fixture
def client():
    app = Flask(__name__)
    app.secret_key = "test"

    @app.get("/task/<media>")
    def task(media):
        answer = render(
            DOCUMENT,
            negotiate(request.headers.get("Accept"), MEDIA_TYPES),
            "AsyncRouteTask",
            202,
            [("Location", "/task/é1"), ("Retry-After", "1"), ("Link", "<a>"), ("Link", "<b>")],
        )
        if media == "session":
            session["seen"] = True
        return answer

    return app.test_client()


class TestRender:
    @pytest.mark.covers("A65")
    @pytest.mark.parametrize(
        ("media_type", "content_type"),
        [
            (JSON, "application/json"),
            (XML, "application/xml; charset=utf-8"),
            (YAML, "application/yaml; charset=utf-8"),
        ],
    )
    def test_headers_of_every_response(self, client, media_type, content_type):
        answer = client.get("/task/1", headers={"Accept": media_type})
        assert answer.status == "202 ACCEPTED"
        assert answer.headers.getlist("Content-Type") == [content_type]
        assert answer.headers.getlist("Content-Length") == [str(len(answer.data))]
        assert answer.headers.getlist("Cache-Control") == ["no-store"]
        assert answer.headers.getlist("Vary") == ["Accept, Authorization, Cookie"]
        assert answer.headers.getlist("Link") == ["<a>", "<b>"]
        assert answer.headers["Location"] == "/task/%C3%A91"

    def test_the_document_in_each_type(self, client):
        assert json.loads(client.get("/task/1").data) == DOCUMENT
        assert yaml.safe_load(client.get("/task/1", headers={"Accept": YAML}).data) == DOCUMENT
        root = ElementTree.fromstring(client.get("/task/1", headers={"Accept": XML}).data)
        assert root.tag == "AsyncRouteTask"
        assert root.findtext("Result/n") == "1"

    def test_a_session_does_not_duplicate_headers(self, client):
        answer = client.get("/task/session")
        assert "Set-Cookie" in answer.headers
        assert answer.headers.getlist("Vary") == ["Accept, Authorization, Cookie"]

    @pytest.mark.parametrize("status", [200, 202, 404])
    def test_changes_by_after_request_are_sent(self, status):
        """For example, a hook that compresses the response or redirects the client."""
        app = Flask(__name__)
        app.add_url_rule("/", view_func=lambda: render(DOCUMENT, JSON, "AsyncRouteTask", status))

        @app.after_request
        def change(answer):
            answer.response = [b"{}"]
            del answer.headers["Content-Length"]
            answer.headers["content-location"] = "/é/"
            answer.location = "/a b"
            return answer

        answer = app.test_client().get("/")
        assert answer.headers["Content-Length"] == "2"
        assert answer.headers.getlist("Content-Location") == ["/%C3%A9/"]
        assert answer.headers.getlist("Location") == ["/a%20b"]

    def test_a_head_response_has_content_length_and_no_body(self, client):
        answer = client.head("/task/1")
        assert answer.data == b""
        assert answer.headers["Content-Length"] == str(len(client.get("/task/1").data))

    def test_bytes_are_rendered_as_a_json_document(self):
        body = b'{"a": [1, 18446744073709551616, null]}'
        assert render(body, JSON, "Result", 200).data == body + b"\n"
        value = json.loads(body)
        assert yaml.safe_load(render(body, YAML, "Result", 200).data) == value
        assert (
            b'<item type="number">18446744073709551616</item>'
            in render(body, XML, "Result", 200).data
        )

    def test_raw_json_is_rendered(self):
        assert (
            render({"Result": msgspec.Raw(b"[1]")}, JSON, "AsyncRouteTask", 200).data
            == b'{"Result":[1]}\n'
        )

    def test_a_line_break_in_a_header_is_refused(self):
        with pytest.raises(ValueError, match="newline"):
            render({}, JSON, "AsyncRouteTask", 200, [("Location", "/a\r\nSet-Cookie: x")])

    def test_204_and_304_responses_have_no_body(self):
        app = Flask(__name__)
        app.add_url_rule(
            "/<int:status>", view_func=lambda status: render({}, JSON, "AsyncRouteTask", status)
        )
        for status in (204, 304):
            answer = app.test_client().get(f"/{status}")
            assert answer.status_code == status
            assert answer.data == b""
            assert answer.headers["Cache-Control"] == "no-store"
