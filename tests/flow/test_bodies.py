"""Request bodies that do not arrive as announced: no task is started or stored, and the response
says what was wrong.

A server such as gunicorn may mark its input as terminated. Werkzeug then takes all bytes that
arrive as the whole body.
"""

from __future__ import annotations

import gc
import io
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Request, request
from werkzeug.test import EnvironBuilder, run_wsgi_app

from flask_asyncroute import Permission
from tests.support.flow import IN_MEMORY, Flow, loaded, problem

MakeFlow = Callable[..., Flow]

CSV = b"a;b\n" * 10_000
BOUNDARY = "multipart/form-data; boundary=B"
PART = b'--B\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\n%s\r\n--B--\r\n' % CSV


@pytest.fixture
def collect_open_files() -> Iterator[None]:
    """Collect open files while the warning is still expected, and not during a later test."""
    yield
    gc.collect()


def leaves_files_open(test: Callable[..., None]) -> Callable[..., None]:
    """Expect that Werkzeug leaves an uploaded file open if the rest of the form cannot be read."""
    ignored = pytest.mark.filterwarnings(
        "ignore:.*SpooledTemporaryFile:pytest.PytestUnraisableExceptionWarning"
    )
    return ignored(pytest.mark.usefixtures("collect_open_files")(test))


class Input(io.RawIOBase):
    """The input of a server: yields pieces as they arrive, or raises the server's exception."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self.pieces: list[bytes | Exception] = list(pieces)

    def read(self, size: int = -1) -> bytes:
        if not self.pieces:
            return b""
        piece = self.pieces.pop(0)
        if isinstance(piece, Exception):
            raise piece
        if 0 <= size < len(piece):
            self.pieces.insert(0, piece[size:])
            piece = piece[:size]
        return piece

    def readinto(self, buffer: Any) -> int:
        piece = self.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


class InvalidChunkSize(Exception):
    """Like gunicorn's exception: neither an OSError nor a ValueError."""


def send(
    flow: Flow,
    stream: Any,
    length: int | str | None = None,
    content_type: str = "application/octet-stream",
    is_terminated: bool = True,
    **environ: Any,
) -> Any:
    """Call the app as a server does."""
    wsgi_environ = EnvironBuilder(path="/work", method="POST").get_environ()
    wsgi_environ.pop("CONTENT_LENGTH", None)
    wsgi_environ.update({"wsgi.input": stream, "CONTENT_TYPE": content_type, **environ})
    if is_terminated:  # The value does not matter.
        wsgi_environ["wsgi.input_terminated"] = True
    if length is None:
        wsgi_environ["HTTP_TRANSFER_ENCODING"] = "chunked"
    else:
        wsgi_environ["CONTENT_LENGTH"] = str(length)
    answer, status, headers = run_wsgi_app(flow.app, wsgi_environ, buffered=True)
    return flow.app.response_class(answer, status, headers)


@pytest.fixture
def echo(flow: Flow) -> Flow:
    """Return an app whose route returns the sizes of the data it received."""

    @flow.route()
    def work() -> Any:
        files = {name: len(file.read()) for name, file in request.files.items()}
        return [request.content_length, len(request.get_data()), files, dict(request.form)]

    return flow


def result(flow: Flow, response: Any) -> Any:
    assert response.status_code == 202, response.get_data(as_text=True)
    task = flow.ended(response.get_json())
    assert task["State"] == "Completed", task
    return task["Result"]


@pytest.mark.parametrize("is_terminated", [True, False])
def test_a_whole_body_arrives(echo: Flow, is_terminated: bool) -> None:
    assert result(
        echo, send(echo, Input(CSV[:5000], CSV[5000:]), len(CSV), is_terminated=is_terminated)
    )[:2] == [
        len(CSV),
        len(CSV),
    ]


@pytest.mark.covers("A49")
@IN_MEMORY
@pytest.mark.parametrize("content_type", ["application/octet-stream", "application/json", BOUNDARY])
@pytest.mark.parametrize("is_terminated", [True, False])
@pytest.mark.parametrize("arrived", [0, 1, 5000, len(PART) - 1])
def test_a_body_cut_short_is_refused(
    echo: Flow, arrived: int, is_terminated: bool, content_type: str
) -> None:
    response = send(echo, Input(PART[:arrived]), len(PART), content_type, is_terminated)
    problem(response, 400, "invalid-request")
    assert "incomplete" in response.get_json()["detail"]
    assert echo.query() == []


@pytest.mark.covers("A49")
@leaves_files_open
@pytest.mark.parametrize("is_terminated", [True, False])
@pytest.mark.parametrize("read", ["form", "data", "get_json", "get_data"])
@pytest.mark.parametrize(
    "content_type", [BOUNDARY, "application/x-www-form-urlencoded", "application/octet-stream"]
)
def test_a_body_cut_short_is_refused_after_a_hook_has_read_it(
    make_flow: MakeFlow, read: str, is_terminated: bool, content_type: str
) -> None:
    """For instance, CSRFProtect parses the form before the view is called."""
    flow = make_flow()

    @flow.app.before_request
    def before() -> None:
        if request.method == "POST":
            {
                "form": lambda: request.form,
                "data": lambda: request.data,
                "get_data": lambda: request.get_data(),
                "get_json": lambda: request.get_json(force=True, silent=True),
            }[read]()

    @flow.route()
    def work() -> None:
        raise AssertionError("started")

    data = b"a=1&b=22222222&c=3" if content_type.endswith("urlencoded") else PART
    response = send(flow, Input(data[: len(data) // 2]), len(data), content_type, is_terminated)
    assert response.status_code == 400, response.get_data(as_text=True)
    assert flow.query() == []


class BodyReader:
    """An app whose permission function or identity loader reads the body before it is stored."""

    def __init__(
        self, make_flow: MakeFlow, function_name: str, read: Callable[[], Any], limit: int
    ) -> None:
        self.flow = make_flow(ASYNCROUTE_MAX_BODY=limit, PROPAGATE_EXCEPTIONS=False)

        def loader() -> Any:
            if function_name == "loader" and request.method == "POST":
                read()
            return {"id": "anna"}

        def permission() -> Permission:
            if function_name == "permission":
                read()
            return Permission()

        self.flow.async_routes.identity_loader(loader)

        @self.flow.route(permission=permission)
        def work() -> Any:
            return {name: len(file.read()) for name, file in request.files.items()} | dict(
                request.form
            )


READS: dict[str, Callable[[], Any]] = {
    "form": lambda: request.form,
    "json": lambda: request.get_json(force=True, silent=True),
    "stream": lambda: request.stream.read(),
}
by_each_function = pytest.mark.parametrize("function_name", ["loader", "permission"])
FORMS = [(BOUNDARY, PART), ("application/x-www-form-urlencoded", b"a=1&b=22222222&c=3")]


@pytest.mark.covers("A49")
@by_each_function
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(("content_type", "data"), FORMS)
@leaves_files_open
def test_a_body_cut_short_is_refused_after_a_loader_or_permission_has_read_it(
    make_flow: MakeFlow, function_name: str, read: str, content_type: str, data: bytes
) -> None:
    """A part of a form looks like a whole one."""
    flow = BodyReader(make_flow, function_name, READS[read], 1_000_000).flow
    found = problem(
        send(flow, Input(data[: len(data) // 2]), len(data), content_type), 400, "invalid-request"
    )
    assert "incomplete" in found["detail"]
    assert flow.query() == []


@pytest.mark.covers("A49")
@by_each_function
@pytest.mark.parametrize("read", READS)
def test_a_body_over_the_limit_is_refused_before_a_loader_or_permission_reads_it(
    make_flow: MakeFlow, function_name: str, read: str
) -> None:
    flow = BodyReader(make_flow, function_name, READS[read], 100_000).flow
    for content_type, _ in FORMS:
        endless = Endless()
        problem(send(flow, endless, 100_001, content_type), 413, "body-too-large")
        assert endless.size_read == 0
        found = problem(send(flow, endless, None, content_type), 413, "body-too-large")
        assert endless.size_read < 1_000_000 and "ASYNCROUTE_MAX_BODY" in found["detail"]
    assert flow.query() == []


@by_each_function
@pytest.mark.parametrize("is_announced", [True, False])
def test_a_form_that_a_loader_or_permission_has_read(
    make_flow: MakeFlow, function_name: str, is_announced: bool
) -> None:
    flow = BodyReader(
        make_flow, function_name, READS["form"], len(PART) + (0 if is_announced else 200)
    ).flow
    for (content_type, data), expected in zip(
        FORMS, ({"f": len(CSV)}, {"a": "1", "b": "22222222", "c": "3"}), strict=True
    ):
        response = send(flow, Input(data), len(data) if is_announced else None, content_type)
        assert result(flow, response) == expected


@by_each_function
@pytest.mark.parametrize("read", READS)
def test_invalid_chunks_are_400_if_a_loader_or_permission_reads_them(
    make_flow: MakeFlow, function_name: str, read: str
) -> None:
    flow = BodyReader(make_flow, function_name, READS[read], 1_000_000).flow
    response = send(flow, Input(b"a=1", InvalidChunkSize("zz")), None, FORMS[1][0])
    assert "InvalidChunkSize" in problem(response, 400, "invalid-request")["detail"]


@by_each_function
@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_that_a_function_consumed_from_the_stream_is_500(
    make_flow: MakeFlow, function_name: str, is_announced: bool
) -> None:
    flow = BodyReader(make_flow, function_name, READS["stream"], 1_000_000).flow
    data = b"x" * 1000
    found = problem(
        send(flow, Input(data), len(data) if is_announced else None), 500, "cannot-start"
    )
    assert "get_data()" in found["detail"]
    assert flow.query() == []


@by_each_function
def test_flask_limits_apply_if_a_loader_or_permission_reads_the_body(
    make_flow: MakeFlow, function_name: str
) -> None:
    for name in ("max_content_length", "max_form_parts"):
        flow = BodyReader(make_flow, function_name, READS["form"], 1_000_000).flow
        flow.app.request_class = type("Strict", (Request,), {name: 2})
        parts = (
            b"".join(
                b'--B\r\nContent-Disposition: form-data; name="%d"\r\n\r\nx\r\n' % n
                for n in range(3)
            )
            + b"--B--\r\n"
        )
        problem(send(flow, Input(parts), len(parts), BOUNDARY), 413, "body-too-large")


@IN_MEMORY
@pytest.mark.parametrize(
    "error",
    [InvalidChunkSize("zz"), OSError("reset"), ValueError("x"), EOFError(), RuntimeError("x")],
    ids=repr,
)
@pytest.mark.parametrize("length", [None, 10_000])
def test_a_body_that_the_server_cannot_read_is_refused(
    echo: Flow, error: Exception, length: int | None
) -> None:
    response = send(echo, Input(b"x" * 500, error), length)
    detail = problem(response, 400, "invalid-request")["detail"]
    assert type(error).__name__ in detail or "incomplete" in detail
    assert echo.query() == []


def test_a_chunked_body_arrives_with_its_length(echo: Flow) -> None:
    """The task's request has a Content-Length instead of Transfer-Encoding."""
    assert result(echo, send(echo, Input(b"a" * 1000, b"b" * 300_000, b"c")))[:2] == [
        301_001,
        301_001,
    ]
    assert result(echo, send(echo, Input(PART), None, BOUNDARY))[2] == {"f": len(CSV)}
    assert result(echo, send(echo, Input(), None))[1] == 0


@IN_MEMORY
@pytest.mark.parametrize("is_parsed", [False, True])
@pytest.mark.parametrize("content_type", ["application/octet-stream", "application/json", BOUNDARY])
def test_a_chunked_body_that_the_server_does_not_deliver_is_refused(
    echo: Flow, content_type: str, is_parsed: bool
) -> None:
    """Werkzeug reads an empty body without ``wsgi.input_terminated``: PEP 3333 has no chunks."""
    if is_parsed:
        echo.app.before_request(lambda: request.form.get("x") and None)
    response = send(echo, Input(b"{}"), None, content_type, is_terminated=False)
    detail = problem(response, 411, "length-required")["detail"]
    assert "Content-Length" in detail
    assert echo.query() == []


def test_a_chunked_form_that_a_hook_has_parsed_arrives(echo: Flow) -> None:
    @echo.app.before_request
    def before() -> None:
        request.form.get("x")

    assert result(echo, send(echo, Input(PART), None, BOUNDARY))[2] == {"f": len(CSV)}


@IN_MEMORY
@pytest.mark.parametrize("length", ["", "-5", "abc", "1e3", "٣", " 7"])
def test_an_invalid_content_length_is_refused_or_read_as_no_body(echo: Flow, length: str) -> None:
    """Most servers refuse it. The app must not raise an exception if one passes it on."""
    response = send(echo, Input(b"1234567"), length)
    assert response.status_code in (202, 400)
    if response.status_code == 202:
        echo.ended(response.get_json())


class Endless:
    def __init__(self) -> None:
        self.size_read = 0

    def read(self, size: int = -1) -> bytes:
        size = min(size, 65_536) if size >= 0 else 65_536
        self.size_read += size
        return b"x" * size

    readline = read

    def __iter__(self) -> Iterator[bytes]:
        return iter(())


@pytest.mark.covers("A49")
@pytest.mark.parametrize("limit", [1, 1000, 300_000, 1_000_000])
def test_an_endless_body_is_refused(make_flow: MakeFlow, store_url: str, limit: int) -> None:
    flow = make_flow(ASYNCROUTE_STORE=store_url, ASYNCROUTE_MAX_BODY=limit)

    @flow.route()
    def work() -> None: ...

    endless = Endless()
    found = problem(send(flow, endless), 413, "body-too-large")
    assert "ASYNCROUTE_MAX_BODY" in found["detail"]
    assert endless.size_read < limit + 1_000_000
    assert flow.query() == []


@pytest.mark.covers("A49")
@pytest.mark.parametrize("limit", [10, 300_000])
def test_a_body_of_exactly_the_limit_is_accepted(
    make_flow: MakeFlow, store_url: str, limit: int
) -> None:
    flow = make_flow(ASYNCROUTE_STORE=store_url, ASYNCROUTE_MAX_BODY=limit)

    @flow.route()
    def work() -> Any:
        return len(request.get_data())

    assert flow.result(data=b"x" * limit) == limit
    assert result(flow, send(flow, Input(b"x" * limit))) == limit
    problem(flow.request("POST", "/work", data=b"x" * (limit + 1)), 413, "body-too-large")
    problem(send(flow, Input(b"x" * limit, b"y")), 413, "body-too-large")
    assert len(flow.query()) == 2


def test_an_announced_length_over_the_limit_is_refused_unread(make_flow: MakeFlow) -> None:
    flow = make_flow(ASYNCROUTE_MAX_BODY=1000)

    @flow.route()
    def work() -> None: ...

    endless = Endless()
    problem(send(flow, endless, 1001), 413, "body-too-large")
    problem(send(flow, endless, 10**30), 413, "body-too-large")
    assert endless.size_read == 0


def test_max_content_length_of_flask_applies(make_flow: MakeFlow) -> None:
    flow = make_flow(MAX_CONTENT_LENGTH=1000)

    @flow.route()
    def work() -> Any:
        return len(request.get_data())

    assert flow.result(data=b"x" * 1000) == 1000
    for answer in (flow.request("POST", "/work", data=b"x" * 1001), send(flow, Input(b"x" * 1001))):
        refusal = problem(answer, 413, "body-too-large")
        assert "1000 bytes" in refusal["detail"] and "MAX_CONTENT_LENGTH" in refusal["detail"]
    assert len(flow.query()) == 1


def test_a_form_over_the_limit_is_refused_after_a_hook_has_parsed_it(make_flow: MakeFlow) -> None:
    flow = make_flow(ASYNCROUTE_MAX_BODY=1000)
    reads = [lambda: request.form.get("x"), lambda: request.get_data() and None]
    flow.app.before_request(lambda: reads[0]() if request.method == "POST" else None)

    @flow.route()
    def work() -> None: ...

    for _ in range(2):
        problem(send(flow, Input(PART), len(PART), BOUNDARY), 413, "body-too-large")
        problem(send(flow, Input(PART), None, BOUNDARY), 413, "body-too-large")
        reads.reverse()
    assert flow.query() == []


def test_a_malformed_multipart_body_is_an_empty_form_in_the_view(echo: Flow) -> None:
    """A plain view would find an empty form as well."""
    found = result(echo, send(echo, Input(b"nonsense"), 8, BOUNDARY))
    assert found == [8, 0, {}, {}] or found[2:] == [{}, {}]
    assert result(echo, send(echo, Input(b"nonsense"), 8, "multipart/form-data"))[2:] == [{}, {}]


@IN_MEMORY
def test_bytes_after_the_announced_length_are_not_read(echo: Flow) -> None:
    assert result(echo, send(echo, Input(b"x" * 100), 40, is_terminated=False))[:2] == [40, 40]


def test_the_temporary_file_is_closed_if_a_start_is_refused(
    make_flow: MakeFlow, monkeypatch: pytest.MonkeyPatch, gate: Any
) -> None:
    files: list[Any] = []
    original = tempfile.TemporaryFile

    def spy(*args: Any, **kwargs: Any) -> Any:
        files.append(original(*args, **kwargs))
        return files[-1]

    monkeypatch.setattr("flask_asyncroute.snapshot.tempfile.TemporaryFile", spy)
    flow = make_flow()
    flow.async_routes.identity_loader(lambda: None)
    is_bad = True

    @flow.route(max_workers=1, queue_size=0, id_generator=lambda: "" if is_bad else "a")
    def work() -> None:
        gate.wait(10)

    large = b"x" * 300_000
    flow.start(data=large, status=500)
    is_bad = False
    problem(send(flow, Input(large), len(large) + 1), 400, "invalid-request")
    task = flow.start(data=large)
    flow.start(data=large, status=503)
    assert [file.closed for file in files] == [True, True, False, True]
    gate.set()
    flow.still(task)
    assert all(file.closed for file in files), "the file of the task is closed at its end"


@pytest.mark.parametrize(
    "read",
    [lambda: None, lambda: request.form.get("x"), lambda: request.get_data() and None],
    ids=["nothing", "form", "get_data"],
)
def test_a_full_disk_is_a_5xx_response(
    make_flow: MakeFlow, monkeypatch: pytest.MonkeyPatch, read: Any
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    flow = make_flow(PROPAGATE_EXCEPTIONS=False)
    flow.app.before_request(lambda: read() if request.method == "POST" else None)
    flow.route(endpoint="work")(lambda: 1)
    monkeypatch.setattr("flask_asyncroute.snapshot.tempfile.TemporaryFile", full)
    large = (
        b'--B\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\n%s\r\n--B--\r\n'
        % (b"x" * 300_000)
    )
    for stream, length in ((Input(large), len(large)), (Input(large), None)):
        response = send(flow, stream, length, BOUNDARY)
        assert response.status_code >= 500, response.get_data(as_text=True)
    assert flow.query() == []


def test_a_gzipped_body_is_stored_as_it_is(echo: Flow) -> None:
    assert result(
        echo, send(echo, Input(b"\x1f\x8b" + b"x" * 100), 102, HTTP_CONTENT_ENCODING="gzip")
    )[:2] == [
        102,
        102,
    ]


@IN_MEMORY
def test_a_start_with_an_empty_body_is_answered_in_json(echo: Flow) -> None:
    assert loaded(send(echo, Input(), 0))["State"] == "NotStarted"
