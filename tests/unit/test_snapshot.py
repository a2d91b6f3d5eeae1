"""Snapshots of requests: the body with its limits, re-encoded forms, and the JSON that a store
keeps.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from werkzeug.datastructures import FileStorage, Headers, MultiDict
from werkzeug.formparser import parse_form_data

from flask_asyncroute import snapshot
from flask_asyncroute.errors import BodyTooLarge, InvalidRequest
from flask_asyncroute.snapshot import CHUNK, Body, Snapshot, form_body, read_body

SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 3]


class Trickle(io.RawIOBase):
    """A stream that returns a few bytes at a time and counts them."""

    def __init__(self, data: bytes, at_once: int = 1000) -> None:
        self.left = data
        self.at_once = at_once
        self.sent = 0

    def read(self, size: int = -1) -> bytes:
        piece = self.left[: min(self.at_once, size)]
        self.left = self.left[len(piece) :]
        self.sent += len(piece)
        return piece


class Endless(io.RawIOBase):
    sent = 0

    def read(self, size: int = -1) -> bytes:
        self.sent += size
        return b"x" * size


def test_a_snapshot_round_trips() -> None:
    full = Snapshot(
        environ={
            "PATH_INFO": "/é \U0001f600\x00",
            "SERVER_PORT": 80,
            "wsgi.multithread": True,
            "QUERY_STRING": "",
        },
        session='{"a":{" t":[1,2]}}',
        url_names=("year", "month"),
        injected={"user": {"id": 1, "names": ["a", None, 1.5]}},
    )
    assert snapshot.decode(snapshot.encode(full)) == full
    bare = Snapshot(environ={})
    assert snapshot.decode(snapshot.encode(bare)) == bare


@pytest.mark.parametrize("size", SIZES)
def test_a_body_round_trips(size: int) -> None:
    data = bytes(index % 251 for index in range(size))
    body = Body([data[:10], data[10:]])
    assert body.size == size
    assert b"".join(body.pieces()) == data
    assert all(0 < len(piece) <= CHUNK for piece in body.pieces())
    assert body.open().read() == data
    assert body.open().read(5) == data[:5], "each open starts at the beginning"
    body.close()


def test_a_small_body_stays_in_memory_and_a_large_one_does_not() -> None:
    small, large = Body([b"x" * CHUNK]), Body([b"x" * (CHUNK + 1)])
    assert isinstance(small.open(), io.BytesIO)
    assert not isinstance(large.open(), io.BytesIO)
    small.close()
    large.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("has_content_length", [True, False])
def test_a_body_is_read_to_its_end(size: int, has_content_length: bool) -> None:
    data = b"ab" * (size // 2) + b"c" * (size % 2)
    body = read_body(Trickle(data, 100_000), size if has_content_length else None, size or 1)  # type: ignore[arg-type]
    assert body.open().read() == data
    body.close()


@pytest.mark.parametrize("arrived", [0, 1, CHUNK, CHUNK + 1])
def test_a_body_shorter_than_content_length_is_refused(arrived: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"incomplete: {arrived} of {arrived + 1} bytes"):
        read_body(io.BytesIO(b"x" * arrived), arrived + 1, 10 * CHUNK)


@pytest.mark.covers("A49")
def test_a_body_over_the_limit_is_refused_without_reading_it() -> None:
    stream = Trickle(b"x" * 100)
    with pytest.raises(BodyTooLarge, match=r"100 bytes.* 99 .*ASYNCROUTE_MAX_BODY") as refused:
        read_body(stream, 100, 99)  # type: ignore[arg-type]
    assert refused.value.status == 413
    assert stream.sent == 0


@pytest.mark.covers("A49")
def test_an_endless_body_is_refused_at_the_limit() -> None:
    stream = Endless()
    with pytest.raises(BodyTooLarge, match="ASYNCROUTE_MAX_BODY"):
        read_body(stream, None, 3 * CHUNK)  # type: ignore[arg-type]
    assert stream.sent <= 5 * CHUNK


def test_a_body_longer_than_content_length_loses_no_data() -> None:
    """Servers prevent this case. Reading must lose no data and must not block."""
    body = read_body(io.BytesIO(b"abcdef"), 3, 100)
    assert body.size in (3, 6)
    body.close()


def test_a_connection_error_while_reading_is_an_invalid_request() -> None:
    class Gone(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise ConnectionResetError("gone")

    with pytest.raises(InvalidRequest, match="ConnectionResetError"):
        read_body(Gone(), 5, 100)  # type: ignore[arg-type]


def parsed(
    content_type: str, body: Body
) -> tuple[list[tuple[str, str]], list[tuple[str, str | None, str | None, bytes]]]:
    environ = {
        "REQUEST_METHOD": "POST", "CONTENT_TYPE": content_type, "CONTENT_LENGTH": str(body.size), "wsgi.input": body.open(),
    }  # fmt: skip
    _, form, files = parse_form_data(environ, silent=False)
    file_parts = [
        (name, file.filename, file.content_type, file.read())
        for name, file in files.items(multi=True)
    ]
    for _, file in files.items(multi=True):
        file.close()
    return list(form.items(multi=True)), file_parts


def test_a_url_encoded_form_is_re_encoded() -> None:
    form = MultiDict([("a", "1"), ("b", "é \U0001f600 +&=%"), ("a", "2"), ("c", ""), ("a", "1")])
    content_type, body = form_body("application/x-www-form-urlencoded", form, MultiDict())
    assert content_type == "application/x-www-form-urlencoded"
    # Values with one name keep their order; a MultiDict groups the names.
    assert parsed(content_type, body) == (list(form.items(multi=True)), [])
    body.close()


def test_a_multipart_form_is_re_encoded() -> None:
    headers = Headers({"Content-Type": "text/csv; charset=utf-8", "X-Part": "é"})
    form = MultiDict([("a", "1\r\n--x\r\n"), ("b", "é"), ("a", "")])
    file = FileStorage(
        io.BytesIO(b"a,b\r\n1,2\r\n"), filename='données "1".csv', name="table", headers=headers
    )
    none = FileStorage(
        io.BytesIO(b""), filename="", name="none", content_type="application/octet-stream"
    )
    big = FileStorage(
        io.BytesIO(bytes(range(256)) * 3000), filename="big", name="big", content_type="x/y"
    )
    file.stream.read()
    files = MultiDict([("table", file), ("none", none), ("big", big)])
    content_type, body = form_body("multipart/form-data", form, files)
    fields, file_parts = parsed(content_type, body)
    assert fields == list(form.items(multi=True))
    assert file_parts == [
        ("table", 'données "1".csv', "text/csv; charset=utf-8", b"a,b\r\n1,2\r\n"),
        ("none", "", "application/octet-stream", b""),
        ("big", "big", "x/y", bytes(range(256)) * 3000),
    ]
    assert file.stream.tell() == 0, "the stream is rewound for the next reader"
    body.close()


def test_a_part_cannot_contain_the_boundary() -> None:
    """A client that knows the boundary must not smuggle fields into the task that the request did
    not have.
    """
    _, before = form_body("multipart/form-data", MultiDict(), MultiDict())
    mark = before.open().read().strip().strip(b"-")
    before.close()
    smuggled = (
        b'\r\n--%s\r\nContent-Disposition: form-data; name="role"\r\n\r\nadmin\r\n--%s--\r\n'
        % (mark, mark)
    )
    for form, content in (({"note": smuggled.decode()}, b"x"), ({"note": "x"}, smuggled)):
        file = FileStorage(io.BytesIO(content), filename="f", content_type="text/plain")
        content_type, body = form_body(
            "multipart/form-data", MultiDict(form), MultiDict({"file": file})
        )
        fields, files = parsed(content_type, body)
        assert fields == list(form.items())
        assert files == [("file", "f", "text/plain", content)]
        body.close()


# Names from a browser or from Werkzeug's parser have no CR, LF or NUL.
part_names = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=12
)


@example([("%22", "a")], [("%22", "%22", b"")])
@given(
    st.lists(
        st.tuples(part_names, st.text(st.characters(codec="utf-8"), max_size=20)),
        max_size=4,
    ),
    st.lists(st.tuples(part_names, part_names, st.binary(max_size=50)), max_size=3),
)
def test_every_form_round_trips(
    fields: list[tuple[str, str]], files: list[tuple[str, str, bytes]]
) -> None:
    """Encoded twice, as when a task starts another task with its own form."""
    form: Any = MultiDict(fields)
    stored: Any = MultiDict(
        [
            (name, FileStorage(io.BytesIO(data), filename=filename, content_type="a/b"))
            for name, filename, data in files
        ]
    )
    content_type, body = form_body("multipart/form-data", form, stored)
    got = parsed(content_type, body)
    body.close()
    first = [(_unquoted(name), _unquoted(filename), data) for name, filename, _, data in got[1]]
    assert _as_parsed(got[0]) == _as_parsed(form.items(multi=True))
    assert first == [
        (_unquoted(name), _unquoted(str(file.filename)), file.read())
        for name, file in stored.items(multi=True)
    ]


def _as_parsed(items: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(_unquoted(name), value) for name, value in items]


def _unquoted(name: str) -> str:
    """Return a name with quotation marks for ``%22``, which older versions of Werkzeug parse so."""
    return name.replace("%22", '"')
