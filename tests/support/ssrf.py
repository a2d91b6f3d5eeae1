"""Spellings of internal addresses, and a name server and a receiver for tests of the SSRF guard.

No packet leaves the machine: the name server on loopback resolves names, and connections to public
addresses go to the receiver on loopback.
"""

from __future__ import annotations

import ipaddress
import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flask_asyncroute.callbacks import ssrf as guarding
from flask_asyncroute.webhooks import client as attempt

V4 = (
    "127.0.0.1", "127.8.9.10", "10.0.0.1", "10.255.255.254", "172.16.0.1", "172.31.255.254",
    "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "192.0.0.192",
)  # fmt: skip
V6 = (
    "::1", "::", "fe80::1", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "64:ff9b:1::1",
    "2001:db8::1", "3fff::1", "5f00::1", "100::1", "2001:2::1", "2001:10::1", "2001:20::1",
)  # fmt: skip
NAMES = (
    "localhost", "LOCALHOST", "localhost.", "a.localhost", "a.b.localhost.",
    "localhost.localdomain", "localhost6", "ip6-localhost", "ip6-loopback", "ｌｏｃａｌｈｏｓｔ",
    "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ", "localhost。",
)  # fmt: skip


def _spellings(text: str) -> Iterator[str]:
    """Yield spellings that some parser reads as this IPv4 address."""
    a, b, c, d = map(int, text.split("."))
    number = int(ipaddress.IPv4Address(text))
    yield text
    yield f"{text}."
    yield str(number)
    yield f"{number:#x}"
    yield f"{number:#o}".replace("0o", "0")
    yield f"{a}.{number & 0xFFFFFF}"
    yield f"{a}.{b}.{number & 0xFFFF}"
    yield f"{a:#x}.{b:#x}.{c:#x}.{d:#x}"
    yield f"0{a:o}.0{b:o}.0{c:o}.0{d:o}"
    yield f"{a:#x}.{b}.0{c:o}.{d}"
    yield f"{a:03d}.{b:03d}.{c:03d}.{d:03d}"
    yield text.replace(".", "。")
    yield text.translate({ord("0") + digit: 0xFF10 + digit for digit in range(10)})
    yield f"[::ffff:{text}]"
    yield f"[::{text}]"
    yield f"[64:ff9b::{text}]"
    yield f"[2002:{number >> 16:x}:{number & 0xFFFF:x}::1]"
    yield f"[2001:0:{number >> 16:x}:{number & 0xFFFF:x}::1]"


INSIDE = tuple(
    f"{scheme}://{host}/hook"
    for scheme, hosts in (
        (
            "http",
            (
                *(host for text in V4 for host in _spellings(text)),
                *(f"[{text}]" for text in V6),
                *NAMES,
            ),
        ),
        ("https", (*(f"{text}:8443" for text in V4), *(f"[{text}]:443" for text in V6))),
    )
    for host in hosts
)
"""URLs that some parser reads as internal."""

PUBLIC = (
    ("http://hooks.example/a", "93.184.216.34"), ("https://hooks.example/a", "93.184.216.34"),
    ("http://hooks.example:8080/a", "93.184.216.34"),
    ("http://HOOKS.Example./a?b=c", "93.184.216.34"), ("http://a.b.c.hooks.example/", "1.1.1.1"),
    ("http://bücher.example/", "8.8.4.4"), ("http://xn--bcher-kva.example/", "8.8.4.4"),
    ("http://straße.example/ä", "9.9.9.9"), ("http://例え.テスト/", "1.0.0.1"),
    ("http://пример.example/", "1.0.0.1"), ("http://six.example/", "2606:4700:4700::1111"),
    ("http://six.example:81/", "2a00:1450:4001:830::200e"), ("http://8.8.8.8/", "8.8.8.8"),
    ("http://8.8.8.8:65535/x", "8.8.8.8"),
    ("http://[2606:4700:4700::1001]/", "2606:4700:4700::1001"),
    ("http://[2606:4700:4700::1001]:1/", "2606:4700:4700::1001"),
    ("http://under_score.example/", "11.0.0.1"), ("http://100.63.255.255/", "100.63.255.255"),
    ("http://172.32.0.1/", "172.32.0.1"), ("http://a-b.example/%41?x=%20", "128.0.0.1"),
)  # fmt: skip
"""URLs of public hosts, and the address of each host."""


class NameServer:
    """Answers A and AAAA queries over UDP on loopback. A name that begins with ``rebind`` first has
    a public address and then loopback.
    """

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.addresses: dict[str, list[str]] = {}
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                query, sender = self._socket.recvfrom(512)
            except OSError:
                return
            labels, position = [], 12
            while query[position]:
                labels.append(query[position + 1 : position + 1 + query[position]].decode())
                position += query[position] + 1
            name = ".".join(labels)
            times = self.asked[name] = self.asked.get(name, 0) + 1
            answers = [address for address in self.addresses.get(name, ()) if "," not in address]
            if name.startswith("rebind"):
                # One resolution asks for A and then for AAAA.
                answers = ["93.184.216.34"] if times <= 2 else ["127.0.0.1"]
            query_type = struct.unpack("!H", query[position + 1 : position + 3])[0]
            found = [
                ip
                for ip in map(ipaddress.ip_address, answers)
                if (ip.version == 4) == (query_type == 1)
            ]
            records = b"".join(
                b"\xc0\x0c" + struct.pack("!HHIH", query_type, 1, 0, len(ip.packed)) + ip.packed
                for ip in found
            )
            head = query[:2] + struct.pack("!HHHHH", 0x8180, 1, len(found), 0, 0)
            self._socket.sendto(head + query[12 : position + 5] + records, sender)

    def resolve(self, host: str, port: int) -> list[str]:
        """Query the addresses of a name, as the system's resolver does."""
        found = []
        for query_type in (1, 28):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.settimeout(5)
                number = random.getrandbits(16)
                name = b"".join(bytes([len(label)]) + label.encode() for label in host.split("."))
                question = (
                    struct.pack("!HHHHHH", number, 0x0100, 1, 0, 0, 0)
                    + name
                    + b"\0"
                    + struct.pack("!HH", query_type, 1)
                )
                client.sendto(question, ("127.0.0.1", self.port))
                answer = client.recv(4096)
            position = len(question)
            for _ in range(struct.unpack("!H", answer[6:8])[0]):
                size = struct.unpack("!H", answer[position + 10 : position + 12])[0]
                found.append(
                    str(ipaddress.ip_address(answer[position + 12 : position + 12 + size]))
                )
                position += 12 + size
        return found


class Receiver:
    """Accepts connections on loopback, responds with 200 and stores the requests."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                data = b""
                while b"\r\n\r\n" not in data:
                    data += connection.recv(65536)
                self.requests.append(data.decode())
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


@contextmanager
def staged() -> Iterator[tuple[NameServer, Receiver, list[tuple[str, int]]]]:
    """Use the name server and the receiver instead of the network; yield them and the list of
    connected addresses.
    """
    server, receiver = NameServer(), Receiver()
    connected: list[tuple[str, int]] = []
    real: Any = guarding.resolve, attempt.connect, attempt.tls_context

    def connect(ip: guarding.Address, port: int, seconds: float) -> socket.socket:
        connected.append((str(ip), port))
        return socket.create_connection(("127.0.0.1", receiver.port), seconds)

    class Plain:
        """Replaces TLS, because only the address of a connection matters here."""

        @staticmethod
        def wrap_socket(connection: socket.socket, server_hostname: str) -> socket.socket:
            return connection

    guarding.resolve, attempt.connect = server.resolve, connect
    attempt.tls_context = lambda: Plain()  # type: ignore[assignment]
    try:
        yield server, receiver, connected
    finally:
        guarding.resolve, attempt.connect, attempt.tls_context = real
        server.close()
        receiver.close()
