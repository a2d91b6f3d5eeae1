"""The example application: its parts and responses. Its commands are tested in
live/test_commands.py.
"""

from __future__ import annotations

import csv
import inspect
import io
import os
import re
import signal
import statistics
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.exceptions import BadRequest

from example_app import (
    create_app,
    csv_summary,
    people,
    primes,
    report,
    server,
    sleepers,
    start_page,
    table,
    tour,
    trials,
    works,
)
from example_app.column import Column
from example_app.extension import async_routes
from example_app.secret import secret_key
from flask_asyncroute import TaskAborted, testing
from flask_asyncroute.runtime import runtime_of
from tests.support.event_streams import messages

PLANETS = Path(__file__).parent.parent / "example_app" / "static" / "planets.csv"


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Flask]:
    app = create_app({"TESTING": True}, str(tmp_path / "instance"))
    yield app
    testing.close(app)


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def finished(client: FlaskClient) -> Callable[..., dict[str, Any]]:
    """Return ``finished(response)``, which waits for the started task and returns it."""

    def wait(response: Any) -> dict[str, Any]:
        assert response.status_code == 202, response.text
        return testing.wait_task(client, response)

    return wait


def json_of(response: Any) -> Any:
    """Return the JSON of a response, without the None in its type."""
    return response.json


# Sleepers


@pytest.mark.parametrize("view", [sleepers.async_param, sleepers.auth_async_param])
def test_views_return_their_message(view: Callable[..., Any]) -> None:
    with testing.fake_task():
        assert inspect.unwrap(view)(sleep_time=0, message="Hi") == {"InnerValue": "Hi"}


def test_async_using_can_be_stopped(
    client: FlaskClient, finished: Callable[..., dict[str, Any]]
) -> None:
    start = client.put("/asyncUsing")
    stopped = client.delete(start.headers["Location"])
    assert (stopped.status_code, json_of(stopped)["State"]) == (200, "Aborted")
    assert finished(start)["Error"] == "Aborted by the user"


def test_async_state_returns_the_shared_state(
    app: Flask, client: FlaskClient, finished: Callable[..., dict[str, Any]]
) -> None:
    with app.app_context():
        async_routes.state[sleepers.STATE_KEY] = {"sleep_time": 0, "message": "before"}
    assert finished(client.put("/asyncState"))["Result"] == {"InnerValue": "before"}
    changed = client.put("/state", data={"message": "after"})
    assert changed.json == {"sleep_time": 0, "message": "after"}
    assert finished(client.put("/asyncState"))["Result"] == {"InnerValue": "after"}


def test_state_starts_from_its_default(client: FlaskClient) -> None:
    assert client.put("/state", data={"message": "new"}).json == {
        **sleepers.DEFAULT_STATE,
        "message": "new",
    }


@pytest.mark.parametrize("message", ["", "x" * 201])
def test_state_refuses_a_bad_message(client: FlaskClient, message: str) -> None:
    assert client.put("/state", data={"message": message}).status_code == 400


# Primes


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 100, 1_000_000, 1_000_001, 2_000_000])
def test_primes(limit: int) -> None:
    with testing.fake_task() as task:
        found = inspect.unwrap(primes.count_primes)(limit)
        assert task.progress == 100
    known = {0: (0, None), 1: (0, None), 2: (1, 2), 3: (2, 3), 4: (2, 3), 100: (25, 97)}
    known |= {1_000_000: (78498, 999983), 1_000_001: (78498, 999983), 2_000_000: (148933, 1999993)}
    assert (found["count"], found["largest"]) == known[limit]


def test_primes_over_http(client: FlaskClient, finished: Callable[..., dict[str, Any]]) -> None:
    task = finished(client.post("/primes/1000"))
    assert task["Result"] == {"limit": 1000, "count": 168, "largest": 997}
    assert task["Progress"] == 100
    assert finished(client.post("/primes/1000000001"))["Error"].startswith(
        "400 Bad Request: The limit"
    )


def test_primes_can_be_stopped(
    app: Flask, client: FlaskClient, finished: Callable[..., dict[str, Any]]
) -> None:
    start = client.post("/primes/1000000000")
    assert json_of(client.delete(start.headers["Location"]))["State"] == "Aborted"
    assert finished(start)["Error"] == "Aborted by the user"


@pytest.mark.parametrize(("path", "timeout"), [("/primes/1000000000", 600), ("/tour", 60)])
def test_a_long_task_times_out(
    client: FlaskClient,
    finished: Callable[..., dict[str, Any]],
    asyncroute_clock: testing.Clock,
    eventually: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    timeout: int,
) -> None:
    monkeypatch.setattr(tour, "SECONDS", 600)
    start = client.post(path)
    eventually(lambda: json_of(client.get(start.headers["Location"]))["State"] == "Running", 20)
    asyncroute_clock.advance(timeout - 30)
    assert json_of(client.get(start.headers["Location"]))["State"] == "Running"
    asyncroute_clock.advance(31)
    assert finished(start)["Error"] == "Timeout"


@pytest.mark.usefixtures("asyncroute_inline")
def test_every_work_of_the_start_page_runs_inline(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (tour, report):
        monkeypatch.setattr(module, "SECONDS", 0)
    monkeypatch.setattr(works, "PRIMES_UP_TO", 1000)
    with PLANETS.open("rb") as file:
        fields = {"/csv-summary": {"file": (file, "planets.csv")}}
        found = {
            work.path: json_of(client.post(work.path, data=fields.get(work.path)))["State"]
            for work in works.works("http://localhost")
        }
    assert len(found) >= 4 and set(found.values()) == {"Completed"}


# The tour and its page


@pytest.fixture
def brief_tour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tour, "SECONDS", 0)


@pytest.mark.usefixtures("brief_tour")
def test_the_events_of_a_tour(client: FlaskClient, finished: Callable[..., dict[str, Any]]) -> None:
    start = client.post("/tour", data={"traveller": "<b>Ada</b>"})
    assert finished(start)["State"] == "Completed"
    stream = client.get(json_of(start)["Sse"]["Url"])
    assert (stream.status_code, stream.mimetype) == (200, "text/event-stream")
    found = list(messages([stream.data]))
    assert found[0].name == "task.state"
    visits = [message.data["text"] for message in found if message.name == "message"]
    assert len(visits) == 8
    assert visits[0] == "<b>Ada</b> visits Mercury: the smallest, and the fastest."
    assert visits[3] == "<b>Ada</b> visits Mars: rocky."
    assert visits[-1] == "<b>Ada</b> visits Neptune: computed first, then seen."
    assert found[-1].name == "task.completed"
    assert found[-1].data["Result"] == {"traveller": "<b>Ada</b>", "visited": 8, "last": "Neptune"}


def test_a_tour_can_be_stopped(
    client: FlaskClient, finished: Callable[..., dict[str, Any]]
) -> None:
    start = client.post("/tour")
    assert json_of(client.delete(start.headers["Location"]))["State"] == "Aborted"
    assert finished(start)["Error"] == "Aborted by the user"


def test_a_long_traveller_name_is_refused(
    client: FlaskClient, finished: Callable[..., dict[str, Any]]
) -> None:
    assert finished(client.post("/tour", data={"traveller": "x" * 41}))["Error"].startswith(
        "400 Bad Request: The trav"
    )


# The report


def test_a_report_succeeds_in_the_third_attempt(
    client: FlaskClient,
    finished: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "SECONDS", 0)
    task = finished(client.post("/report"))
    assert task["Result"] == {"attempts": 3, "visitors": [17, 25, 31]}
    assert task["LastError"] == "ServiceUnavailable: The service did not respond."


def test_a_person_has_one_report_at_a_time(client: FlaskClient) -> None:
    def start(auth: tuple[str, str] | None = None) -> str:
        return str(client.post("/report", auth=auth).headers["Location"])

    alice, bob, anonymous = start(("alice", "alice")), start(("bob", "bob")), start()
    assert start(("alice", "alice")) == alice
    assert len({alice, bob, anonymous, start()}) == 4
    assert client.delete(alice, auth=("alice", "alice")).status_code == 200
    assert start(("alice", "alice")) != alice


def test_a_gunicorn_worker_starts_the_runner(app: Flask) -> None:
    class Worker:
        wsgi = app

    server.post_worker_init(Worker())
    assert runtime_of(app).runner.store.newest() >= 0


# CSV summary


def summary_of(data: bytes) -> dict[str, Any]:
    with testing.fake_task():
        return csv_summary.summarise(io.BytesIO(data))


def test_csv_summary_of_a_real_table(
    client: FlaskClient, finished: Callable[..., dict[str, Any]]
) -> None:
    with PLANETS.open("rb") as file:
        task = finished(client.post("/csv-summary", data={"file": (file, "planets.csv")}))
    assert (task["State"], task["Progress"], task["ProgressMessage"]) == (
        "Completed",
        100,
        "8 rows",
    )
    columns = {column["name"]: column for column in task["Result"]["columns"]}
    with PLANETS.open(newline="", encoding="utf-8") as file:
        radii = [float(row["radius_km"]) for row in csv.DictReader(file)]
    radius = columns["radius_km"]
    assert (radius["type"], radius["count"], radius["missing"]) == ("number", 8, 0)
    assert (radius["min"], radius["max"]) == (min(radii), max(radii))
    assert radius["mean"] == pytest.approx(statistics.mean(radii))
    assert radius["stdev"] == pytest.approx(statistics.stdev(radii))
    assert columns["kind"]["top"][0] == {"value": "rocky", "count": 4}
    assert columns["kind"]["distinct"] == 3
    assert (columns["discovered"]["type"], columns["discovered"]["missing"]) == ("date", 6)
    assert columns["rings"]["type"] == "boolean"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "-2", "+3", "0"], "integer"),
        (["1", "2.5", ".5", "1e3", "7."], "number"),
        (["yes", "No", "TRUE"], "boolean"),
        (["2024-02-29", "1999-12-31"], "date"),
        (["2024-13-01"], "text"),
        (["1", "x"], "text"),
        (["01067"], "text"),
        (["1234567890123456"], "text"),
        (["1_000"], "text"),
        (["١٢"], "text"),
        (["1e999"], "text"),
        (["inf"], "text"),
        (["", "NA", "null", "NaN"], "empty"),
    ],
)
def test_type_of_a_column(values: list[str], kind: str) -> None:
    column = Column("x", 10)
    for value in values:
        column.add(value)
    assert column.summary()["type"] == kind


def test_a_column_counts_a_limited_number_of_distinct_values() -> None:
    column = Column("x", 2)
    for value in ["a", "b", "c", "a", "d"]:
        column.add(value)
    summary = column.summary()
    assert (summary["distinct"], summary["distinct_is_exact"]) == (2, False)
    assert summary["top"] == [{"value": "a", "count": 2}, {"value": "b", "count": 1}]


def test_distinct_is_not_exact_if_values_were_cut() -> None:
    column = Column("x", 10)
    for number in range(3):
        column.add("x" * 100 + str(number))
    summary = column.summary()
    assert (summary["distinct"], summary["distinct_is_exact"]) == (1, False)


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        ("Ort;Straße\nKöln;Aachener Straße\n".encode(), "utf-8"),
        ("Ort;Straße\nKöln;Aachener Straße\n".encode("utf-8-sig"), "utf-8-sig"),
        ("Ort;Straße\nKöln;Aachener Straße\n".encode("utf-16"), "utf-16"),
        ("Ort;Straße\nKöln;Aachener Straße\n".encode("cp1252"), "cp1252"),
        (b"Ort;Stra\xc3\x9fe\n" + b"x;y\n" * 100_000 + b"K\xf6ln;z\n", "cp1252"),
    ],
)
def test_encodings(data: bytes, encoding: str) -> None:
    summary = summary_of(data)
    assert (summary["encoding"], summary["delimiter"]) == (encoding, ";")
    if len(data) < 1000:
        assert summary["columns"][0]["top"] == [{"value": "Köln", "count": 1}]
        assert summary["columns"][1]["name"] == "Straße"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_delimiters_and_line_ends(delimiter: str, end: str) -> None:
    lines = [["name", "note"], ["a", '"one, two; three | four"'], ["b", '"a ""b"" c"'], ["c", ""]]
    text = end.join(delimiter.join(fields) for fields in lines) + end
    summary = summary_of(text.encode())
    assert (summary["rows"], summary["delimiter"]) == (3, delimiter)
    assert {top["value"] for top in summary["columns"][1]["top"]} == {
        "one, two; three | four",
        'a "b" c',
    }


def test_irregular_headers_and_short_rows_are_accepted() -> None:
    summary = summary_of(b"\na,a,,b\n1,2,3,4,,\n\n5\n")
    assert [column["name"] for column in summary["columns"]] == ["a", "a (2)", "column 3", "b"]
    assert [(column["count"], column["missing"]) for column in summary["columns"]] == [
        (2, 0),
        (1, 1),
        (1, 1),
        (1, 1),
    ]
    assert summary_of(b"one column\n1\n2\n")["columns"][0]["mean"] == 1.5
    assert summary_of(b"a,b\n")["rows"] == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "The file is empty"),
        (b"\n \n", "no header"),
        (b"PK\x03\x04\x00\x00", "NUL bytes"),
        ("a,b\n1,\x002\n".encode("utf-16"), "Line 2 contains a NUL"),
        (b"<!doctype html><p>Hi, there\n", "looks like HTML"),
        (b'{"a": 1, "b": 2}', "JSON"),
        (b"a,b\n1,2\n1,2,3\n", "Line 3 has 3 fields"),
        (b'a,b\n1,"2\n', "Line 2 is not CSV"),
        (b'a,b\n"1"x,2\n', "Line 2 is not CSV"),
        (b"a,b\n1," + b"x" * 200_000, "field larger than field limit"),
        (b"a\n" + b"x " * 1_000_000, "Line 2 has over 1048576 characters"),
        (b",".join(b"%d" % number for number in range(201)), "at most 200 columns"),
        (b"a,b\n\x81,2\n", "Save the file as UTF-8"),
        (b"\xff\xfea", "Save the file as UTF-8"),
    ],
)
def test_invalid_csv_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(table.NotATable, match=re.escape(message)):
        summary_of(data)


def test_errors_of_an_upload(client: FlaskClient, finished: Callable[..., dict[str, Any]]) -> None:
    start = client.post("/csv-summary", data={"file": (io.BytesIO(b"a,b\n1,2,3\n"), "x.csv")})
    assert finished(start)["Error"].startswith("422 Unprocessable ")
    assert "Line 2 has 3 fields" in json_of(client.get(start.headers["Location"]))["Error"]
    assert client.get(start.headers["Location"] + "/result").status_code == 422
    assert finished(client.post("/csv-summary"))["Error"].startswith(
        "400 Bad Request: Send a CSV file"
    )


@pytest.mark.parametrize("text", ['\n"', ',"', "\n'a\"", ",'b"])
def test_the_delimiter_of_a_hostile_file_is_found_quickly(text: str) -> None:
    began = os.times().user
    table.find_delimiter((text * table.SAMPLE)[: table.SAMPLE])
    assert os.times().user - began < 2


def test_a_large_file_is_not_loaded_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.csv"
    with path.open("w") as file:
        file.write("number,text\n")
        for number in range(8_000):
            file.write(f"{number},{'x' * 1000}\n")
    tracemalloc.start()
    try:
        with path.open("rb") as file, testing.fake_task():
            assert csv_summary.summarise(file)["rows"] == 8_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 8_000_000
    assert peak < 4_000_000


def test_a_summary_can_be_stopped() -> None:
    data = b"a\n" + b"1\n" * 5_000
    with testing.fake_task() as task:
        task._execution.ask_to_stop()
        with pytest.raises(TaskAborted):
            csv_summary.summarise(io.BytesIO(data))


# People and permission


def test_sign_in_and_sign_out(client: FlaskClient) -> None:
    assert "Not signed in" in client.get("/").text
    answer = client.post(
        "/sign-in", data={"name": "alice", "password": "alice"}, follow_redirects=True
    )
    assert "Signed in as <strong>alice</strong>" in answer.text
    cookie = client.get_cookie("session")
    assert cookie is not None and cookie.http_only and cookie.same_site == "Lax"
    start = client.put("/auth/asyncUsing")
    assert json_of(client.delete(start.headers["Location"]))["User"] == "alice"
    assert "Not signed in" in client.post("/sign-out", follow_redirects=True).text
    assert client.put("/auth/asyncUsing").status_code == 401


@pytest.mark.parametrize(
    ("name", "password"), [("alice", "bob"), ("nobody", "alice"), ("", ""), ("alice", "")]
)
def test_a_wrong_password_is_refused(client: FlaskClient, name: str, password: str) -> None:
    answer = client.post(
        "/sign-in", data={"name": name, "password": password}, follow_redirects=True
    )
    assert "password is wrong" in answer.text and "Not signed in" in answer.text
    basic = client.get("/tasks", auth=(name, password))
    assert basic.status_code == 401
    assert basic.headers["WWW-Authenticate"].lower().startswith("basic ")


def test_an_unknown_person_in_the_session_is_signed_out(client: FlaskClient) -> None:
    with client.session_transaction() as session:
        session["person"] = "dave"
    assert "Not signed in" in client.get("/").text


def test_each_demo_password_is_the_name() -> None:
    assert [people.authenticate(name, name) for name in people.PEOPLE] == list(
        people.PEOPLE.values()
    )


def statuses(client: FlaskClient, method: str, path: str) -> dict[str, int]:
    """Return the status that each of three people gets."""
    return {
        name: client.open(path, method=method, auth=(name, name)).status_code
        for name in ("bob", "carol", "alice")
    }


@pytest.fixture
def long_naps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tasks of the routes under ``/auth`` run until they are stopped."""
    doze = sleepers.doze
    monkeypatch.setattr(sleepers, "doze", lambda sleep_time, message: doze(600, message))


@pytest.mark.usefixtures("long_naps")
def test_permissions(client: FlaskClient) -> None:
    url = client.put("/auth/asyncUsing", auth=("alice", "alice")).headers["Location"]
    assert statuses(client, "GET", url) == {"bob": 200, "carol": 404, "alice": 200}
    assert statuses(client, "DELETE", url) == {"bob": 403, "carol": 404, "alice": 200}
    url = client.put("/auth/asyncState", auth=("alice", "alice")).headers["Location"]
    assert client.delete(url, auth=("bob", "bob")).status_code == 200
    url = client.put(
        "/auth/asyncParam?reader=carol&reader=&reader=dave", auth=("alice", "alice")
    ).headers["Location"]
    assert statuses(client, "GET", url) == {"bob": 404, "carol": 200, "alice": 200}
    assert client.delete(url, auth=("alice", "alice")).status_code == 200


def test_one_click_signs_a_person_in(client: FlaskClient) -> None:
    page = client.get("/").text
    forms = re.findall(r'<form class="person".*?</form>', page, re.DOTALL)
    assert len(forms) == len(people.PEOPLE)
    fields = dict(re.findall(r'name="(\w+)" value="(\w+)"', forms[1]))
    page = client.post("/sign-in", data=fields, follow_redirects=True).text
    assert "Signed in as <strong>bob</strong>" in page
    assert "Sign in as bob" not in page and "Sign in as alice" in page


def test_the_board_lists_the_tasks_of_the_visitor_only(client: FlaskClient) -> None:
    starts = {
        person: client.put("/auth/asyncUsing", auth=(person, person))
        for person in ("alice", "bob", "carol")
    }
    starts["nobody"] = client.put("/asyncUsing")

    def listed(path: str, auth: tuple[str, str] | None) -> set[str]:
        page = client.get(path, auth=auth).text
        return {
            name for name, start in starts.items() if f'href="{start.headers["Location"]}"' in page
        }

    for path in ("/", "/board"):
        assert listed(path, None) == {"nobody"}
        for person in ("alice", "bob", "carol"):
            assert listed(path, (person, person)) == {person}


def test_the_board_shows_the_latest_tasks(client: FlaskClient) -> None:
    starts = [client.post("/primes/1") for _ in range(start_page.MAX_SHOWN + 1)]
    shown = re.findall(r'<li data-task="([^"]+)"', client.get("/board").text)
    assert shown == [json_of(start)["Id"] for start in starts[:0:-1]]


def test_the_board_shows_state_progress_and_error(
    client: FlaskClient, finished: Callable[..., dict[str, Any]]
) -> None:
    assert "There are no tasks yet" in client.get("/board").text
    finished(client.post("/primes/1000"))
    board = client.get("/board").text
    assert "<code>POST /primes/1000</code>" in board
    assert '<span class="state Completed">Completed</span>' in board
    assert '<progress max="100" value="100' in board and ">100 %<" in board
    finished(client.post("/tour", data={"traveller": "x" * 41}))
    board = client.get("/board").text
    assert "400 Bad Request: The traveller&#39;s name is too long" in board
    assert 'class="stop"' not in board
    client.put("/asyncUsing")
    assert 'class="stop"' in client.get("/board").text


def test_a_form_leads_to_the_page_of_its_task_and_back(client: FlaskClient) -> None:
    browser = {"Accept": "text/html,*/*;q=0.8"}
    page = client.get("/").text
    forms = re.findall(r'<form class="work" method="post" action="([^"]+)"', page)
    assert forms == [work.path for work in works.works("http://localhost")]
    start = client.post(forms[0], data={"next": "/", "traveller": "Ada"}, headers=browser)
    assert start.status_code == 303
    task_page = client.get(start.headers["Location"], headers=browser)
    assert "flask_asyncroute</a>" in task_page.text and 'class="person"' in task_page.text
    policy = task_page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    client.delete(start.headers["Location"].partition("?")[0])


def test_the_start_page_under_a_path_prefix(client: FlaskClient) -> None:
    prefix = {"SCRIPT_NAME": "/demo"}
    page = client.get("/", environ_overrides=prefix).text
    for text in ('action="/demo/tour"', 'src="/demo/static/board.js"', 'data-url="/demo/board"'):
        assert text in page
    assert 'data-events="/demo/tasks/events"' in page
    assert "http://localhost/demo/tour" in page
    start = client.post("/tour", environ_overrides=prefix)
    assert json_of(start)["Sse"]["Url"] == f"{start.headers['Location']}/events"
    assert start.headers["Location"].startswith("/demo/task/")
    client.delete(start.headers["Location"].removeprefix("/demo"))


# The page and its security headers


def test_the_page_has_security_headers(client: FlaskClient) -> None:
    answer = client.get("/")
    assert answer.headers["Cache-Control"] == "no-store"
    policy = answer.headers["Content-Security-Policy"]
    assert (
        policy.startswith("default-src 'none';")
        and "unsafe" not in policy
        and "frame-ancestors 'none'" in policy
    )
    assert "script-src 'self'; connect-src 'self';" in policy
    assert re.findall(r"<script[^>]*>(.*?)</script>", answer.text, re.DOTALL) == [""]
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", answer.text)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "script" not in client.get("/tasks").headers["Content-Security-Policy"]


def test_the_script_inserts_no_text_as_html(client: FlaskClient) -> None:
    with client.get("/static/board.js") as answer:
        script = answer.text
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", script
    )
    page = client.get("/").text
    ids_in_script = set(re.findall(r'part\("(\w+)"\)', script))
    assert ids_in_script and ids_in_script <= set(re.findall(r'\sid="(\w+)"', page))


@pytest.mark.parametrize("host", ["demo.example:8080", "localhost"])
def test_commands_use_the_host_of_the_request(client: FlaskClient, host: str) -> None:
    assert (
        f"curl -i -X PUT http://{host}/asyncParam" in client.get("/", headers={"Host": host}).text
    )


def test_commands_are_quoted() -> None:
    root = "http://x/$(reboot)"
    commands = [
        command
        for group in trials.trials(root)
        for trial in group.trials
        for command in trial.commands
    ]
    for command in [*commands, *(work.command for work in works.works(root))]:
        assert re.search(r"'http://x/\$\(reboot\)[^']*'", command), command


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 202),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost"}, 202),
        ({"Sec-Fetch-Site": "none"}, 202),
        ({"Origin": "http://localhost"}, 202),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://evil.example"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://other.localhost"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[x"}, 403),
    ],
)
def test_cross_site_requests_are_refused(
    client: FlaskClient, headers: dict[str, str], status: int
) -> None:
    assert client.post("/primes/10", headers=headers).status_code == status
    assert client.post("/sign-in", headers=headers).status_code == (303 if status == 202 else 403)
    assert client.get("/", headers=headers).status_code == 200


def test_the_secret_key_is_created_once(tmp_path: Path) -> None:
    folder = tmp_path / "instance"
    keys: list[str] = []
    threads = [threading.Thread(target=lambda: keys.append(secret_key(folder))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 16 and len(set(keys)) == 1 and len(keys[0]) == 64
    assert [path.name for path in folder.iterdir()] == ["secret_key"]
    assert (folder / "secret_key").stat().st_mode & 0o077 == 0


def test_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASK_ASYNCROUTE_RETENTION", "60")
    monkeypatch.setenv("FLASK_SECRET_KEY", "from the environment")
    app = create_app({"ASYNCROUTE_STORE": "memory://"}, str(tmp_path))
    assert (app.config["ASYNCROUTE_RETENTION"], app.config["SECRET_KEY"]) == (
        60,
        "from the environment",
    )
    assert list(tmp_path.iterdir()) == []


# With Celery


def test_the_celery_route_exists_only_with_settings_of_celery(app: Flask) -> None:
    assert "celery" not in app.extensions
    assert "/elsewhere/<int:seconds>" not in {rule.rule for rule in app.url_map.iter_rules()}


def test_the_celery_route_reports_its_process(tmp_path: Path) -> None:
    pytest.importorskip("celery")
    settings = {"TESTING": True, "CELERY": {"broker_url": "memory://"}}
    app = create_app(settings, str(tmp_path / "instance"))
    assert app.extensions["celery"].conf.broker_url == "memory://"
    with testing.fake_task():
        view = inspect.unwrap(app.view_functions["elsewhere.elsewhere"])
        assert view(seconds=0)["process"] == os.getpid()
        with pytest.raises(BadRequest, match="at most 60 seconds"):
            view(seconds=61)


def test_a_missing_redis_is_explained_without_its_password() -> None:
    pytest.importorskip("celery")
    from example_app.with_celery import unreachable

    message = unreachable("redis://:secret@127.0.0.1:1/0")
    assert message is not None and "REDIS_URL=" in message and "127.0.0.1:1" in message
    assert "secret" not in message


def test_the_demo_ends_when_one_of_its_processes_ends() -> None:
    pytest.importorskip("celery")
    from example_app.with_celery import run_all

    python = [sys.executable, "-c"]
    commands = {
        "Sleeper": [*python, "import time; time.sleep(60)"],
        "Leaver": [*python, "raise SystemExit(3)"],
    }
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run_all(commands, dict(os.environ)) == "Leaver has ended with the exit code 3."
    finally:
        signal.signal(signal.SIGTERM, before)
