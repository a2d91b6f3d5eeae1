"""An absolute http or https URL taken apart, strictly: where two readers could disagree about its host, it is refused.

`options` checks what a developer writes with it, `callbacks` what a client sends. It never asks a name server.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import quote

MAX_URL = 2048

_UNFIT = re.compile(r"[\x00-\x20\x7f-\xa0\\\ud800-\udfff]")
_PARTS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//([^/?#]*)([^#]*))?", re.DOTALL)
_HOST = re.compile(r"(\[[^][@]*\]|[^][:@]*)(?::([0-9]*))?")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_DECIMAL = re.compile(r"(?:0|[1-9][0-9]{0,2})(?:\.(?:0|[1-9][0-9]{0,2})){3}")
_ASCII_OF_URL = "/?:@!$&'()*+,;=-._~%[]"
_PORTS = {"http": 80, "https": 443}


class BadAddress(ValueError):
    """A URL that cannot be called; the message says why."""


@dataclass(frozen=True, slots=True)
class WebAddress:
    """Where a request goes.

    :param host: a name in lower case and ASCII, without a dot at its end; or an IP address, IPv6 without brackets.
    :param target: path and query, as they stand in the request.
    """

    scheme: str
    host: str
    port: int
    target: str

    @property
    def ip(self) -> IPv4Address | IPv6Address | None:
        """The host as an address, where it is one."""
        try:
            return ipaddress.ip_address(self.host)
        except ValueError:
            return None

    @property
    def authority(self) -> str:
        """Host and, where it is not the scheme's own, port: what the ``Host`` field says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The whole, without a fragment."""
        return f"{self.scheme}://{self.authority}{self.target}"

    @property
    def display(self) -> str:
        """The URL without its query, for people to see."""
        return f"{self.scheme}://{self.authority}{self.target.partition('?')[0]}"


def parse(url: str) -> WebAddress:
    """Take an absolute URL apart. A name of other scripts becomes ASCII as UTS 46 says; a fragment is dropped.

    :raises BadAddress: for another scheme, userinfo, a port that is none, a host that is none or that is an IPv4 address
        in another than its usual form, control characters, spaces, backslashes, and over 2,048 characters.
    """
    if not url:
        raise BadAddress("it is empty")
    if len(url) > MAX_URL:
        raise BadAddress(f"it has {len(url)} characters; at most {MAX_URL} are taken")
    if _UNFIT.search(url):
        raise BadAddress("it holds a space, a backslash or a control character")
    found = _PARTS.match(url)
    if found is None:
        raise BadAddress("it is not absolute; it must begin with https:// or http://")
    scheme = found[1].lower()
    if scheme not in _PORTS:
        raise BadAddress(f"its scheme is {scheme[:20]}; only https and http are called")
    if found[2] is None:
        raise BadAddress("it is not absolute; it must begin with https:// or http://")
    authority, target = found[3], found[4]
    if "@" in authority:
        raise BadAddress("it holds a user name; send credentials in a header instead")
    parts = _HOST.fullmatch(authority)
    if parts is None:
        raise BadAddress("its host cannot be read")
    address = WebAddress(scheme, host_of(parts[1]), _port(parts[2], scheme), _target(target))
    if len(address.url) > MAX_URL:
        raise BadAddress(f"encoded it has {len(address.url)} characters; at most {MAX_URL} are taken")
    return address


def host_of(text: str) -> str:
    """Return a host as :class:`WebAddress` has it.

    :raises BadAddress: for what is neither a name nor an IP address in its usual form.
    """
    if text.startswith("["):
        try:
            if "%" in text:
                raise ValueError("a zone is of one machine alone")
            return str(IPv6Address(text[1:-1]))
        except ValueError:
            raise BadAddress(f"its host {text[:60]!r} is no IPv6 address") from None
    name = (_ascii(text) if not text.isascii() else text).lower().removesuffix(".")
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        # Whoever connects may read 127.1, 0177.0.0.1, 0x7f000001 and 2130706433 as an address, and not all as the same.
        if _DECIMAL.fullmatch(name) and text.isascii():
            try:
                return str(IPv4Address(name))
            except ValueError:
                pass
        raise BadAddress(f"its host {text[:60]!r} is a number, but no IPv4 address as a.b.c.d in decimal")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise BadAddress(f"its host {text[:60]!r} is no name of a host")
    return name


def _ascii(name: str) -> str:
    import idna

    try:
        return idna.encode(name, uts46=True).decode("ascii")
    except (idna.IDNAError, UnicodeError):
        raise BadAddress(f"its host {name[:60]!r} is no name of a host") from None


def _port(text: str | None, scheme: str) -> int:
    if not text:
        return _PORTS[scheme]
    port = int(text) if len(text) <= 5 else 0
    if not 0 < port < 65536:
        raise BadAddress(f"its port {text[:10]} is none; there are 1 to 65535")
    return port


def _target(text: str) -> str:
    """Return path and query as they are sent: what is no ASCII of a URL in percent-encoded UTF-8."""
    path = text if text.startswith("/") else f"/{text}"
    return quote(path, safe=_ASCII_OF_URL)
