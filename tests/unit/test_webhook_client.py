"""One delivery attempt of a callback, to receivers of all kinds over real sockets on loopback."""

from __future__ import annotations

import gzip
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from flask_asyncroute.callbacks import ssrf
from flask_asyncroute.callbacks.ssrf import AllowedHosts
from flask_asyncroute.callbacks.url import parse_url
from flask_asyncroute.webhooks import client as attempt
from flask_asyncroute.webhooks.client import Outcome, post, retry_after

Serve = Callable[[socket.socket], None]


class Receiver:
    """Accepts connections on loopback and serves each in another thread."""

    def __init__(self, serve: Serve, context: ssl.SSLContext | None = None) -> None:
        self._serve = serve
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.accepted = 0
        self.requests: list[bytes] = []
        self.over = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.accepted += 1
                threading.Thread(target=self._handle, args=(connection,), daemon=True).start()

    def _handle(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            if self._context is None:
                self._speak(connection)
                return
            with self._context.wrap_socket(connection, server_side=True) as secured:
                self._speak(secured)

    def _speak(self, connection: socket.socket) -> None:
        self.requests.append(read_request(connection))
        self._serve(connection)

    def close(self) -> None:
        self.over.set()
        self._listener.close()


def read_request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return data
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(
        next(
            line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
        ).split(b":")[1]
    )
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def responds(status: str, *fields: str, body: bytes = b"") -> Serve:
    head = "\r\n".join(
        [f"HTTP/1.1 {status}", *fields, f"Content-Length: {len(body)}", "", ""]
    ).encode()
    return lambda connection: connection.sendall(head + body)


@pytest.fixture
def receive() -> Iterator[Callable[..., Receiver]]:
    """Return ``receive(serve, context=None)``, which starts a receiver."""
    made: list[Receiver] = []

    def make(serve: Serve, context: ssl.SSLContext | None = None) -> Receiver:
        made.append(Receiver(serve, context))
        return made[-1]

    yield make
    for receiver in made:
        receiver.close()


@pytest.fixture
def timeout(monkeypatch: pytest.MonkeyPatch) -> float:
    """Shorten the timeout of an attempt; return it in seconds."""
    monkeypatch.setattr(attempt, "ATTEMPT_SECONDS", 0.5)
    return 0.5


def send(
    receiver: Receiver,
    path: str = "/hook?x=1",
    *,
    host: str = "127.0.0.1",
    scheme: str = "http",
    **overrides: Any,
) -> Outcome:
    address = parse_url(f"{scheme}://{host}:{receiver.port}{path}")
    values: dict[str, Any] = {
        "method": "POST",
        "headers": {"Content-Type": "application/json"},
        "body": b"{}",
        **overrides,
    }
    return post(
        address, is_trusted=overrides.pop("is_trusted", True), allowed=AllowedHosts(), **values
    )


def test_request_line_headers_and_body(receive: Callable[..., Receiver]) -> None:
    receiver = receive(responds("204 No Content"))
    outcome = send(
        receiver,
        headers={"Content-Type": "application/json", "X-Name": "é"},
        body=b'{"Id": "x"}',
        method="PUT",
    )
    assert outcome == Outcome(True, status=204)
    head, _, body = receiver.requests[0].partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"PUT /hook?x=1 HTTP/1.1", f"Host: 127.0.0.1:{receiver.port}".encode(), b"Content-Type: application/json",
        "X-Name: é".encode(), b"Content-Length: 11", b"Connection: close",
    ]  # fmt: skip
    assert body == b'{"Id": "x"}'


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_only_2xx_is_success(receive: Callable[..., Receiver], status: int) -> None:
    assert send(receive(responds(f"{status} X"))) == Outcome(True, status=status)


@pytest.mark.covers("F26")
@pytest.mark.parametrize("status", [304, 400, 401, 404, 429, 500, 503, 599])
def test_other_statuses_fail(receive: Callable[..., Receiver], status: int) -> None:
    outcome = send(receive(responds(f"{status} X", "Retry-After: 7")))
    assert (outcome.is_sent, outcome.is_gone, outcome.status, outcome.retry_after) == (
        False,
        False,
        status,
        7.0,
    )


@pytest.mark.covers("F27")
def test_410_sets_is_gone(receive: Callable[..., Receiver]) -> None:
    outcome = send(receive(responds("410 Gone")))
    assert (outcome.is_sent, outcome.is_gone) == (False, True)


@pytest.mark.covers("A09")
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("target", ["http://127.0.0.1:{port}/inside", "file:///etc/passwd", "//x"])
def test_redirects_are_not_followed(
    receive: Callable[..., Receiver], status: int, target: str
) -> None:
    inside = receive(responds("200 OK"))
    receiver = receive(responds(f"{status} Moved", f"Location: {target.format(port=inside.port)}"))
    outcome = send(receiver)
    assert (
        not outcome.is_sent
        and not outcome.is_gone
        and "redirects are not followed" in outcome.reason
    )
    assert (receiver.accepted, inside.accepted) == (1, 0)


def hangs(connection: socket.socket) -> None:
    connection.settimeout(5)
    connection.recv(1)


def drips(first: bytes, each: bytes) -> Serve:
    def serve(connection: socket.socket) -> None:
        connection.sendall(first)
        pause = threading.Event()
        for _ in range(200):
            connection.sendall(each)
            pause.wait(0.05)

    return serve


@pytest.mark.covers("F25")
@pytest.mark.parametrize(
    "serve",
    [hangs, drips(b"", b"H"), drips(b"HTTP/1.1 200 OK\r\nX: ", b"x"), drips(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
     drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n")],
    ids=["hangs", "drips a status", "drips a field", "drips fields", "endless responses"],
)  # fmt: skip
def test_the_timeout_applies_to_the_whole_attempt(
    receive: Callable[..., Receiver], timeout: float, serve: Serve
) -> None:
    receiver = receive(serve)
    began = time.monotonic()
    outcome = send(receiver)
    assert timeout <= time.monotonic() - began < timeout + 1
    assert not outcome.is_sent and "no response within" in outcome.reason


@pytest.mark.covers("F25")
def test_a_slow_body_after_a_2xx_is_a_success(
    receive: Callable[..., Receiver], timeout: float
) -> None:
    began = time.monotonic()
    assert send(
        receive(drips(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n", b"x"))
    ) == Outcome(True, status=200)
    assert time.monotonic() - began < timeout + 1


@pytest.mark.covers("F25")
def test_a_receiver_that_does_not_accept_connections_times_out(
    monkeypatch: pytest.MonkeyPatch, timeout: float
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        held = []
        for _ in range(4):  # fills the backlog of the kernel
            one = socket.socket()
            one.setblocking(False)
            with suppress(BlockingIOError):
                one.connect(listener.getsockname())
            held.append(one)
        address = parse_url(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        began = time.monotonic()
        outcome = post(address, "POST", {}, b"", True, AllowedHosts())
        assert not outcome.is_sent and time.monotonic() - began < timeout + 1
        for one in held:
            one.close()


@pytest.mark.covers("F25")
def test_a_name_server_that_does_not_answer_times_out(
    monkeypatch: pytest.MonkeyPatch, timeout: float
) -> None:
    over = threading.Event()

    def silent(host: str, port: int) -> list[str]:
        over.wait(5)
        return []

    monkeypatch.setattr(ssrf, "resolve", silent)
    began = time.monotonic()
    outcome = post(parse_url("http://x.example/"), "POST", {}, b"", False, AllowedHosts())
    assert (
        not outcome.is_sent and "DNS" in outcome.reason and time.monotonic() - began < timeout + 1
    )
    over.set()


def floods(first: bytes, each: bytes) -> tuple[Serve, list[int]]:
    sent = [0]

    def serve(connection: socket.socket) -> None:
        connection.settimeout(5)
        connection.sendall(first)
        while sent[0] < 1_000_000_000:
            connection.sendall(each)
            sent[0] += len(each)

    return serve, sent


@pytest.mark.covers("F28")
@pytest.mark.parametrize(
    ("first", "is_sent"),
    [(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n", True), (b"HTTP/1.1 500 X\r\n\r\n", False),
     (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3B9ACA00\r\n", True), (b"HTTP/1.1 200 ", False),
     (b"HTTP/1.1 200 OK\r\nX: ", False)],
)  # fmt: skip
def test_a_flooding_response_is_not_read(
    receive: Callable[..., Receiver], first: bytes, is_sent: bool
) -> None:
    serve, sent = floods(first, b"x" * 65536)
    outcome = send(receive(serve))
    assert outcome.is_sent is is_sent
    assert sent[0] < 50_000_000, "only what the kernel buffers"


@pytest.mark.covers("F28")
def test_a_gzip_bomb_is_not_decoded(receive: Callable[..., Receiver]) -> None:
    bomb = gzip.compress(b"\0" * 10_000_000)
    assert send(receive(responds("200 OK", "Content-Encoding: gzip", body=bomb))).is_sent


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"\0" * 100,
        b"HTTP/1.1 200 OK\r\nX" + b": y\r\nX" * 200,
    ],
)
def test_an_invalid_response_fails(receive: Callable[..., Receiver], data: bytes) -> None:
    outcome = send(receive(lambda connection: connection.sendall(data)))
    assert not outcome.is_sent and outcome.reason


@pytest.mark.covers("F29")
def test_a_refused_connection_fails() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    outcome = post(parse_url(f"http://127.0.0.1:{port}/"), "POST", {}, b"", True, AllowedHosts())
    assert not outcome.is_sent and "the connection failed" in outcome.reason


def test_the_next_address_is_tried_after_a_refused_connection(
    receive: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = receive(responds("200 OK"))
    monkeypatch.setattr(ssrf, "resolve", lambda host, port: ["127.0.0.9", "127.0.0.1"])
    assert send(receiver, host="hooks.example").is_sent
    assert f"Host: hooks.example:{receiver.port}".encode() in receiver.requests[0]


def test_proxies_and_netrc_are_ignored(
    receive: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proxy = receive(responds("200 OK"))
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
    (tmp_path / "netrc").write_text("default login anna password secret\n", "ascii")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    receiver = receive(responds("200 OK"))
    assert send(receiver).is_sent
    assert proxy.accepted == 0 and b"uthorization" not in receiver.requests[0]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with the key and certificate of ``hooks.example``."""
    path = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", path / "key", "-out", path / "cert", "-subj", "/CN=hooks.example",
         "-addext", "subjectAltName=DNS:hooks.example"],
        check=True, capture_output=True,
    )  # fmt: skip
    (path / "both").write_bytes((path / "key").read_bytes() + (path / "cert").read_bytes())
    return path / "both"


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


@pytest.mark.covers("F29")
@pytest.mark.parametrize(
    ("host", "is_known", "is_sent"),
    [
        ("hooks.example", True, True),
        ("hooks.example", False, False),
        ("other.example", True, False),
    ],
)
def test_certificates_are_verified_against_the_host_name(
    receive: Callable[..., Receiver],
    monkeypatch: pytest.MonkeyPatch,
    tls: ssl.SSLContext,
    certificate: Path,
    host: str,
    is_known: bool,
    is_sent: bool,
) -> None:
    names: list[str | None] = []
    tls.sni_callback = lambda connection, name, context: names.append(name)  # type: ignore[assignment]
    receiver = receive(responds("200 OK"), tls)
    monkeypatch.setattr(ssrf, "resolve", lambda host, port: ["127.0.0.1"])
    client = ssl.create_default_context(cafile=str(certificate) if is_known else None)
    monkeypatch.setattr(attempt, "tls_context", lambda: client)
    outcome = send(receiver, host=host, scheme="https")
    assert outcome.is_sent is is_sent, outcome
    assert names == [host]
    if not is_sent:
        assert "TLS" in outcome.reason and not any(receiver.requests)


@pytest.mark.covers("F29")
def test_the_tls_context_verifies_certificates() -> None:
    context = attempt.tls_context()
    assert context.check_hostname and context.verify_mode is ssl.CERT_REQUIRED


@pytest.mark.covers("F25")
def test_a_receiver_without_a_tls_handshake_times_out(
    receive: Callable[..., Receiver], timeout: float
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = parse_url(f"https://127.0.0.1:{listener.getsockname()[1]}/")
        began = time.monotonic()
        assert not post(address, "POST", {}, b"", True, AllowedHosts()).is_sent
        assert time.monotonic() - began < timeout + 1


@pytest.mark.covers("F26")
@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, 0), ("", 0), ("5", 5), (" 5 ", 5), ("0", 0), ("3600", 3600), ("3601", 3600), ("9" * 400, 3600), ("-5", 0), ("1.5", 0), ("٥", 0),
        ("timeout", 0), ("Tue, 24 Nov 2026 12:00:30 GMT", 30), ("Tue, 24 Nov 2026 11:00:00 GMT", 0), ("Wed, 25 Nov 2026 12:00:00 GMT", 3600),
        ("Tuesday, 24-Nov-26 12:00:10 GMT", 10), ("Tue Nov 24 12:00:20 2026", 20), ("Tue, 99 Nov 2026 12:00:30 GMT", 0), ("Tue, 24 Nov 99999999999 12:00:00 GMT", 0),
    ],
)  # fmt: skip
def test_retry_after_is_parsed_and_limited(text: str | None, seconds: float) -> None:
    assert retry_after(text, datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)) == seconds
