"""The SSRF guard: internal addresses in every spelling, when a task is started and when a name is
resolved.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute.callbacks import ssrf
from flask_asyncroute.callbacks.ssrf import (
    AllowedHosts,
    Inside,
    NotResolved,
    addresses_of,
    check_allowed_hosts,
    check_host,
    is_public,
)
from flask_asyncroute.callbacks.url import BadAddress, parse_url
from flask_asyncroute.webhooks import client
from tests.support import ssrf as trial

NOTHING = AllowedHosts()


def refused_at_start(url: str, allowed: AllowedHosts = NOTHING) -> bool:
    try:
        check_host(parse_url(url), allowed)
    except (Inside, BadAddress):
        return True
    return False


@pytest.mark.covers("A01")
@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://169.254.169.254:80/",
        "http://[fd00:ec2::254]/",
    ],
)
def test_addresses_of_metadata_services_are_refused(url: str) -> None:
    assert refused_at_start(url)


@pytest.mark.covers("A02")
@pytest.mark.parametrize(
    "host",
    ["[::1]", "[::]", "0.0.0.0", "localhost", "LOCALHOST.", "LocalHost", "x.localhost", "localhost.localdomain", "ip6-localhost", "[0:0:0:0:0:0:0:1]", "[::0001]",
     "127.0.0.1", "127.255.255.254", "0.1.2.3", "ｌｏｃａｌｈｏｓｔ", "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ", "localhost。"],
)  # fmt: skip
def test_names_and_addresses_of_this_machine_are_refused(host: str) -> None:
    assert refused_at_start(f"http://{host}/")
    assert refused_at_start(f"https://{host}:8443/x?y")


@pytest.mark.covers("A03", "A06")
@pytest.mark.parametrize("url", trial.INSIDE)
def test_every_spelling_of_internal_addresses_is_refused(url: str) -> None:
    assert refused_at_start(url)


@pytest.mark.covers("A06")
def test_hundreds_of_spellings_are_tested() -> None:
    assert len(set(trial.INSIDE)) >= 200


@pytest.mark.covers("A06")
@pytest.mark.parametrize(
    "text",
    ["10.0.0.0", "10.255.255.255", "172.16.0.0", "172.31.255.255", "192.168.0.0", "192.168.255.255", "100.64.0.0", "100.127.255.255", "fc00::", "fdff::1", "fe80::1",
     "febf::1", "fec0::1", "feff::1", "224.0.0.1", "239.255.255.255", "ff02::1", "255.255.255.255", "240.0.0.1", "192.0.0.8", "192.0.2.1", "198.18.0.1", "198.51.100.1",
     "203.0.113.1", "192.88.99.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "2002:7f00:1::", "2002:808:808::1",
     "2001::1", "2001:0:7f00:1::", "2001:20::1", "2001:10::1", "2001:db8::1", "3fff::1", "3ffe::1", "5f00::1", "100::1", "4000::1", "1::1", "::", "::1", "::2"],
)  # fmt: skip
def test_internal_addresses_are_refused_unless_allowed(text: str) -> None:
    ip = ipaddress.ip_address(text)
    assert not is_public(ip)
    host = f"[{text}]" if ip.version == 6 else text
    assert refused_at_start(f"http://{host}/")
    assert not refused_at_start(f"http://{host}/", check_allowed_hosts("x", [text]))
    network = f"{text}/{32 if ip.version == 4 else 128}"
    assert not refused_at_start(f"http://{host}/", check_allowed_hosts("x", [network]))
    assert refused_at_start(
        f"http://{host}/", check_allowed_hosts("x", ["a.example", "11.0.0.0/8", "fd12::/16"])
    )


@pytest.mark.parametrize(
    "text",
    ["8.8.8.8", "1.1.1.1", "9.255.255.255", "11.0.0.0", "172.15.255.255", "172.32.0.0", "192.167.255.255", "192.169.0.0", "100.63.255.255", "100.128.0.0", "192.0.1.0",
     "223.255.255.255", "126.255.255.255", "128.0.0.0", "169.253.255.255", "169.255.0.0", "2606:4700:4700::1111", "2a00:1450::1", "2003::1", "2001:200::1", "2001:4860:4860::8888",
     "2400:cb00::1", "2c0f::1"],
)  # fmt: skip
def test_public_addresses_are_accepted(text: str) -> None:
    ip = ipaddress.ip_address(text)
    assert is_public(ip)
    assert not refused_at_start(f"http://{f'[{text}]' if ip.version == 6 else text}/")


@given(st.ip_addresses())
def test_public_addresses_are_also_global_for_python(ip: Any) -> None:
    """The reverse does not hold: Python treats more addresses as global."""
    if is_public(ip):
        assert (
            ip.is_global
            and not ip.is_multicast
            and not ip.is_private
            and not ip.is_loopback
            and not ip.is_link_local
        )


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[tuple[str, int]]:
    queries = []

    def resolve(host: str, port: int) -> list[str]:
        queries.append((host, port))
        return list(addresses)

    monkeypatch.setattr(ssrf, "resolve", resolve)
    return queries


def test_names_are_resolved_at_each_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    address = parse_url("https://hooks.example/x")
    check_host(address, NOTHING)
    queries = resolving(monkeypatch, "8.8.8.8", "2606:4700::1", "8.8.8.8")
    assert list(map(str, addresses_of(address, False, NOTHING, 1))) == ["8.8.8.8", "2606:4700::1"]
    assert queries == [("hooks.example", 443)]


@pytest.mark.covers("A08")
@pytest.mark.parametrize(
    "inside",
    [
        "10.0.0.1",
        "127.0.0.1",
        "::1",
        "::ffff:127.0.0.1",
        "169.254.169.254",
        "fe80::1",
        "64:ff9b::a00:1",
    ],
)
def test_a_name_with_any_private_address_is_refused(
    monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    address = parse_url("https://hooks.example/x")
    for addresses in (("8.8.8.8", inside), (inside, "8.8.8.8"), (inside,)):
        resolving(monkeypatch, *addresses)
        with pytest.raises(Inside, match=r"hooks\.example \("):
            addresses_of(address, False, NOTHING, 1)
        assert addresses_of(address, True, NOTHING, 1), "URLs set by the developer may be internal"
        assert addresses_of(address, False, check_allowed_hosts("x", ["hooks.example"]), 1)
        assert addresses_of(address, False, check_allowed_hosts("x", ["0.0.0.0/0", "::/0"]), 1)
        with pytest.raises(Inside):
            addresses_of(
                address,
                False,
                check_allowed_hosts("x", ["example", "x.hooks.example", "8.8.8.8"]),
                1,
            )


@pytest.mark.covers("A07")
def test_only_the_checked_address_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name server returns a public address at first and then a private one. Each attempt
    resolves the name once.
    """
    answers = [["8.8.8.8"], ["127.0.0.1"]]
    monkeypatch.setattr(ssrf, "resolve", lambda host, port: answers.pop(0))
    connected = []

    def connect(ip: Any, port: int, seconds: float) -> socket.socket:
        connected.append((str(ip), port))
        raise ConnectionRefusedError

    monkeypatch.setattr(client, "connect", connect)
    outcome = client.post(parse_url("http://rebind.example/"), "POST", {}, b"", False, NOTHING)
    assert not outcome.is_sent and connected == [("8.8.8.8", 80)]
    outcome = client.post(parse_url("http://rebind.example/"), "POST", {}, b"", False, NOTHING)
    assert not outcome.is_sent and "not a public address" in outcome.reason and len(connected) == 1


def test_a_name_without_an_address_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    address = parse_url("https://hooks.example/x")
    resolving(monkeypatch)
    with pytest.raises(NotResolved):
        addresses_of(address, False, NOTHING, 1)

    def fail(host: str, port: int) -> list[str]:
        raise socket.gaierror

    monkeypatch.setattr(ssrf, "resolve", fail)
    with pytest.raises(NotResolved):
        addresses_of(address, False, NOTHING, 1)


def test_names_are_resolved_by_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ssrf.resolve("127.0.0.1", 80) == ["127.0.0.1"]
    with pytest.raises(Inside):
        addresses_of(parse_url("http://localhost/"), False, NOTHING, 5)
    assert "127.0.0.1" in map(str, addresses_of(parse_url("http://localhost/"), True, NOTHING, 5))
    assert addresses_of(
        parse_url("http://localhost/"), False, check_allowed_hosts("x", ["localhost"]), 5
    )


def test_allowed_hosts_are_parsed() -> None:
    found = check_allowed_hosts(
        "x", ["Hooks.Internal.", "bücher.example", "10.1.0.0/16", "fd00::1"]
    )
    assert found.names == {"hooks.internal", "xn--bcher-kva.example"}
    assert "hooks.internal" in found.names and "a.hooks.internal" not in found.names
    assert found.holds(ipaddress.ip_address("10.1.2.3")) and not found.holds(
        ipaddress.ip_address("10.2.0.0")
    )
    assert found.holds(ipaddress.ip_address("fd00::1")) and not found.holds(
        ipaddress.ip_address("fd00::2")
    )
