"""The guard: which addresses are inside, in every spelling, at the start and when a name is resolved."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute import allowed_hosts, web_address
from flask_asyncroute.allowed_hosts import AllowedHosts
from flask_asyncroute.callbacks import attempt, guard
from flask_asyncroute.callbacks.guard import Inside, NotResolved, addresses_of, check, is_public
from prove import guard as trial

NOTHING = AllowedHosts()


def refused_at_start(url: str, allowed: AllowedHosts = NOTHING) -> bool:
    try:
        check(web_address.parse(url), allowed)
    except (Inside, web_address.BadAddress):
        return True
    return False


@pytest.mark.parametrize(
    "url", ["http://169.254.169.254/latest/meta-data", "http://169.254.169.254:80/", "http://[fd00:ec2::254]/"]
)
def test_A01_metadata_services(url: str) -> None:
    assert refused_at_start(url)


@pytest.mark.parametrize(
    "host",
    ["[::1]", "[::]", "0.0.0.0", "localhost", "LOCALHOST.", "LocalHost", "x.localhost", "localhost.localdomain", "ip6-localhost", "[0:0:0:0:0:0:0:1]", "[::0001]",
     "127.0.0.1", "127.255.255.254", "0.1.2.3", "ｌｏｃａｌｈｏｓｔ", "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ", "localhost。"],
)  # fmt: skip
def test_A02_this_server_itself(host: str) -> None:
    assert refused_at_start(f"http://{host}/")
    assert refused_at_start(f"https://{host}:8443/x?y")


@pytest.mark.parametrize("url", trial.INSIDE)
def test_A03_A06_every_spelling_of_inside_addresses(url: str) -> None:
    assert refused_at_start(url)


def test_A06_there_are_hundreds_of_them() -> None:
    assert len(set(trial.INSIDE)) >= 200


@pytest.mark.parametrize(
    "text",
    ["10.0.0.0", "10.255.255.255", "172.16.0.0", "172.31.255.255", "192.168.0.0", "192.168.255.255", "100.64.0.0", "100.127.255.255", "fc00::", "fdff::1", "fe80::1",
     "febf::1", "fec0::1", "feff::1", "224.0.0.1", "239.255.255.255", "ff02::1", "255.255.255.255", "240.0.0.1", "192.0.0.8", "192.0.2.1", "198.18.0.1", "198.51.100.1",
     "203.0.113.1", "192.88.99.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "2002:7f00:1::", "2002:808:808::1",
     "2001::1", "2001:0:7f00:1::", "2001:20::1", "2001:10::1", "2001:db8::1", "3fff::1", "3ffe::1", "5f00::1", "100::1", "4000::1", "1::1", "::", "::1", "::2"],
)  # fmt: skip
def test_A06_inside_addresses(text: str) -> None:
    ip = ipaddress.ip_address(text)
    assert not is_public(ip)
    host = f"[{text}]" if ip.version == 6 else text
    assert refused_at_start(f"http://{host}/")
    assert not refused_at_start(f"http://{host}/", allowed_hosts.checked("x", [text]))
    network = f"{text}/{32 if ip.version == 4 else 128}"
    assert not refused_at_start(f"http://{host}/", allowed_hosts.checked("x", [network]))
    assert refused_at_start(f"http://{host}/", allowed_hosts.checked("x", ["a.example", "11.0.0.0/8", "fd12::/16"]))


@pytest.mark.parametrize(
    "text",
    ["8.8.8.8", "1.1.1.1", "9.255.255.255", "11.0.0.0", "172.15.255.255", "172.32.0.0", "192.167.255.255", "192.169.0.0", "100.63.255.255", "100.128.0.0", "192.0.1.0",
     "223.255.255.255", "126.255.255.255", "128.0.0.0", "169.253.255.255", "169.255.0.0", "2606:4700:4700::1111", "2a00:1450::1", "2003::1", "2001:200::1", "2001:4860:4860::8888",
     "2400:cb00::1", "2c0f::1"],
)  # fmt: skip
def test_public_addresses(text: str) -> None:
    ip = ipaddress.ip_address(text)
    assert is_public(ip)
    assert not refused_at_start(f"http://{f'[{text}]' if ip.version == 6 else text}/")


@given(st.ip_addresses())
def test_what_is_public_is_global_for_python_too(ip: Any) -> None:
    """Not the other way round: Python calls more global than is."""
    if is_public(ip):
        assert (
            ip.is_global and not ip.is_multicast and not ip.is_private and not ip.is_loopback and not ip.is_link_local
        )


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[tuple[str, int]]:
    asked = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return list(addresses)

    monkeypatch.setattr(guard, "resolve", resolve)
    return asked


def test_names_are_resolved_at_each_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    address = web_address.parse("https://hooks.example/x")
    check(address, NOTHING)
    asked = resolving(monkeypatch, "8.8.8.8", "2606:4700::1", "8.8.8.8")
    assert list(map(str, addresses_of(address, False, NOTHING, 1))) == ["8.8.8.8", "2606:4700::1"]
    assert asked == [("hooks.example", 443)]


@pytest.mark.parametrize(
    "inside", ["10.0.0.1", "127.0.0.1", "::1", "::ffff:127.0.0.1", "169.254.169.254", "fe80::1", "64:ff9b::a00:1"]
)
def test_A08_an_answer_that_mixes_public_and_private(monkeypatch: pytest.MonkeyPatch, inside: str) -> None:
    address = web_address.parse("https://hooks.example/x")
    for addresses in (("8.8.8.8", inside), (inside, "8.8.8.8"), (inside,)):
        resolving(monkeypatch, *addresses)
        with pytest.raises(Inside, match=r"hooks\.example \("):
            addresses_of(address, False, NOTHING, 1)
        assert addresses_of(address, True, NOTHING, 1), "the developer may call inside"
        assert addresses_of(address, False, allowed_hosts.checked("x", ["hooks.example"]), 1)
        assert addresses_of(address, False, allowed_hosts.checked("x", ["0.0.0.0/0", "::/0"]), 1)
        with pytest.raises(Inside):
            addresses_of(address, False, allowed_hosts.checked("x", ["example", "x.hooks.example", "8.8.8.8"]), 1)


def test_A07_the_address_that_was_checked_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that gives a public address to who checks and a private one to who connects: asked once."""
    answers = [["8.8.8.8"], ["127.0.0.1"]]
    monkeypatch.setattr(guard, "resolve", lambda host, port: answers.pop(0))
    connected = []

    def connect(ip: Any, port: int, seconds: float) -> socket.socket:
        connected.append((str(ip), port))
        raise ConnectionRefusedError

    monkeypatch.setattr(attempt, "connect", connect)
    outcome = attempt.post(web_address.parse("http://rebind.example/"), "POST", {}, b"", False, NOTHING)
    assert not outcome.is_sent and connected == [("8.8.8.8", 80)]
    outcome = attempt.post(web_address.parse("http://rebind.example/"), "POST", {}, b"", False, NOTHING)
    assert not outcome.is_sent and "no address of the public internet" in outcome.reason and len(connected) == 1


def test_what_has_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    address = web_address.parse("https://hooks.example/x")
    resolving(monkeypatch)
    with pytest.raises(NotResolved):
        addresses_of(address, False, NOTHING, 1)

    def fail(host: str, port: int) -> list[str]:
        raise socket.gaierror

    monkeypatch.setattr(guard, "resolve", fail)
    with pytest.raises(NotResolved):
        addresses_of(address, False, NOTHING, 1)


def test_the_system_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert guard.resolve("127.0.0.1", 80) == ["127.0.0.1"]
    with pytest.raises(Inside):
        addresses_of(web_address.parse("http://localhost/"), False, NOTHING, 5)
    assert "127.0.0.1" in map(str, addresses_of(web_address.parse("http://localhost/"), True, NOTHING, 5))
    assert addresses_of(web_address.parse("http://localhost/"), False, allowed_hosts.checked("x", ["localhost"]), 5)


def test_allowed_hosts_as_values() -> None:
    found = allowed_hosts.checked("x", ["Hooks.Internal.", "bücher.example", "10.1.0.0/16", "fd00::1"])
    assert found.names == {"hooks.internal", "xn--bcher-kva.example"}
    assert found.names_host("hooks.internal") and not found.names_host("a.hooks.internal")
    assert found.holds(ipaddress.ip_address("10.1.2.3")) and not found.holds(ipaddress.ip_address("10.2.0.0"))
    assert found.holds(ipaddress.ip_address("fd00::1")) and not found.holds(ipaddress.ip_address("fd00::2"))
