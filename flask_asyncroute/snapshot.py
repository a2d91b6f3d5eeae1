"""A request as a value: what of it is stored, so that a view can run later, elsewhere, as if it were still there.

`context` captures and rebuilds; stores keep the bytes. A body is never whole in memory: up to 256 KiB stay there, more
goes to a temporary file and is handed on in pieces of 256 KiB. Nothing here touches a Flask context.
"""

from __future__ import annotations

import io
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, cast
from urllib.parse import quote, urlencode

import msgspec
from werkzeug.datastructures import FileStorage, MultiDict
from werkzeug.exceptions import HTTPException

from .errors import BodyTooLarge, InvalidRequest, RequestRefused

CHUNK = 256 * 1024
SMALL = 8 * 1024
"""Bytes of a body up to which it is kept in the snapshot itself, and costs no row of its own."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What a task needs of the request that started it, beside a large body.

    :param environ: the WSGI environ's plain values.
    :param body: a small body; None where there is none, or it is kept apart.
    :param session: the session as Flask's tagged JSON; None where it was empty.
    :param url_names: which URL variables the view was called with; their values are matched again.
    :param injected: what decorators above the route added to the call.
    """

    environ: dict[str, Any]
    body: bytes | None = None
    session: str | None = None
    url_names: tuple[str, ...] = ()
    injected: dict[str, Any] = msgspec.field(default_factory=dict)


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Snapshot)


def encode(snapshot: Snapshot) -> bytes:
    """Return a snapshot as JSON."""
    return _encoder.encode(snapshot)


def decode(data: bytes) -> Snapshot:
    """Return the snapshot that :func:`encode` was given."""
    return _decoder.decode(data)


class Body:
    """The bytes of one request body, for one reader at a time. Close it: a large one holds a temporary file."""

    def __init__(self, pieces: Iterable[bytes] = ()) -> None:
        self._file: IO[bytes] = io.BytesIO()
        self.size = 0
        for piece in pieces:
            self.write(piece)

    def write(self, piece: bytes) -> None:
        """Append ``piece``."""
        if self.size <= CHUNK < self.size + len(piece):
            held = self._file
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
            self._file.write(cast(io.BytesIO, held).getbuffer())
        self._file.write(piece)
        self.size += len(piece)

    def open(self) -> IO[bytes]:
        """Return the body as a file, at its beginning. It is the body's own: do not close it."""
        self._file.seek(0)
        return self._file

    def pieces(self) -> Iterator[bytes]:
        """Yield the body in pieces of 256 KiB."""
        stream = self.open()
        while piece := stream.read(CHUNK):
            yield piece

    def close(self) -> None:
        """Let go of the memory or file."""
        self._file.close()


def read_body(stream: IO[bytes], announced: int | None, limit: int) -> Body:
    """Read a request body to its end.

    :param announced: the request's Content-Length; None where it had none (chunked).
    :param limit: the most bytes to take.
    :raises BodyTooLarge: over ``limit``.
    :raises InvalidRequest: shorter than announced. Servers that end the input by themselves do not notice.
    """
    check_announced(announced, limit)
    body = Body()
    try:
        # No more than is to come: Werkzeug's stream makes room for as much as is asked for.
        size = CHUNK if announced is None else min(CHUNK, announced)
        while body.size != announced and (piece := _piece_of(stream, size)):
            body.write(piece)
            _check_size(body.size, limit)
        check_complete(body.size, announced)
    except BaseException:
        body.close()
        raise
    return body


class LimitedInput(io.RawIOBase):
    """The input of a request that does not announce its length, for the app's own code to read up to a limit.

    :raises BodyTooLarge: over ``limit``, from the read that passes it.
    :raises InvalidRequest: for what the server cannot read.
    """

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self.arrived = 0
        """How many bytes were read."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = _piece_of(self._stream, len(buffer))
        self.arrived += len(piece)
        _check_size(self.arrived, self._limit)
        buffer[: len(piece)] = piece
        return len(piece)


def _piece_of(stream: IO[bytes], size: int) -> bytes:
    """Read on. Servers raise errors of their own for what they cannot read: gunicorn's InvalidChunkSize is no OSError."""
    try:
        return stream.read(size)
    except (HTTPException, RequestRefused):
        raise
    except Exception as error:
        raise InvalidRequest(f"The body cannot be read ({type(error).__name__}). Send it again.") from error


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise BodyTooLarge(f"The body is larger than the {limit} bytes that are taken (ASYNCROUTE_MAX_BODY).")


def check_announced(announced: int | None, limit: int) -> None:
    """Refuse a body by its Content-Length.

    :raises BodyTooLarge: over ``limit``.
    """
    if announced is not None and announced > limit:
        raise BodyTooLarge(f"The body has {announced} bytes; at most {limit} are taken (ASYNCROUTE_MAX_BODY).")


def check_complete(arrived: int, announced: int | None) -> None:
    """Refuse a body that is shorter than its Content-Length.

    :raises InvalidRequest: then.
    """
    if announced is not None and arrived < announced:
        raise InvalidRequest(f"The body was cut short: {arrived} of {announced} bytes arrived. Send it again.")


def form_body(mimetype: str, form: MultiDict[str, str], files: MultiDict[str, FileStorage]) -> tuple[str, Body]:
    """Write a form that was parsed already as a request body again; return its Content-Type and the body.

    Fields keep their order, files come after them. Files are copied in pieces and rewound.
    """
    if mimetype != "multipart/form-data":
        pairs = [(name, value) for name, value in form.items(multi=True)]
        return mimetype, Body([urlencode(pairs).encode("ascii")])
    body = Body()
    # Random: a value that held a known one could end its part and add others.
    boundary = secrets.token_hex(20)
    for name, value in form.items(multi=True):
        body.write(_part(boundary, {"Content-Disposition": "form-data" + _parameter("name", name)}))
        body.write(value.encode("utf-8", "surrogatepass") + b"\r\n")
    for name, file in files.items(multi=True):
        disposition = "form-data" + _parameter("name", name) + _parameter("filename", file.filename or "")
        headers = {key: value for key, value in file.headers if key.lower() != "content-disposition"}
        body.write(_part(boundary, {"Content-Disposition": disposition, **headers}))
        file.stream.seek(0)
        while piece := file.stream.read(CHUNK):
            body.write(piece)
        file.stream.seek(0)
        body.write(b"\r\n")
    body.write(f"--{boundary}--\r\n".encode("ascii"))
    return f"{mimetype}; boundary={boundary}", body


def _part(boundary: str, headers: Mapping[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"--{boundary}\r\n{lines}\r\n".encode("utf-8", "surrogatepass")


def _parameter(key: str, text: str | None) -> str:
    """Return a parameter of a Content-Disposition, quoted as browsers do (WHATWG HTML, "multipart/form-data"); what that
    cannot hold unchanged goes by RFC 2231, which several Werkzeug take the outer quotation marks from.
    """
    if text is None:
        return ""
    if "%22" in text or not text.isprintable():
        return f"; {key}*=UTF-8''{quote(text, safe='', errors='surrogatepass')}"
    escaped = text.replace("\\", "\\\\").replace('"', "%22")
    return f'; {key}="{escaped}"'


def empty() -> IO[bytes]:
    """Return the input of a request without a body."""
    return io.BytesIO()
