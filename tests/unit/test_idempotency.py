"""Idempotency keys: valid headers, their scope, and fingerprints of requests."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask, Request
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute.errors import InvalidRequest
from flask_asyncroute.permissions import Caller
from flask_asyncroute.request.idempotency import fingerprint, key_name

SECRET = b"s" * 32
ANNA = Caller("anna", frozenset(), frozenset(), frozenset())
BEN = Caller("ben", frozenset(), frozenset(), frozenset())
URL = "http://localhost/work"
VISIBLE = "".join(map(chr, range(0x21, 0x7F)))
UNQUOTED = VISIBLE.replace('"', "").replace(",", "")

app = Flask(__name__)
app.add_url_rule("/work", "work", lambda: "", methods=["POST", "PUT"])
app.add_url_rule("/other", "other", lambda: "", methods=["POST"])


def requested(path: str = "/work", method: str = "POST", **environ: Any) -> Request:
    with app.test_request_context(path, method=method, environ_overrides=environ):
        from flask import request

        return request._get_current_object()  # type: ignore[attr-defined]


def named(
    key: str,
    caller: Caller | None = ANNA,
    path: str = "/work",
    secret: bytes = SECRET,
    **environ: str,
) -> str:
    return key_name(requested(path, HTTP_IDEMPOTENCY_KEY=key, **environ), caller, secret)


@pytest.mark.covers("A75")
@pytest.mark.parametrize(
    "key", ["a", "8e03978e-40d5-43de-bc93-6894a57f9324", "x" * 255, "a;b=c", 'a"b', "\\", "~!#"]
)
def test_a_key_is_the_same_with_and_without_quotes(key: str) -> None:
    quoted = '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'
    assert named(key) == named(quoted) == named(f"\t{quoted} ")
    assert len(named(key)) == 64
    assert key not in named(key) or len(key) == 1


@pytest.mark.covers("A75")
@pytest.mark.parametrize(
    "key",
    ["", " ", '""', '"', '"a', 'a b', '"a b"', "a,b", "a, a", '"a","a"', '"a", "a"', '"a";q=1', '"a"b', r'"a\b"', "\x7f", "\x80",
     "é", "a\x00", "x" * 256, '"' + "x" * 256 + '"', "a\nb", "a\n"],
)  # fmt: skip
def test_an_invalid_key_or_two_keys_are_refused(key: str) -> None:
    with pytest.raises(InvalidRequest, match="1 to 255 visible ASCII characters"):
        named(key)


@pytest.mark.covers("A75")
@given(st.text(VISIBLE, min_size=1, max_size=255), st.text(VISIBLE, min_size=1, max_size=255))
def test_different_keys_have_different_names(one: str, other: str) -> None:
    names = [
        named('"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"') for key in (one, other)
    ]
    assert (names[0] == names[1]) == (one == other)


@pytest.mark.covers("A75")
def test_a_key_name_depends_on_caller_route_and_store() -> None:
    sent = {"HTTP_COOKIE": "a=1"}
    assert named("k", ANNA, **sent) == named("k", ANNA)
    names = {
        named("k", ANNA), named("k", BEN), named("k", ANNA, "/other"), named("k", ANNA, secret=b"t" * 32), named("K", ANNA),
        named("k", None, **sent), named("k", None, HTTP_AUTHORIZATION="a=1"), named("k", None, HTTP_COOKIE="a=2"),
        named("k", None, HTTP_COOKIE="a=1", HTTP_AUTHORIZATION="a=1"),
    }  # fmt: skip
    assert len(names) == 9
    assert named("k", None, **sent) == named("k", None, **sent)


NO_CREDENTIALS: list[dict[str, str]] = [{}, {"HTTP_COOKIE": "", "HTTP_AUTHORIZATION": ""}]


@pytest.mark.covers("A75")
@pytest.mark.parametrize("sent", NO_CREDENTIALS)
@pytest.mark.parametrize("key", ["k", "x" * 21, '"' + "x" * 21 + '"', '"' + r"\"" * 21 + '"'])
def test_a_short_key_without_credentials_is_refused(key: str, sent: dict[str, str]) -> None:
    with pytest.raises(
        InvalidRequest, match="random key of at least 22 characters, such as a UUID"
    ):
        named(key, None, **sent)
    assert named(key, ANNA, **sent) and named(key, None, HTTP_COOKIE="a=1")


@pytest.mark.covers("A75")
@pytest.mark.parametrize("sent", NO_CREDENTIALS)
@pytest.mark.parametrize(
    "key",
    ["tW3bY0b0pY4mH_6oQ-2k1A", "8e03978e-40d5-43de-bc93-6894a57f9324", "x" * 22, "x" * 255],
)
def test_a_long_key_without_credentials_is_accepted(key: str, sent: dict[str, str]) -> None:
    assert named(key, None, **sent) == named(f'"{key}"', None)
    assert named(key, None) != named(key + "x" if len(key) < 255 else key[1:], None)
    assert named(key, None) != named(key, None, "/other")
    assert named(key, None) != named(key, None, secret=b"t" * 32)


@pytest.mark.covers("A75")
def test_the_length_of_a_quoted_key_excludes_quotes_and_escapes() -> None:
    assert named('"' + r"\"" * 22 + '"', None)
    with pytest.raises(InvalidRequest, match="at least 22 characters"):
        named('"' + r"\\" * 21 + '"', None)


@pytest.mark.covers("A75")
@given(
    st.text(UNQUOTED, min_size=22, max_size=40),
    st.text(min_size=1, max_size=9) | st.sampled_from(["", "user", "sent", "key", "work"]),
)
def test_a_key_without_credentials_never_has_the_name_of_another_caller(
    key: str, value: str
) -> None:
    names = [named(key, None), named(key, Caller(value, frozenset(), frozenset(), frozenset()))]
    if value:
        names += [
            named(key, None, HTTP_COOKIE=value),
            named(key, None, HTTP_AUTHORIZATION=value),
            named(key, None, HTTP_COOKIE=value, HTTP_AUTHORIZATION=value),
        ]
    assert len(set(names)) == len(names)


def fingerprint_of(
    path: str = "/work", *pieces: bytes, method: str = "POST", boundary: bytes | None = None
) -> str:
    return fingerprint(requested(path, method), URL, pieces, boundary, SECRET)


@pytest.mark.covers("A75")
def test_a_fingerprint_depends_on_method_query_and_body() -> None:
    prints = {
        fingerprint_of(), fingerprint_of(method="PUT"), fingerprint_of("/work?a=1"), fingerprint_of("/work?a=2"), fingerprint_of("/work?a=%31"),
        fingerprint_of("/work", b"a"), fingerprint_of("/work", b"b"), fingerprint(requested(), URL + "/", (), None, SECRET),
    }  # fmt: skip
    assert len(prints) == 8
    assert fingerprint_of("/work", b"ab", b"c") == fingerprint_of("/work", b"a", b"bc")
    assert fingerprint_of("/work", b"") == fingerprint_of()


@pytest.mark.covers("A75")
@given(st.lists(st.binary(max_size=5)), st.integers(1, 9), st.sampled_from([b"XYZ", b"ZYXWV"]))
def test_a_fingerprint_ignores_the_multipart_boundary(
    parts: list[bytes], size: int, boundary: bytes
) -> None:
    parts = [part.replace(b"X", b"").replace(b"Z", b"") for part in parts]

    def cut(mark: bytes) -> list[bytes]:
        whole = mark.join(parts)
        return [whole[start : start + size] for start in range(0, len(whole), size)]

    assert fingerprint_of("/work", *cut(boundary), boundary=boundary) == fingerprint_of(
        "/work", *cut(b"QRSTU"), boundary=b"QRSTU"
    )
