"""The SSRF guard: all spellings of internal addresses are refused, DNS rebinding has no effect, and
public hosts are reached.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flask_asyncroute.callbacks import ssrf as guarding
from flask_asyncroute.callbacks.ssrf import AllowedHosts
from flask_asyncroute.callbacks.url import BadAddress, parse_url
from flask_asyncroute.webhooks import client as attempt
from tests.support.ssrf import INSIDE, PUBLIC, V4, V6, NameServer, Receiver, staged

REBINDINGS = 500


@pytest.mark.covers("A01", "A02", "A03", "A06", "A07", "A08")
def test_only_public_hosts_are_called(
    scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    rebindings = scaled(REBINDINGS, 20)
    with staged() as (server, receiver, connected):
        for url in INSIDE:
            with pytest.raises((BadAddress, guarding.Inside)):
                guarding.check_host(parse_url(url), AllowedHosts())
        for number, text in enumerate((*V4, *V6)):
            name = f"inside-{number}.example"
            for addresses in ([text], ["93.184.216.34", text], [text, "2606:4700::1"]):
                server.addresses[name] = addresses
                outcome = _post(f"http://{name}/")
                assert "not a public address" in outcome.reason, (
                    f"{name} with {addresses}: {outcome}"
                )
        assert not connected, f"connections to internal addresses: {connected[:5]}"
        _rebind(rebindings, connected)
        _deliver(server, receiver, connected)
    figures(
        f"{len(INSIDE)} spellings of internal addresses refused at the start, "
        f"{3 * len((*V4, *V6))} names of such at the attempt: 0 connections; {rebindings} names "
        f"rebound to loopback: 0 connections to it; {len(PUBLIC)} public hosts reached"
    )


def _post(url: str) -> attempt.Outcome:
    return attempt.post(parse_url(url), "POST", {}, b"{}", False, AllowedHosts())


def _rebind(count: int, connected: list[tuple[str, int]]) -> None:
    for number in range(count):
        url = f"http://rebind-{number}.example/"
        assert _post(url).is_sent, f"{url} was public, and was not called"
        for _ in range(2):
            assert "127.0.0.1" in _post(url).reason, f"{url} was bound to loopback, and was called"
    wrong = [target for target in connected if target != ("93.184.216.34", 80)]
    assert not wrong and len(connected) == count, (
        f"connections to {wrong[:5]}, {len(connected)} in all"
    )


def _deliver(server: NameServer, receiver: Receiver, connected: list[tuple[str, int]]) -> None:
    for url, address in PUBLIC:
        found = parse_url(url)
        server.addresses[found.host] = [address]
        connected.clear()
        receiver.requests.clear()
        guarding.check_host(found, AllowedHosts())
        outcome = _post(url)
        assert outcome.is_sent, f"{url}: {outcome.reason}"
        assert connected == [(address, found.port)], (
            f"{url} connected to {connected}, not to {address}"
        )
        assert f"Host: {found.authority}\r\n" in receiver.requests[0], (
            f"{url}: {receiver.requests[0]}"
        )
