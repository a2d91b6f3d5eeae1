"""Parse absolute http and https URLs. Refuse hosts that URL parsers interpret differently."""

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
    """A URL or its host is invalid. The message gives the reason."""


@dataclass(frozen=True, slots=True)
class WebAddress:
    """The parts of an absolute http or https URL.

    :param host: a lower-case ASCII name without a trailing dot, or an IP address without brackets.
    :param target: path and query, percent-encoded.
    """

    scheme: str
    host: str
    port: int
    target: str

    @property
    def ip(self) -> IPv4Address | IPv6Address | None:
        """The host as an IP address, or None if the host is a name."""
        try:
            return ipaddress.ip_address(self.host)
        except ValueError:
            return None

    @property
    def authority(self) -> str:
        """The value of the ``Host`` header.

        It contains the port unless the port is the scheme's default.
        """
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"


def parse_url(url: str) -> WebAddress:
    """Parse an absolute http or https URL.

    The fragment is dropped. The host is converted to ASCII (UTS 46).

    :raises BadAddress: for another scheme, a user name, an invalid port or host, IPv4 in another
        form than a.b.c.d, control characters, spaces, backslashes, or over 2,048 characters.
    """
    if not url:
        raise BadAddress("it is empty")
    if len(url) > MAX_URL:
        raise BadAddress(f"it has {len(url)} characters; the limit is {MAX_URL}")
    if _UNFIT.search(url):
        raise BadAddress("it contains a space, a backslash or a control character")
    found = _PARTS.match(url)
    scheme = found[1].lower() if found else ""
    if scheme and scheme not in _PORTS:
        raise BadAddress(f"its scheme is {scheme[:20]}; use https or http")
    if found is None or found[2] is None:
        raise BadAddress("it is not absolute; it must begin with https:// or http://")
    authority, target = found[3], found[4]
    if "@" in authority:
        raise BadAddress("it contains a user name; send credentials in a header instead")
    parts = _HOST.fullmatch(authority)
    if parts is None:
        raise BadAddress("its host is invalid")
    path = target if target.startswith("/") else f"/{target}"
    address = WebAddress(
        scheme, host_of(parts[1]), _port(parts[2], scheme), quote(path, safe=_ASCII_OF_URL)
    )
    size = len(address.url)
    if size > MAX_URL:
        raise BadAddress(f"it has {size} characters after encoding; the limit is {MAX_URL}")
    return address


def host_of(text: str) -> str:
    """Normalize a host to the form of `WebAddress.host`.

    :raises BadAddress: if the host is invalid.
    """
    shown = repr(text[:60])
    if text.startswith("["):
        if "%" in text:
            problem = "has an IPv6 zone (%…), which is valid on one machine only"
            raise BadAddress(f"its host {shown} {problem}")
        try:
            return str(IPv6Address(text[1:-1]))
        except ValueError:
            raise BadAddress(f"its host {shown} is not an IPv6 address") from None
    name = (text if text.isascii() else _ascii(text)).lower().removesuffix(".")
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        # Resolvers disagree about IPv4 addresses such as 127.1, 0177.0.0.1, 0x7f000001 and
        # 2130706433.
        if _DECIMAL.fullmatch(name) and text.isascii():
            try:
                return str(IPv4Address(name))
            except ValueError:
                pass
        problem = "is a number, but not a decimal IPv4 address (a.b.c.d)"
        raise BadAddress(f"its host {shown} {problem}")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise BadAddress(f"its host {shown} is not a valid host name")
    return name


def _ascii(name: str) -> str:
    import idna  # slow to import

    try:
        return idna.encode(name, uts46=True).decode("ascii")
    except (idna.IDNAError, UnicodeError):
        raise BadAddress(f"its host {name[:60]!r} is not a valid host name") from None


def _port(text: str | None, scheme: str) -> int:
    if not text:
        return _PORTS[scheme]
    port = int(text) if len(text) <= 5 else 0
    if not 0 < port < 65536:
        raise BadAddress(f"its port {text[:10]} is invalid; use 1 to 65535")
    return port
