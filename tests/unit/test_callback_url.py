"""Parsing of callback URLs: which are accepted, which are refused, and whether another parser finds
the same host.
"""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute.callbacks.url import BadAddress, parse_url


@pytest.mark.parametrize(
    ("text", "url", "host", "port"),
    [
        ("http://a", "http://a/", "a", 80), ("HTTPS://A.Example./", "https://a.example/", "a.example", 443), ("http://a:80/x", "http://a/x", "a", 80),
        ("https://a:8443?q=1#f", "https://a:8443/?q=1", "a", 8443), ("http://a:/x", "http://a/x", "a", 80), ("http://8.8.8.8/", "http://8.8.8.8/", "8.8.8.8", 80),
        ("http://[2606:4700::1]:8080/x", "http://[2606:4700::1]:8080/x", "2606:4700::1", 8080), ("http://a/%41/é?ü", "http://a/%41/%C3%A9?%C3%BC", "a", 80),
        ("https://bücher.example/", "https://xn--bcher-kva.example/", "xn--bcher-kva.example", 443), ("http://BÜCHER.example", "http://xn--bcher-kva.example/", "xn--bcher-kva.example", 80),
        ("http://straße.example/", "http://xn--strae-oqa.example/", "xn--strae-oqa.example", 80), ("http://例え.テスト/", "http://xn--r8jz45g.xn--zckzah/", "xn--r8jz45g.xn--zckzah", 80),
        ("http://a_b.example/", "http://a_b.example/", "a_b.example", 80), ("http://a/../b", "http://a/../b", "a", 80), ("http://a/x@y:z", "http://a/x@y:z", "a", 80),
        ("http://a/\"<>{}|^`", "http://a/%22%3C%3E%7B%7D%7C%5E%60", "a", 80), ("http://a.1e/", "http://a.1e/", "a.1e", 80),
    ],
)  # fmt: skip
def test_a_valid_url_is_parsed_and_normalised(text: str, url: str, host: str, port: int) -> None:
    found = parse_url(text)
    assert (found.url, found.host, found.port) == (url, host, port)
    assert parse_url(found.url) == found


@pytest.mark.covers("A11")
@pytest.mark.parametrize("text", ["file:///etc/passwd", "gopher://a/", "ftp://a/", "dict://a:11211/", "data:text/plain,x", "javascript:alert(1)",
                                  "unix:///var/run/docker.sock", "http+unix://x/", "ws://a/", "FILE:///x", "mailto:a@b", "jar:http://a!/"])  # fmt: skip
def test_schemes_other_than_http_and_https_are_refused(text: str) -> None:
    with pytest.raises(BadAddress, match="scheme"):
        parse_url(text)


@pytest.mark.covers("A12")
@pytest.mark.parametrize(
    "port", ["0", "00", "99999", "65536", "-1", "x", "8 0", "８０", "1e3", "0x50", "080000"]
)
def test_invalid_ports_are_refused(port: str) -> None:
    with pytest.raises(BadAddress):
        parse_url(f"http://a.example:{port}/")


@pytest.mark.covers("A13")
@pytest.mark.parametrize(
    "text",
    ["http://a\r\n/", "http://a/\r\nX: y", "http://a/\t", "http://a\0/", "http://a /", " http://a/", "http://a/ ", "http://a/\x7f", "http://a/\xa0", "http://a\\@b/",
     "http://a/\ud800", "http://a/\n", "\thttp://a/", "http://a/" + "x" * 2048, "http://a/" + "é" * 700, "h\tttp://a/", "http:\\\\a/"],
)  # fmt: skip
def test_invalid_characters_and_long_urls_are_refused(text: str) -> None:
    with pytest.raises(BadAddress):
        parse_url(text)


@pytest.mark.covers("A13")
@pytest.mark.parametrize(
    "host",
    ["①②⑦.⓪.⓪.①", "１２７.０.０.１", "127。0。0。1", "127．0．0．1", "127｡0｡0｡1", "８.8.8.8", "①②⑦.1", "0ｘ7f000001", "⑧.⑧.⑧.⑧", "1⑥9.254.169.254",
     "²130706433", "𝟏𝟐𝟕.𝟎.𝟎.𝟏", "𝟣27.0.0.1"],
)  # fmt: skip
def test_a_host_that_uts46_maps_to_an_address_is_refused(host: str) -> None:
    with pytest.raises(BadAddress):
        parse_url(f"http://{host}/")


@pytest.mark.covers("A03")
@pytest.mark.parametrize(
    "host",
    ["127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "0177.1", "017700000001", "127.0.0.01", "127.0.0.1.1", "256.0.0.1", "1.2.3.999",
     "0x", "1.2.3.0x", "4294967296", "00.0.0.0", "127.0.0.1.0x1", "example.1", "a.0x7f", "0X7F.1"],
)  # fmt: skip
def test_unusual_spellings_of_ipv4_addresses_are_refused(host: str) -> None:
    for text in (host, f"{host}."):
        with pytest.raises(BadAddress, match="number"):
            parse_url(f"http://{text}/")


@pytest.mark.parametrize(
    "text",
    ["", "/", "a", "//a/", "http:", "http:/", "http://", "http:///x", "http:a", "http://?x", "http://#", "http://.", "http://..", "http://a..b/", "http://.a/",
     "http://-a/", "http://a-/", "http://" + "x" * 64 + ".example", "http://" + "x." * 130 + "y", "http://a%00b/", "http://%61/", "http://a,b/", "http://*.a/",
     "http://u@a/", "http://u:p@a/", "http://@a/", "http://a@/", "http://[::1", "http://::1/", "http://[::1]x/", "http://[fe80::1%25eth0]/", "http://[v1.x]/", "http://[]/",
     "http://[1.2.3.4]/", "http://a:1:2/", "http://a;b/", "http://xn--a/é"[:-2].replace("xn--a", "\u200d"), "http://a\u2044b/", "http://a℀b/", "http://a：80/"],
)  # fmt: skip
def test_text_that_is_not_a_valid_url_is_refused(text: str) -> None:
    with pytest.raises(BadAddress):
        parse_url(text)


def test_the_error_for_an_ipv6_zone_says_why_it_is_refused() -> None:
    with pytest.raises(BadAddress, match="has an IPv6 zone .*, which is valid on one machine only"):
        parse_url("http://[fe80::1%25eth0]/")


@given(
    st.one_of(
        st.text(),
        st.text("htps:/@\\.#?%[]a0１。é-_ \t\n", max_size=30).map(lambda text: f"http://{text}"),
    )
)
def test_urllib_parses_every_accepted_url_alike(text: str) -> None:
    try:
        found = parse_url(text)
    except BadAddress as error:
        assert str(error)
        return
    other = urlsplit(found.url)
    assert found.url.isascii() and found.url.isprintable() and " " not in found.url
    assert (
        other.scheme,
        other.hostname,
        other.port or {"http": 80, "https": 443}[other.scheme],
    ) == (
        found.scheme,
        found.host,
        found.port,
    )
    assert other.username is None and other.fragment == ""
    assert parse_url(found.url) == found
