"""The SSRF guard: restricts callbacks to public addresses if the client chose the host.

When a task is created, the guard checks the host without DNS. At each attempt, the guard resolves
the name and checks every address; the webhook client connects only to checked addresses.
``is_global`` is unsuitable: in Python 3.11 it is True for addresses that reach internal hosts
(NAT64, 6to4, ``::127.0.0.1``, multicast).
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from ..validators import refuse
from .url import BadAddress, WebAddress, host_of

Address = IPv4Address | IPv6Address

_SPECIAL_4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
        "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    )
)  # fmt: skip
"""Non-public networks: IANA's special-purpose registry, multicast and reserved ones."""
_GLOBAL_6 = IPv6Network("2000::/3")  # excludes NAT64, IPv4-mapped, local and multicast addresses
_SPECIAL_6 = tuple(
    IPv6Network(network)
    for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3ffe::/16", "3fff::/20")
)
"""Non-public networks in `_GLOBAL_6`: protocols (Teredo, ORCHID), documentation, 6to4, 6bone."""
_LOCAL_NAMES = frozenset(
    {"localhost", "localhost.localdomain", "localhost6", "localhost6.localdomain6",
     "ip6-localhost", "ip6-loopback"}
)  # fmt: skip


class Inside(ValueError):
    """A client chose a host that is not public. The message names the host."""


class NotResolved(OSError):
    """A host name could not be resolved."""


def is_public(ip: Address) -> bool:
    if isinstance(ip, IPv4Address):
        return not any(ip in network for network in _SPECIAL_4)
    return ip in _GLOBAL_6 and not any(ip in network for network in _SPECIAL_6)


def check_host(address: WebAddress, allowed: AllowedHosts) -> None:
    """Raise Inside for a local host name or a non-public IP address. Does not use DNS."""
    if address.host in allowed.names:
        return
    ip = address.ip
    if ip is not None:
        _check_ip(ip, address.host, allowed)
    elif address.host in _LOCAL_NAMES or address.host.endswith(".localhost"):
        raise Inside(f"{address.host} is this server itself")


def addresses_of(
    address: WebAddress, is_trusted: bool, allowed: AllowedHosts, seconds: float
) -> list[Address]:
    """Return a host's IP addresses. Check each, unless the host is trusted or allowed.

    :param is_trusted: whether the developer chose the host.
    :param seconds: timeout of the DNS lookup.
    :raises Inside: if any address is neither public nor allowed.
    :raises NotResolved: if the host has no address, or DNS does not answer in time.
    """
    ip = address.ip
    ips = _resolve_within(address.host, address.port, seconds) if ip is None else [ip]
    if not is_trusted and address.host not in allowed.names:
        check_host(address, allowed)
        for ip in ips:
            _check_ip(ip, address.host, allowed)
    return ips


def resolve(host: str, port: int) -> list[str]:
    """Return a host name's addresses, or raise OSError. Can block for a long time."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _resolve_within(host: str, port: int, seconds: float) -> list[Address]:
    """Resolve a name on a separate thread, because the system's resolver cannot be interrupted."""
    answers: list[list[Address]] = []

    def look_up() -> None:
        try:
            found = map(ipaddress.ip_address, dict.fromkeys(resolve(host, port)))
            # DNS can return an IPv4 address as IPv6 (::ffff:a.b.c.d).
            answers.append([getattr(ip, "ipv4_mapped", None) or ip for ip in found])
        except (OSError, ValueError):
            answers.append([])

    thread = threading.Thread(target=look_up, name="asyncroute-resolver", daemon=True)
    thread.start()
    thread.join(max(seconds, 0.0))
    if not answers:
        raise NotResolved(f"DNS did not resolve {host} in time")
    if not answers[0]:
        raise NotResolved(f"{host} has no address")
    return answers[0]


def _check_ip(ip: Address, host: str, allowed: AllowedHosts) -> None:
    if not is_public(ip) and not allowed.holds(ip):
        where = str(ip) if str(ip) == host else f"{host} ({ip})"
        raise Inside(f"{where} is not a public address")


@dataclass(frozen=True, slots=True)
class AllowedHosts:
    """Non-public hosts that may receive callbacks: networks, and names as in `WebAddress`,
    without subdomains.
    """

    names: frozenset[str] = frozenset()
    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    def holds(self, ip: Address) -> bool:
        return any(ip in network for network in self.networks)


def check_allowed_hosts(label: str, value: Any) -> AllowedHosts:
    """Convert a list of host names, IP addresses and CIDR networks."""
    if not isinstance(value, (list, tuple)):
        wanted = "a list of hosts and networks, such as ['hooks.internal', '10.1.0.0/16']"
        raise refuse(label, wanted, value)
    names, networks = set(), []
    for member in value:
        wanted = "a host name, an IP address or a network such as '10.1.0.0/16' (with host bits 0)"
        if not isinstance(member, str):
            raise refuse(f"a member of {label}", wanted, member)
        try:
            networks.append(ipaddress.ip_network(member))
        except ValueError:
            try:
                names.add(host_of(member))
            except BadAddress:
                raise refuse(f"a member of {label}", wanted, member) from None
    return AllowedHosts(frozenset(names), tuple(networks))
