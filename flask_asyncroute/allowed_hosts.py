"""``ASYNCROUTE_CALLBACK_ALLOWED_HOSTS``: which inside hosts and networks clients may have called."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from . import web_address
from .checks import refuse


@dataclass(frozen=True, slots=True)
class AllowedHosts:
    """Names, each for itself alone, and networks.

    :param names: in lower case and ASCII, as :class:`~flask_asyncroute.web_address.WebAddress` has them.
    """

    names: frozenset[str] = frozenset()
    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    def names_host(self, host: str) -> bool:
        """Return whether a host is open by its name, whatever addresses it has."""
        return host in self.names

    def holds(self, ip: IPv4Address | IPv6Address) -> bool:
        """Return whether an address is in one of the networks."""
        return any(ip.version == network.version and ip in network for network in self.networks)


def checked(label: str, value: Any) -> AllowedHosts:
    """Accept a list of names of hosts, IP addresses and networks in CIDR form.

    :raises ConfigurationError: naming the key and the member.
    """
    if not isinstance(value, (list, tuple)):
        raise refuse(label, "a list of hosts and networks, such as ['hooks.internal', '10.1.0.0/16']", value)
    names, networks = set(), []
    for member in value:
        try:
            if not isinstance(member, str):
                raise ValueError
            try:
                networks.append(ipaddress.ip_network(member))
            except ValueError:
                names.add(web_address.host_of(member))
        except ValueError:
            wanted = "the name of a host, an IP address or a network such as '10.1.0.0/16' (its host bits 0)"
            raise refuse(f"a member of {label}", wanted, member) from None
    return AllowedHosts(frozenset(names), tuple(networks))
