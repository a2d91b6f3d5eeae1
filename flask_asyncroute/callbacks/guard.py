"""The guard against inside addresses: where a client may have this server send a request (SSRF).

Asked twice: at the start for what can be seen without a name server, and at each attempt for the addresses that the name
has then, one of which is connected to. Python's own ``is_global`` is not asked: in 3.11 it is true for addresses that
lead inside (NAT64, 6to4, ``::127.0.0.1``, multicast).
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from ..allowed_hosts import AllowedHosts
from ..web_address import WebAddress

Address = IPv4Address | IPv6Address

_SPECIAL_4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/4", "240.0.0.0/4",
    )
)  # fmt: skip
"""IANA's special-purpose registry, multicast, and what is reserved."""
_GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
"""The only part of IPv6 that is given out; NAT64, mapped, compatible, local and multicast addresses are outside."""
_SPECIAL_6 = tuple(
    ipaddress.IPv6Network(network)
    for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3ffe::/16", "3fff::/20")
)  # fmt: skip
"""Within that: protocols (Teredo, ORCHID), documentation, 6to4, the former 6bone."""
_LOCAL_NAMES = frozenset({"localhost", "localhost.localdomain", "localhost6", "localhost6.localdomain6", "ip6-localhost",
                          "ip6-loopback"})  # fmt: skip


class Inside(ValueError):
    """An address that a client may not have called; the message says which."""


class NotResolved(OSError):
    """A name that has no address now."""


def is_public(ip: Address) -> bool:
    """Return whether an address is one of the public internet. What is not known to be one is none."""
    if isinstance(ip, IPv4Address):
        return not any(ip in network for network in _SPECIAL_4)
    return ip in _GLOBAL_6 and not any(ip in network for network in _SPECIAL_6)


def check(address: WebAddress, allowed: AllowedHosts) -> None:
    """Refuse what can be seen to be inside without a name server.

    :raises Inside: then.
    """
    if allowed.names_host(address.host):
        return
    ip = address.ip
    if ip is not None:
        _check_ip(ip, address.host, allowed)
    elif address.host in _LOCAL_NAMES or address.host.endswith(".localhost"):
        raise Inside(f"{address.host} is this server itself")


def addresses_of(address: WebAddress, is_trusted: bool, allowed: AllowedHosts, seconds: float) -> list[Address]:
    """Return the addresses of a host, every one of them allowed.

    :param is_trusted: the developer named the host, so it may be inside.
    :param seconds: that the name server has.
    :raises Inside: where one of them is not public, though others are.
    :raises NotResolved: where there is none.
    """
    found = [address.ip] if address.ip is not None else _resolve_within(address.host, address.port, seconds)
    ips = [ip for ip in found if ip is not None]
    if not is_trusted and not allowed.names_host(address.host):
        check(address, allowed)
        for ip in ips:
            _check_ip(ip, address.host, allowed)
    return ips


def resolve(host: str, port: int) -> list[str]:
    """Ask the system for the addresses of a name. It may last as long as the system's resolver has patience.

    :raises OSError: where there are none.
    """
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _resolve_within(host: str, port: int, seconds: float) -> list[Address | None]:
    """Resolve a name on a thread of its own, since nothing can interrupt the system's resolver."""
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append([_plain(ipaddress.ip_address(text)) for text in dict.fromkeys(resolve(host, port))])
        except (OSError, ValueError, UnicodeError) as error:
            answers.append(error)

    thread = threading.Thread(target=ask, name="asyncroute-resolver", daemon=True)
    thread.start()
    thread.join(max(seconds, 0.0))
    if not answers:
        raise NotResolved(f"The name server did not answer about {host} in time")
    if isinstance(answers[0], Exception) or not answers[0]:
        raise NotResolved(f"{host} has no address")
    return answers[0]  # type: ignore[no-any-return]


def _plain(ip: Address) -> Address:
    """Return an IPv4 address that came as an IPv6 one (``::ffff:a.b.c.d``) as what it is."""
    return ip.ipv4_mapped or ip if isinstance(ip, IPv6Address) else ip


def _check_ip(ip: Address, host: str, allowed: AllowedHosts) -> None:
    if not is_public(ip) and not allowed.holds(ip):
        where = str(ip) if str(ip) == host else f"{host} ({ip})"
        raise Inside(f"{where} is no address of the public internet")
