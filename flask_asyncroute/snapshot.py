"""The stored form of a request, with which any process can run the view later.

Bodies over 256 KiB are written to temporary files, so that memory never holds a whole upload.
"""

from __future__ import annotations

import io
import os
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
"""Maximum bytes of a body that is stored inside the `Snapshot`. A larger body is stored separately.
"""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A request as it is stored, without its body if the body is large."""

    environ: dict[str, Any]  # the WSGI environ's plain values
    body: bytes | None = None  # a small body; None: no body, or it is stored separately
    session: str | None = None  # Flask's tagged JSON; None: empty
    url_names: tuple[str, ...] = ()
    injected: dict[str, Any] = msgspec.field(default_factory=dict)  # other arguments of the view


encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Snapshot).decode


class Body:
    """A request body, in memory or in a temporary file. Close it after use.

    Only one thread at a time can read it.
    """

    def __init__(self, pieces: Iterable[bytes] = ()) -> None:
        self._file: IO[bytes] = io.BytesIO()
        self.size = 0
        for piece in pieces:
            self.write(piece)

    def write(self, piece: bytes) -> None:
        if self.size <= CHUNK < self.size + len(piece):
            memory = cast(io.BytesIO, self._file)
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
            self._file.write(memory.getbuffer())
        self._file.write(piece)
        self.size += len(piece)

    def open(self) -> IO[bytes]:
        """Return a file from which the body can be read. Do not close this file."""
        self._file.seek(0)
        return self._file

    def pieces(self) -> Iterator[bytes]:
        """Yield the body in pieces of 256 KiB."""
        stream = self.open()
        while piece := stream.read(CHUNK):
            yield piece

    def copy(self) -> Body:
        """Return the body for another reader, while this one is not read. Close both."""
        copy = Body()
        copy.size = self.size
        if isinstance(self._file, io.BytesIO):
            copy._file = io.BytesIO(self._file.getvalue())
        else:
            self._file.flush()
            copy._file = os.fdopen(os.dup(self._file.fileno()), "rb")
        return copy

    def close(self) -> None:
        self._file.close()


def read_body(stream: IO[bytes], announced: int | None, limit: int) -> Body:
    """Read a whole request body of at most ``limit`` bytes.

    :param announced: the Content-Length; None if the body is chunked.
    :raises RequestRefused: if the body is too large or incomplete.
    """
    # Some servers check neither the size nor the completeness.
    check_announced(announced, limit)
    body = Body()
    try:
        # Read small pieces, because Werkzeug's stream allocates the whole requested size.
        size = CHUNK if announced is None else min(CHUNK, announced)
        limited = LimitedInput(stream, limit)
        while body.size != announced and (piece := limited.read(size)):
            body.write(piece)
        check_complete(body.size, announced)
    except BaseException:
        body.close()
        raise
    return body


class LimitedInput(io.RawIOBase):
    """The input stream of a request, with a limit.

    Reading more than ``limit`` bytes raises BodyTooLarge.
    """

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self.arrived = 0  # bytes read so far

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            piece = self._stream.read(len(buffer))
        except (HTTPException, RequestRefused):
            raise
        except Exception as error:
            # Servers raise their own errors: gunicorn's InvalidChunkSize is not an OSError.
            raise InvalidRequest(
                f"The body cannot be read ({type(error).__name__}). Send it again."
            ) from error
        self.arrived += len(piece)
        if self.arrived > self._limit:
            raise BodyTooLarge(
                f"The body exceeds the limit of {self._limit} bytes (ASYNCROUTE_MAX_BODY)."
            )
        buffer[: len(piece)] = piece
        return len(piece)


def check_announced(announced: int | None, limit: int) -> None:
    if announced is not None and announced > limit:
        raise BodyTooLarge(
            f"The body has {announced} bytes; the limit is {limit} (ASYNCROUTE_MAX_BODY)."
        )


def check_complete(arrived: int, announced: int | None) -> None:
    if announced is not None and arrived < announced:
        raise InvalidRequest(
            f"The body is incomplete: {arrived} of {announced} bytes arrived. Send it again."
        )


def form_body(
    mimetype: str, form: MultiDict[str, str], files: MultiDict[str, FileStorage]
) -> tuple[str, Body]:
    """Encode a parsed form as a request body again. Return its Content-Type and the body."""
    # The fields come before the files.
    if mimetype != "multipart/form-data":
        return mimetype, Body([urlencode(list(form.items(multi=True))).encode("ascii")])
    body = Body()
    # A random boundary, so that no value can contain it and add parts.
    boundary = secrets.token_hex(20)
    for name, value in form.items(multi=True):
        body.write(_part(boundary, {"Content-Disposition": "form-data" + _quoted("name", name)}))
        body.write(value.encode("utf-8", "surrogatepass") + b"\r\n")
    for name, file in files.items(multi=True):
        parameters = _quoted("name", name) + _quoted("filename", file.filename or "")
        headers = {
            key: value for key, value in file.headers if key.lower() != "content-disposition"
        }
        body.write(_part(boundary, {"Content-Disposition": "form-data" + parameters, **headers}))
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


def _quoted(key: str, text: str | None) -> str:
    # Quote as browsers do (WHATWG HTML). Only text that quoting would change is encoded as in RFC
    # 2231, because several versions of Werkzeug strip outer quotation marks from RFC 2231 values.
    if text is None:
        return ""
    if "%22" in text or not text.isprintable():
        return f"; {key}*=UTF-8''{quote(text, safe='', errors='surrogatepass')}"
    escaped = text.replace("\\", "\\\\").replace('"', "%22")
    return f'; {key}="{escaped}"'
