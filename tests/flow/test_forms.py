"""Forms and files in a task: as the client sent them, even if a hook has read them first."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from flask import request
from werkzeug.datastructures import FileStorage, MultiDict
from werkzeug.test import EnvironBuilder

from tests.support.flow import IN_MEMORY, Flow

MakeFlow = Callable[..., Flow]

MULTIPART = "multipart/form-data"
URLENCODED = "application/x-www-form-urlencoded"

NAMES = [
    "plain", "naïve", "日本 語", "\U0001f600", "it's", "a b", "a;b", "a=b", "a&b", "a+b", "a/b", "a,b", "(x)", "[x]", "%", "%41", "%22", "é\u0301",
]  # fmt: skip
VALUES = [
    "",
    "x",
    "é\U0001f600",
    "two\r\nlines",
    "a\nb",
    "a\rb",
    "--x",
    "a=b&c=d",
    "\x00\x01\x7f",
    " padded ",
    "%41+",
    '"quoted"',
    "\\",
    "\ufeff",
]
READERS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "form": lambda: request.form,
    "files": lambda: request.files,
    "values": lambda: request.values,
    "get_data": lambda: request.get_data(),
    "get_data, not cached": lambda: request.get_data(cache=False) and None,
    "data": lambda: request.data,
    "get_json": lambda: request.get_json(silent=True),
    "get_json by force": lambda: request.get_json(force=True, silent=True),
    "get_data, then form": lambda: (request.get_data(), request.form),
    "form, then get_data": lambda: (request.form, request.get_data()),
    "form, then data": lambda: (request.form, request.data),
    "form, then get_json by force": lambda: (
        request.form,
        request.get_json(force=True, silent=True),
    ),
    "a file": lambda: [file.read(3) for file in request.files.values()],
    "all of a file": lambda: [file.read() for file in request.files.values()],
}
"""How hooks read the body before the view."""


def form_content() -> dict[str, Any]:
    """Return all fields and files of the current request's form."""
    return {
        "form": list(request.form.items(multi=True)),
        "files": [
            [name, file.filename, file.mimetype, file.content_type, hashlib.sha256(data := file.read()).hexdigest(), len(data)]
            for name, file in request.files.items(multi=True)
        ],
    }  # fmt: skip


def add_reading_hook(flow: Flow, read: Callable[[], Any]) -> None:
    """Read each POST request in a ``before_request`` function."""

    @flow.app.before_request
    def before() -> None:
        if request.method == "POST":
            read()


def add_echo_views(flow: Flow, read: Callable[[], Any]) -> None:
    """Add an async route and a plain view that both return the form."""

    add_reading_hook(flow, read)

    @flow.route()
    def work() -> Any:
        return form_content()

    @flow.app.post("/plain")
    def plain() -> Any:
        return form_content()


def results_of_both(flow: Flow, **given: Any) -> tuple[Any, Any]:
    """Send a request to both views; return the results of the task and of the plain view."""
    task = flow.result("/work", **given)
    response = flow.client.post("/plain", **given)
    assert response.status_code == 200
    return task, response.get_json()


def multipart(*parts: tuple[str, bytes]) -> dict[str, Any]:
    """Return a multipart body whose parts have exactly these headers."""
    body = b"".join(
        b"--B\r\n" + headers.encode() + b"\r\n\r\n" + data + b"\r\n" for headers, data in parts
    )
    return {"data": body + b"--B--\r\n", "content_type": f"{MULTIPART}; boundary=B"}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("kind", [MULTIPART, URLENCODED])
def test_a_form_that_a_hook_has_read(make_flow: MakeFlow, kind: str, read: str) -> None:
    """The task gets the whole form, unless the hook has read the body without caching it."""
    flow = make_flow()
    add_echo_views(flow, READERS[read])
    sent: dict[str, Any] = {"a": ["1", "2"], "b": "é"}
    if kind == MULTIPART:
        sent["file"] = (io.BytesIO(b"content" * 1000), "name.csv", "text/csv")

    def given() -> dict[str, Any]:
        builder = EnvironBuilder(method="POST", data=dict(sent), content_type=kind)
        if kind == MULTIPART:
            sent["file"] = (io.BytesIO(b"content" * 1000), "name.csv", "text/csv")
        environ = builder.get_environ()
        return {"data": environ["wsgi.input"].read(), "content_type": environ["CONTENT_TYPE"]}

    if read == "get_data, not cached":
        response = flow.request("POST", "/work", **given())
        assert response.status_code == 500, "a body that the hook consumed cannot be stored"
        return
    task = flow.result("/work", **given())
    assert task["form"] == [["a", "1"], ["a", "2"], ["b", "é"]]
    if kind == MULTIPART:
        assert [file[:3] + file[5:] for file in task["files"]] == [
            ["file", "name.csv", "text/csv", 7000]
        ]


@pytest.mark.parametrize("read", ["nothing", "form", "get_data"])
@pytest.mark.parametrize("kind", [MULTIPART, URLENCODED])
def test_unusual_names_and_values(flow: Flow, kind: str, read: str) -> None:
    add_echo_views(flow, READERS[read])
    for data in (
        MultiDict([(name, f"value of {name}") for name in NAMES]),
        MultiDict([("x", value) for value in VALUES]),
        MultiDict([("", ""), ("", "x"), ("x", "")]),
        MultiDict(itertools.product(["a", "b"], ["1", "2", "1"])),
    ):
        builder = EnvironBuilder(method="POST", data=data, content_type=kind)
        environ = builder.get_environ()
        task, plain = results_of_both(
            flow, data=environ["wsgi.input"].read(), content_type=environ["CONTENT_TYPE"]
        )
        assert task == plain
        # In a multipart name, %22 stands for a quote, so the two cannot be distinguished.
        assert task["form"] == [
            [name.replace("%22", '"') if kind == MULTIPART else name, value]
            for name, value in data.items(multi=True)
        ]


UNUSUAL_PARTS = {
    "escaped quote": ('Content-Disposition: form-data; name="a\\"b"; filename="c\\"d.txt"', b"x"),
    "percent quote": ('Content-Disposition: form-data; name="a%22b"; filename="c%22d.txt"', b"x"),
    "percent line break": ('Content-Disposition: form-data; name="a%0D%0Ab"; '
                           'filename="c%0D%0Ad.txt"', b"x"),
    "backslash": ('Content-Disposition: form-data; name="a\\\\b"; filename="C:\\\\temp\\\\d.txt"', b"x"),
    "lone backslash": ('Content-Disposition: form-data; name="a"; filename="C:\\temp\\new.txt"', b"x"),
    "backslash at the end": ('Content-Disposition: form-data; name="a\\\\"; filename="d\\\\"', b"x"),
    "filename*": ("Content-Disposition: form-data; name=\"a\"; filename*=UTF-8''%e2%82%ac%20x.txt", b"x"),
    "filename* with a line break": ("Content-Disposition: form-data; name=\"a\"; "
                                    "filename*=UTF-8''a%0D%0AX-Bad:%201", b"x"),
    "filename* with percent": ("Content-Disposition: form-data; name=\"a\"; "
                               "filename*=UTF-8''a%2522b%250Dc", b"x"),
    "filename* with a quote": ("Content-Disposition: form-data; name=\"a\"; "
                               "filename*=UTF-8''a%22;%20name=%22b", b"x"),
    "name* with a line break": ("Content-Disposition: form-data; name*=UTF-8''a%0D%0A%0D%0AX", b"x"),
    "raw emoji": ('Content-Disposition: form-data; name="\U0001f600"; filename="\U0001f680.bin"', b"x"),
    "raw latin": ('Content-Disposition: form-data; name="é"; filename="ü.txt"', b"x"),
    "no filename": ('Content-Disposition: form-data; name="a"', b"x"),
    "empty filename": ('Content-Disposition: form-data; name="a"; filename=""', b""),
    "empty filename, with content": ('Content-Disposition: form-data; name="a"; filename=""', b"x"),
    "no name": ("Content-Disposition: form-data", b"x"),
    "empty name": ('Content-Disposition: form-data; name=""; filename="d"', b"x"),
    "unquoted": ("Content-Disposition: form-data; name=a; filename=d.txt", b"x"),
    "semicolon": ('Content-Disposition: form-data; name="a;b"; filename="c;d.txt"', b"x"),
    "path": ('Content-Disposition: form-data; name="a"; filename="../../etc/passwd"', b"x"),
    "type with parameters": ('Content-Disposition: form-data; name="a"; '
                             'filename="d"\r\nContent-Type: text/csv; charset=utf-8; header="a b"', b"x"),
    "field with a charset": ('Content-Disposition: form-data; name="a"\r\nContent-Type: '
                             'text/plain; charset=iso-8859-1', b"\xe9"),
    "field with an unknown charset": ('Content-Disposition: form-data; name="a"\r\nContent-Type: '
                                      'text/plain; charset=utf-7', b"+AGE-"),
    "field that is no UTF-8": ('Content-Disposition: form-data; name="a"', b"\xff\xfe"),
    "more headers": ('Content-Disposition: form-data; name="a"; filename="d"\r\nX-Thing: '
                     '\u00e9\r\nContent-Length: 1\r\nContent-Transfer-Encoding: binary', b"x"),
    "empty file": ('Content-Disposition: form-data; name="a"; filename="d"\r\nContent-Type: '
                   'text/csv', b""),
    "a boundary inside": ('Content-Disposition: form-data; name="a"; filename="d"', b"\r\n--C\r\n--C--\r\n--\r\n"),
    "line breaks at both ends": ('Content-Disposition: form-data; name="a"; filename="d"', b"\r\nx\r\n"),
    "bytes": ('Content-Disposition: form-data; name="a"; filename="d"', bytes(range(256))),
}  # fmt: skip


@pytest.mark.parametrize("read", ["nothing", "form", "get_data"])
@pytest.mark.parametrize("part", UNUSUAL_PARTS)
def test_parts_with_unusual_headers(make_flow: MakeFlow, part: str, read: str) -> None:
    """The task sees what a plain view sees, whether or not a hook has parsed the body."""
    flow = make_flow()
    add_echo_views(flow, READERS[read])
    task, plain = results_of_both(flow, **multipart(UNUSUAL_PARTS[part]))
    assert task == plain


@pytest.mark.parametrize("read", ["nothing", "form"])
def test_several_and_empty_files_with_one_name(flow: Flow, read: str) -> None:
    add_echo_views(flow, READERS[read])
    parts = [
        ('Content-Disposition: form-data; name="f"; filename="1"', b"one"),
        ('Content-Disposition: form-data; name="x"', b"between"),
        ('Content-Disposition: form-data; name="f"; filename="2"', b""),
        ('Content-Disposition: form-data; name="f"; filename="1"', b"three"),
        ('Content-Disposition: form-data; name="f"; filename=""', b""),
    ]
    task, plain = results_of_both(flow, **multipart(*parts))
    assert task == plain
    assert [file[1] for file in task["files"]] == ["1", "2", "1", ""]


@pytest.mark.parametrize("read", ["nothing", "form"])
def test_a_large_file_between_fields(flow: Flow, read: str) -> None:
    data = b"".join(b"%d;%d\r\n" % (number, number**3) for number in range(150_000))
    add_echo_views(flow, READERS[read])
    sent = multipart(
        ('Content-Disposition: form-data; name="a"', b"1"),
        (
            'Content-Disposition: form-data; name="f"; filename="big.csv"\r\nContent-Type: text/csv',
            data,
        ),
        ('Content-Disposition: form-data; name="b"', b"2"),
    )
    found = flow.result("/work", **sent)
    assert found["form"] == [["a", "1"], ["b", "2"]]
    assert found["files"] == [
        ["f", "big.csv", "text/csv", "text/csv", hashlib.sha256(data).hexdigest(), len(data)]
    ]


@pytest.mark.parametrize("read", ["nothing", "form"])
def test_urlencoded_bytes_that_are_not_utf8(make_flow: MakeFlow, read: str) -> None:
    flow = make_flow()
    add_echo_views(flow, READERS[read])
    for data in (
        b"a=%FF%C3%A9&%E9=x",
        b"a=\xff\xc3\xa9",
        b"a=%&b=%4&c=%zz",
        b"&&=&a",
        b"a=%00%0D%0A",
        b"a=%ED%A0%80",
    ):
        task, plain = results_of_both(flow, data=data, content_type=URLENCODED)
        assert task == plain, data


@pytest.mark.parametrize(
    "content_type",
    [f"{URLENCODED}; charset=latin-1", "Application/X-WWW-Form-URLEncoded", f"{URLENCODED};"],
)
@pytest.mark.parametrize("read", ["nothing", "form"])
def test_content_types_of_a_form(make_flow: MakeFlow, content_type: str, read: str) -> None:
    flow = make_flow()
    add_echo_views(flow, READERS[read])
    task, plain = results_of_both(flow, data=b"a=%C3%A9", content_type=content_type)
    assert task == plain == {"form": [["a", "é"]], "files": []}


def test_a_form_that_a_hook_has_parsed_keeps_other_headers(make_flow: MakeFlow) -> None:
    flow = make_flow()
    add_reading_hook(flow, READERS["form"])

    @flow.route()
    def work() -> Any:
        return [
            request.mimetype,
            request.headers["X-Thing"],
            request.content_length == len(request.get_data()),
        ]

    assert flow.result(data={"a": "1"}, content_type=MULTIPART, headers={"X-Thing": "y"}) == [
        MULTIPART,
        "y",
        True,
    ]


@IN_MEMORY
def test_json_after_a_hook_that_reads_a_form(flow: Flow) -> None:
    add_reading_hook(flow, READERS["form"])

    @flow.route()
    def work() -> Any:
        return request.json

    assert flow.result(json={"a": [1]}) == {"a": [1]}


@IN_MEMORY
@pytest.mark.parametrize("read", ["get_data", "data", "get_json", "get_json by force", "values"])
def test_json_after_a_hook_that_reads_it(flow: Flow, read: str) -> None:
    add_reading_hook(flow, READERS[read])

    @flow.route()
    def work() -> Any:
        return request.json

    assert flow.result(json={"a": [1]}) == {"a": [1]}


def test_files_can_be_saved_by_the_request_and_by_the_task(flow: Flow, tmp_path: Any) -> None:
    @flow.app.before_request
    def keep() -> None:
        if request.files:
            request.files["f"].save(tmp_path / "early")

    @flow.route()
    def work() -> None:
        request.files["f"].save(tmp_path / "late")

    flow.run(data={"f": (io.BytesIO(b"content"), "x")})
    assert (tmp_path / "early").read_bytes() == (tmp_path / "late").read_bytes() == b"content"


@IN_MEMORY
def test_a_file_without_a_filename(flow: Flow) -> None:
    add_echo_views(flow, READERS["form"])
    data = {"f": FileStorage(io.BytesIO(b"x"), filename="", name="f")}
    found = flow.result(data=data, content_type=MULTIPART)
    assert [(file[0], file[5]) for file in found["files"] or []] in ([("f", 1)], [])
