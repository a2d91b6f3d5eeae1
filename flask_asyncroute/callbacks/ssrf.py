"""The SSRF guard: restricts callbacks to public addresses if the client chose the host.

When a task is created, the guard checks the host without DNS. Before each attempt to send the
callback, the guard resolves the name and checks every address. The webhook client connects only to
checked addresses.
"""

# `ipaddress` cannot be used: in Python 3.11, `is_global` is True for addresses that reach internal
# hosts (NAT64, 6to4, ::127.0.0.1, multicast).

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
"""IPv4 networks that are not public: IANA's special-purpose registry, multicast, and reserved
networks.
"""
_GLOBAL_6 = IPv6Network("2000::/3")  # excludes NAT64, IPv4-mapped, local and multicast addresses
_SPECIAL_6 = tuple(
    IPv6Network(network)
    for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3ffe::/16", "3fff::/20")
)
"""Networks inside `_GLOBAL_6` that are not public: protocols (Teredo, ORCHID), documentation, 6to4
and 6bone.
"""
_LOCAL_NAMES = frozenset(
    {"localhost", "localhost.localdomain", "localhost6", "localhost6.localdomain6",
     "ip6-localhost", "ip6-loopback"}
)  # fmt: skip


class Inside(ValueError):
    """A client chose a host that is not public. The message names the host."""


class NotResolved(OSError):
    """DNS returned no address for a host name, or did not answer in time."""


def is_public(ip: Address) -> bool:
    if isinstance(ip, IPv4Address):
        return not any(ip in network for network in _SPECIAL_4)
    return ip in _GLOBAL_6 and not any(ip in network for network in _SPECIAL_6)


def check_host(address: WebAddress, allowed: AllowedHosts) -> None:
    """Refuse a local host name or a non-public IP address, without using DNS.

    :param allowed: hosts that are accepted although they are not public.
    :raises Inside: if the host is refused.
    """
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
    """Return the IP addresses of a host, after checking that each is public.

    The addresses of a trusted or allowed host are not checked.

    :param is_trusted: whether the developer, not the client, chose the host.
    :param allowed: hosts that are accepted although they are not public.
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
    """Look up the IP addresses of a host name. Can block for a long time.

    :raises OSError: if the lookup fails.
    """
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _resolve_within(host: str, port: int, seconds: float) -> list[Address]:
    # The system's resolver cannot be interrupted, so it runs on a separate thread.
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
    """The hosts that may receive callbacks although they are not public.

    :param names: host names in the form of `WebAddress.host`. Subdomains are not included.
    :param networks: networks whose addresses are allowed.
    """

    names: frozenset[str] = frozenset()
    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    def holds(self, ip: Address) -> bool:
        return any(ip in network for network in self.networks)


def check_allowed_hosts(label: str, value: Any) -> AllowedHosts:
    """Convert a list of host names, IP addresses and CIDR networks from the configuration.

    :param label: the configuration key, for error messages.
    :raises ConfigurationError: if the value is invalid.
    """
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
