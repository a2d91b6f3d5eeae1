"""Bodies that do not arrive as announced: nothing is started, nothing stored, and the answer says what was wrong.

A server may mark its input as terminated (gunicorn does): Werkzeug then takes whatever comes for all of it.
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
from tests.flow.driving import IN_MEMORY, Flow, loaded, problem

MakeFlow = Callable[..., Flow]

CSV = b"a;b\n" * 10_000
BOUNDARY = "multipart/form-data; boundary=B"
PART = b'--B\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\n%s\r\n--B--\r\n' % CSV


@pytest.fixture
def left_open() -> Iterator[None]:
    """Collect what is left open while the warning of it is expected, and not in whichever test comes later."""
    yield
    gc.collect()


def leaves_files_open(test: Callable[..., None]) -> Callable[..., None]:
    """Expect of a test that Werkzeug leaves the file of a form's part open where the rest of the form cannot be read."""
    ignored = pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile:pytest.PytestUnraisableExceptionWarning")
    return ignored(pytest.mark.usefixtures("left_open")(test))


class Input(io.RawIOBase):
    """What a server hands on: pieces as they come in, or its own exception in between."""

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
    """As gunicorn's: no OSError and no ValueError."""


def send(
    flow: Flow,
    stream: Any,
    length: int | str | None = None,
    content_type: str = "application/octet-stream",
    is_terminated: bool = True,
    **environ: Any,
) -> Any:
    """Call the app as a server does."""
    made = EnvironBuilder(path="/work", method="POST").get_environ()
    made.pop("CONTENT_LENGTH", None)
    made.update({"wsgi.input": stream, "CONTENT_TYPE": content_type, **environ})
    if is_terminated:  # its being there is what counts
        made["wsgi.input_terminated"] = True
    if length is None:
        made["HTTP_TRANSFER_ENCODING"] = "chunked"
    else:
        made["CONTENT_LENGTH"] = str(length)
    answer, status, headers = run_wsgi_app(flow.app, made, buffered=True)
    return flow.app.response_class(answer, status, headers)


@pytest.fixture
def echo(flow: Flow) -> Flow:
    """Give an app whose route returns how much it got."""

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
def test_a_whole_body(echo: Flow, is_terminated: bool) -> None:
    assert result(echo, send(echo, Input(CSV[:5000], CSV[5000:]), len(CSV), is_terminated=is_terminated))[:2] == [
        len(CSV),
        len(CSV),
    ]


@IN_MEMORY
@pytest.mark.parametrize("content_type", ["application/octet-stream", "application/json", BOUNDARY])
@pytest.mark.parametrize("is_terminated", [True, False])
@pytest.mark.parametrize("arrived", [0, 1, 5000, len(PART) - 1])
def test_a49_a_body_cut_short(echo: Flow, arrived: int, is_terminated: bool, content_type: str) -> None:
    response = send(echo, Input(PART[:arrived]), len(PART), content_type, is_terminated)
    problem(response, 400, "invalid-request")
    assert "cut short" in response.get_json()["detail"]
    assert echo.query() == []


@leaves_files_open
@pytest.mark.parametrize("is_terminated", [True, False])
@pytest.mark.parametrize("read", ["form", "data", "get_json", "get_data"])
@pytest.mark.parametrize("content_type", [BOUNDARY, "application/x-www-form-urlencoded", "application/octet-stream"])
def test_a49_a_body_cut_short_that_a_hook_has_read(
    make_flow: MakeFlow, read: str, is_terminated: bool, content_type: str
) -> None:
    """CSRFProtect parses the form before the view is called, and so would start a task with half of it."""
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


class Asking:
    """An app whose permission function or identity loader reads the body before it is kept."""

    def __init__(self, make_flow: MakeFlow, asked: str, read: Callable[[], Any], limit: int) -> None:
        self.flow = make_flow(ASYNCROUTE_MAX_BODY=limit, PROPAGATE_EXCEPTIONS=False)

        def loader() -> Any:
            if asked == "loader" and request.method == "POST":
                read()
            return {"id": "anna"}

        def permission() -> Permission:
            if asked == "permission":
                read()
            return Permission()

        self.flow.async_routes.identity_loader(loader)

        @self.flow.route(permission=permission)
        def work() -> Any:
            return {name: len(file.read()) for name, file in request.files.items()} | dict(request.form)


READS: dict[str, Callable[[], Any]] = {
    "form": lambda: request.form,
    "json": lambda: request.get_json(force=True, silent=True),
    "stream": lambda: request.stream.read(),
}
who_asks = pytest.mark.parametrize("asked", ["loader", "permission"])
FORMS = [(BOUNDARY, PART), ("application/x-www-form-urlencoded", b"a=1&b=22222222&c=3")]


@who_asks
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(("content_type", "data"), FORMS)
@leaves_files_open
def test_a49_a_body_cut_short_that_our_own_asking_has_read(
    make_flow: MakeFlow, asked: str, read: str, content_type: str, data: bytes
) -> None:
    """No hook of the app runs, and a part of a form looks like a whole one."""
    flow = Asking(make_flow, asked, READS[read], 1_000_000).flow
    found = problem(send(flow, Input(data[: len(data) // 2]), len(data), content_type), 400, "invalid-request")
    assert "cut short" in found["detail"]
    assert flow.query() == []


@who_asks
@pytest.mark.parametrize("read", READS)
def test_a49_a_body_over_the_limit_is_refused_before_anything_of_ours_reads_it(
    make_flow: MakeFlow, asked: str, read: str
) -> None:
    flow = Asking(make_flow, asked, READS[read], 100_000).flow
    for content_type, _ in FORMS:
        endless = Endless()
        problem(send(flow, endless, 100_001, content_type), 413, "body-too-large")
        assert endless.given == 0
        found = problem(send(flow, endless, None, content_type), 413, "body-too-large")
        assert endless.given < 1_000_000 and "ASYNCROUTE_MAX_BODY" in found["detail"]
    assert flow.query() == []


@who_asks
@pytest.mark.parametrize("is_announced", [True, False])
def test_a_whole_form_that_our_own_asking_has_read(make_flow: MakeFlow, asked: str, is_announced: bool) -> None:
    flow = Asking(make_flow, asked, READS["form"], len(PART) + (0 if is_announced else 200)).flow
    for (content_type, data), expected in zip(
        FORMS, ({"f": len(CSV)}, {"a": "1", "b": "22222222", "c": "3"}), strict=True
    ):
        response = send(flow, Input(data), len(data) if is_announced else None, content_type)
        assert result(flow, response) == expected


@who_asks
@pytest.mark.parametrize("read", READS)
def test_chunks_that_cannot_be_read_are_the_client_s_fault_whoever_reads_them(
    make_flow: MakeFlow, asked: str, read: str
) -> None:
    flow = Asking(make_flow, asked, READS[read], 1_000_000).flow
    response = send(flow, Input(b"a=1", InvalidChunkSize("zz")), None, FORMS[1][0])
    assert "InvalidChunkSize" in problem(response, 400, "invalid-request")["detail"]


@who_asks
@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_that_was_read_and_not_kept_is_the_app_s_fault(
    make_flow: MakeFlow, asked: str, is_announced: bool
) -> None:
    flow = Asking(make_flow, asked, READS["stream"], 1_000_000).flow
    data = b"x" * 1000
    found = problem(send(flow, Input(data), len(data) if is_announced else None), 500, "cannot-start")
    assert "get_data()" in found["detail"]
    assert flow.query() == []


@who_asks
def test_the_limits_of_flask_hold_too_where_our_own_asking_reads(make_flow: MakeFlow, asked: str) -> None:
    for name in ("max_content_length", "max_form_parts"):
        flow = Asking(make_flow, asked, READS["form"], 1_000_000).flow
        flow.app.request_class = type("Strict", (Request,), {name: 2})
        parts = (
            b"".join(b'--B\r\nContent-Disposition: form-data; name="%d"\r\n\r\nx\r\n' % n for n in range(3))
            + b"--B--\r\n"
        )
        problem(send(flow, Input(parts), len(parts), BOUNDARY), 413, "body-too-large")


@IN_MEMORY
@pytest.mark.parametrize(
    "error", [InvalidChunkSize("zz"), OSError("reset"), ValueError("x"), EOFError(), RuntimeError("x")], ids=repr
)
@pytest.mark.parametrize("length", [None, 10_000])
def test_a_body_that_the_server_cannot_read(echo: Flow, error: Exception, length: int | None) -> None:
    response = send(echo, Input(b"x" * 500, error), length)
    detail = problem(response, 400, "invalid-request")["detail"]
    assert type(error).__name__ in detail or "cut short" in detail
    assert echo.query() == []


def test_a_chunked_body(echo: Flow) -> None:
    """A task has no Transfer-Encoding: it has the body whole, and its length."""
    assert result(echo, send(echo, Input(b"a" * 1000, b"b" * 300_000, b"c")))[:2] == [301_001, 301_001]
    assert result(echo, send(echo, Input(PART), None, BOUNDARY))[2] == {"f": len(CSV)}
    assert result(echo, send(echo, Input(), None))[1] == 0


def test_a_chunked_form_that_a_hook_has_parsed(echo: Flow) -> None:
    @echo.app.before_request
    def before() -> None:
        request.form.get("x")

    assert result(echo, send(echo, Input(PART), None, BOUNDARY))[2] == {"f": len(CSV)}


@IN_MEMORY
@pytest.mark.parametrize("length", ["", "-5", "abc", "1e3", "٣", " 7"])
def test_a_content_length_that_is_none(echo: Flow, length: str) -> None:
    """Servers refuse these; behind one that does not there is no body to tell of, and no exception either."""
    response = send(echo, Input(b"1234567"), length)
    assert response.status_code in (202, 400)
    if response.status_code == 202:
        echo.ended(response.get_json())


class Endless:
    def __init__(self) -> None:
        self.given = 0

    def read(self, size: int = -1) -> bytes:
        size = min(size, 65_536) if size >= 0 else 65_536
        self.given += size
        return b"x" * size

    readline = read

    def __iter__(self) -> Iterator[bytes]:
        return iter(())


@pytest.mark.parametrize("limit", [1, 1000, 300_000, 1_000_000])
def test_a49_an_endless_body(make_flow: MakeFlow, store_url: str, limit: int) -> None:
    flow = make_flow(ASYNCROUTE_STORE=store_url, ASYNCROUTE_MAX_BODY=limit)

    @flow.route()
    def work() -> None: ...

    endless = Endless()
    found = problem(send(flow, endless), 413, "body-too-large")
    assert "ASYNCROUTE_MAX_BODY" in found["detail"]
    assert endless.given < limit + 1_000_000
    assert flow.query() == []


@pytest.mark.parametrize("limit", [10, 300_000])
def test_a49_the_most_that_is_taken(make_flow: MakeFlow, store_url: str, limit: int) -> None:
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
    assert endless.given == 0


def test_the_limit_of_flask_holds_too(make_flow: MakeFlow) -> None:
    flow = make_flow(MAX_CONTENT_LENGTH=1000)

    @flow.route()
    def work() -> Any:
        return len(request.get_data())

    assert flow.result(data=b"x" * 1000) == 1000
    for answer in (flow.request("POST", "/work", data=b"x" * 1001), send(flow, Input(b"x" * 1001))):
        refusal = problem(answer, 413, "body-too-large")
        assert "1000 bytes" in refusal["detail"] and "MAX_CONTENT_LENGTH" in refusal["detail"]
    assert len(flow.query()) == 1


def test_a_form_over_the_limit_that_a_hook_has_parsed(make_flow: MakeFlow) -> None:
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


def test_a_malformed_multipart_body_is_the_view_s_affair(echo: Flow) -> None:
    """It arrived whole; a plain view would find an empty form in it, and so does the task."""
    found = result(echo, send(echo, Input(b"nonsense"), 8, BOUNDARY))
    assert found == [8, 0, {}, {}] or found[2:] == [{}, {}]
    assert result(echo, send(echo, Input(b"nonsense"), 8, "multipart/form-data"))[2:] == [{}, {}]


@IN_MEMORY
def test_more_than_was_announced_is_left_alone(echo: Flow) -> None:
    assert result(echo, send(echo, Input(b"x" * 100), 40, is_terminated=False))[:2] == [40, 40]


def test_a_temporary_file_is_closed_where_a_start_is_refused(
    make_flow: MakeFlow, monkeypatch: pytest.MonkeyPatch, gate: Any
) -> None:
    made: list[Any] = []
    original = tempfile.TemporaryFile

    def spy(*args: Any, **kwargs: Any) -> Any:
        made.append(original(*args, **kwargs))
        return made[-1]

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
    assert [file.closed for file in made] == [True, True, False, True]
    gate.set()
    flow.still(task)
    assert all(file.closed for file in made), "the task's own goes with its end"


@pytest.mark.parametrize(
    "read",
    [lambda: None, lambda: request.form.get("x"), lambda: request.get_data() and None],
    ids=["nothing", "form", "get_data"],
)
def test_a_disk_that_is_full_is_not_the_client_s_fault(
    make_flow: MakeFlow, monkeypatch: pytest.MonkeyPatch, read: Any
) -> None:
    """No handler turns what went wrong here into a 4xx."""

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    flow = make_flow(PROPAGATE_EXCEPTIONS=False)
    flow.app.before_request(lambda: read() if request.method == "POST" else None)
    flow.route(endpoint="work")(lambda: 1)
    monkeypatch.setattr("flask_asyncroute.snapshot.tempfile.TemporaryFile", full)
    large = b'--B\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\n%s\r\n--B--\r\n' % (b"x" * 300_000)
    for stream, length in ((Input(large), len(large)), (Input(large), None)):
        response = send(flow, stream, length, BOUNDARY)
        assert response.status_code >= 500, response.get_data(as_text=True)
    assert flow.query() == []


def test_a_gzipped_body_is_stored_as_it_is(echo: Flow) -> None:
    assert result(echo, send(echo, Input(b"\x1f\x8b" + b"x" * 100), 102, HTTP_CONTENT_ENCODING="gzip"))[:2] == [
        102,
        102,
    ]


@IN_MEMORY
def test_answers_are_json_here(echo: Flow) -> None:
    assert loaded(send(echo, Input(), 0))["State"] == "NotStarted"
