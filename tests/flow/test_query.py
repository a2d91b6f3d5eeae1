"""The query operation: three query styles, complete pages, cursors, and refused queries."""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote, urlencode
from xml.etree import ElementTree

import pytest
import yaml
from flask import abort
from werkzeug.test import EnvironBuilder, run_wsgi_app

from flask_asyncroute import Access, Permission, current_task
from tests.support.flow import Flow, assert_not_cached, loaded, problem
from tests.support.timing import thread_seconds

MakeFlow = Callable[..., Flow]

FIELDS = [
    "Id", "AsyncRouteId", "State", "IsCompleted", "Cancellable", "User", "CreationTime", "StartingTime", "CompletedTime", "ExpireTime", "Error", "Url",
    "Method", "Progress",
]  # fmt: skip
OPERATORS = ["EQ", "NE", "GT", "LT", "GE", "LE", "LIKE", "NOTLIKE"]


@pytest.fixture
def tasks(
    flow: Flow, begun: threading.Semaphore, gate: threading.Event
) -> dict[str, dict[str, Any]]:
    """Return various tasks by name, oldest first. Their ids are ``id-<name>``."""
    names: Iterator[str] = iter([])
    everything: dict[str, dict[str, Any]] = {}

    def slow() -> None:
        begun.release()
        gate.wait(10)

    def progressing() -> None:
        current_task.progress = 33.33
        abort(409, "Café * ? 100%")

    id_generator: Callable[[], str] = lambda: f"id-{next(names)}"  # noqa: E731
    flow.route("/plain", endpoint="plain", id_generator=id_generator)(lambda: "x" * 10)
    fixed = {
        "cancellable": False,
        "timeout": None,
        "permission": Permission(read=Access(["anna"])),
        "methods": ["PUT"],
    }
    flow.route("/fixed", endpoint="fixed", id_generator=id_generator, **fixed)(lambda: 1)
    flow.route("/bad", endpoint="bad", id_generator=id_generator, name="Büro")(progressing)
    flow.route("/slow", endpoint="slow", id_generator=id_generator, max_workers=1)(slow)
    order = [
        ("plain-1", "POST", "/plain?secret=1", None), ("plain-2", "POST", "/plain", "anna"), ("fixed", "PUT", "/fixed", "ünal"), ("bad", "POST", "/bad", "anna"),
        ("running", "POST", "/slow", None), ("waiting", "POST", "/slow", "anna"), ("aborted", "POST", "/slow", None),
    ]  # fmt: skip
    names = iter([name for name, *_ in order])
    for _, method, path, user in order:
        flow.headers = {} if user is None else {"X-User": user}
        task = flow.start(path, method)
        flow.headers = {"X-User": "anna"}
        if path != "/slow":
            flow.ended(task)
    assert begun.acquire(timeout=5)
    flow.stop("id-aborted")
    for name, *_ in order:
        everything[name] = flow.get(f"id-{name}")
    assert everything["running"]["State"] == "Running"
    return everything


def expected(tasks: dict[str, dict[str, Any]], fits: Callable[[dict[str, Any]], Any]) -> list[str]:
    return [task["Id"] for task in reversed(tasks.values()) if fits(task)]


def in_all_styles(flow: Flow, conditions: dict[str, Any]) -> list[str]:
    """Query in each style that can express the conditions; all must agree."""
    answers: list[Any] = []
    for path in ("/tasks/query", "/tasks"):
        response = flow.request("POST", path, json=conditions)
        assert response.status_code == 200, response.text
        answers.append(response.get_json())
    short: list[tuple[str, str]] = []
    long: list[tuple[str, str]] | None = []
    simple: list[tuple[str, str]] | None = []
    for field, given in conditions.items():
        for one in given if isinstance(given, list) else [given]:
            value, operator = text_of(one["value"]), one.get("op", "EQ")
            short.append((f"filter[{field}][{operator}]", value))
            if isinstance(given, list):
                long = simple = None
                continue
            if long is not None:
                long += [(f"filter[{field}][op]", operator), (f"filter[{field}][value]", value)]
            if simple is not None:
                simple = [*simple, (field, value)] if operator.upper() == "EQ" else None
    answers.append(flow.query(urlencode(short)))
    if long is not None:
        answers.append(flow.query(urlencode(long)))
    if simple is not None:
        answers.append(flow.query(urlencode(simple)))
        pode = ",".join(f"{field}={quote(value, safe='')}" for field, value in simple)
        answers.append(flow.query(pode))
    assert all(answer == answers[0] for answer in answers)
    return [task["Id"] for task in answers[0]]


def text_of(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_without_conditions_all_tasks_are_listed_newest_first(
    flow: Flow, tasks: dict[str, Any]
) -> None:
    response = flow.request("GET", "/tasks")
    assert response.status_code == 200 and response.content_type == "application/json"
    assert_not_cached(response)
    assert "Link" not in response.headers
    assert [task["Id"] for task in response.get_json()] == expected(tasks, lambda task: True)
    assert response.get_json()[-1] == tasks["plain-1"], "a list has the same task objects as Get"
    assert flow.request("POST", "/tasks", json={}).get_json() == response.get_json()
    assert (
        flow.request(
            "POST", "/tasks/query", data="{}", content_type="application/json; charset=UTF-8"
        ).status_code
        == 200
    )


def test_all_query_styles_give_the_same_result(flow: Flow, tasks: dict[str, Any]) -> None:
    done = expected(tasks, lambda task: task["State"] == "Completed" and task["Cancellable"])
    assert len(done) == 2
    document = {
        "State": {"op": "EQ", "value": "Completed"},
        "Cancellable": {"op": "EQ", "value": True},
    }
    assert in_all_styles(flow, document) == done
    for query in (
        "filter[State][op]=EQ&filter[State][value]=Completed&filter[Cancellable][value]=true", "State=Completed,Cancellable=True", "State=Completed&Cancellable=True",
        "state=completed&CANCELLABLE=TRUE", "State=COMPLETED,cancellable=true", "filter%5BState%5D%5BEQ%5D=Completed&filter[cancellable][eq]=true",
    ):  # fmt: skip
        assert flow.ids(query) == done, query
    assert [
        task["Id"]
        for task in flow.request(
            "POST",
            "/tasks",
            json={"state": {"value": "completed"}, "CANCELLABLE": {"op": "eq", "value": True}},
        ).get_json()
    ] == done


def test_two_conditions_on_one_field(flow: Flow, tasks: dict[str, Any]) -> None:
    low, high = tasks["plain-2"]["CreationTime"], tasks["running"]["CreationTime"]
    expected_ids = expected(tasks, lambda task: low <= task["CreationTime"] < high)
    assert len(expected_ids) == 3
    assert (
        in_all_styles(
            flow, {"CreationTime": [{"op": "GE", "value": low}, {"op": "LT", "value": high}]}
        )
        == expected_ids
    )


def matches(field: str, operator: str, value: Any) -> Callable[[dict[str, Any]], bool]:
    """Return a plain implementation of a condition, which is false for a missing field."""

    def key(found: Any) -> Any:
        if field.endswith("Time"):
            return datetime.fromisoformat(found)
        if field in ("State", "Method"):
            return found.lower()
        return found

    def like(text: str, pattern: str) -> bool:
        parts = "".join(
            {"*": ".*", "?": "."}.get(character, re.escape(character)) for character in pattern
        )
        return re.search(parts, text, re.DOTALL | re.IGNORECASE | re.ASCII) is not None

    rules: dict[str, Callable[[Any, Any], bool]] = {
        "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b, "GT": lambda a, b: a > b, "LT": lambda a, b: a < b, "GE": lambda a, b: a >= b,
        "LE": lambda a, b: a <= b, "LIKE": like, "NOTLIKE": lambda a, b: not like(a, b),
    }  # fmt: skip

    def fits(task: dict[str, Any]) -> bool:
        if field not in task:
            return False
        if operator in ("LIKE", "NOTLIKE"):
            return rules[operator](task[field], value)
        return rules[operator](key(task[field]), key(value))

    return fits


VALUES: dict[str, list[Any]] = {
    "Id": ["id-bad", "ID-BAD", "id-", "-P"],
    "AsyncRouteId": ["[Post]/plain", "Büro", "bÜro", "[", "b*o", "/pl?in"],
    "State": ["Completed", "aborted"],
    "IsCompleted": [True, False],
    "Cancellable": [True, False],
    "User": ["anna", "Anna", "ünal", "ü", "a*a", ""],
    "Error": [
        "409 Conflict: Café * ? 100%",
        "Aborted by the user",
        "caf",
        "CAFÉ",
        "100%",
        "_",
        "a*d b? t",
        "\\",
    ],
    "Url": ["http://localhost/plain", "/plain", "secret"],
    "Method": ["put", "POST", "P*T"],
    "Progress": [33.33, 0, 100, 33.3],
}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_with_every_operator(flow: Flow, tasks: dict[str, Any], field: str) -> None:
    values = VALUES.get(field) or [
        tasks["fixed"].get(field) or tasks["bad"][field],
        "2020-01-01T00:00:00Z",
    ]
    for operator, value in itertools.product(OPERATORS, values):
        document = {field: {"op": operator, "value": value}}
        is_text = isinstance(value, str) and not field.endswith("Time")
        if (operator.endswith("LIKE") and not is_text) or (
            isinstance(value, bool) and operator not in ("EQ", "NE")
        ):
            found = problem(flow.request("POST", "/tasks", json=document), 400, "invalid-query")
            assert field in found["detail"]
            continue
        if field == "State" and not operator.endswith("LIKE") and operator not in ("EQ", "NE"):
            assert flow.request("POST", "/tasks", json=document).status_code in (200, 400)
            continue
        assert in_all_styles(flow, document) == expected(tasks, matches(field, operator, value)), (
            operator,
            value,
        )


@pytest.mark.covers("A31")
def test_like_is_not_a_regular_expression(flow: Flow, tasks: dict[str, Any]) -> None:
    for pattern in (
        ".*",
        "(a+)+$",
        "[a-z]",
        "%",
        "_",
        "\\",
        "'",
        '"',
        "^",
        "$",
        "|",
        "%%",
        "a{2}",
        "(?i)",
        "\\d",
    ):
        found = in_all_styles(flow, {"Error": {"op": "LIKE", "value": pattern}})
        assert found == expected(tasks, matches("Error", "LIKE", pattern)), pattern
    assert in_all_styles(flow, {"Error": {"op": "LIKE", "value": "*" * 8}}) == expected(
        tasks, lambda task: "Error" in task
    )
    begun = time.monotonic()
    flow.ids("filter[Error][LIKE]=" + "*a" * 8)
    assert time.monotonic() - begun < 0.2
    problem(flow.request("GET", "/tasks?filter[Error][LIKE]=" + "*a" * 9), 400, "invalid-query")


def test_times_are_instants(flow: Flow, tasks: dict[str, Any]) -> None:
    moment = datetime.fromisoformat(tasks["bad"]["CreationTime"])
    plain = moment.replace(tzinfo=None).isoformat()
    spellings = [
        f"{plain}Z", f"{plain}z", plain, f"{plain}+00:00", f"{plain}-00:00", f"{plain}000Z", plain.replace("T", "t"), plain.replace("T", " "),
        (moment + timedelta(hours=2)).replace(tzinfo=None).isoformat() + "+02:00", (moment - timedelta(hours=5, minutes=30)).replace(tzinfo=None).isoformat() + "-05:30",
    ]  # fmt: skip
    for text in spellings:
        assert in_all_styles(flow, {"CreationTime": {"value": text}}) == ["id-bad"], text
    unescaped = (moment + timedelta(hours=2)).replace(tzinfo=None).isoformat() + "+02:00"
    assert flow.ids(f"CreationTime={unescaped}") == ["id-bad"], "a space in an offset is a +"
    assert flow.ids(f"filter[CreationTime][EQ]={unescaped}") == ["id-bad"]


def test_commas_in_values(flow: Flow) -> None:
    flow.route("/a,b/<x>", endpoint="work", name="one,two")(lambda x: 1)
    flow.run("/a,b/c")
    for query in (
        "AsyncRouteId=one%2Ctwo",
        "AsyncRouteId=one,two",
        "AsyncRouteId=one,two,State=Completed",
        "State=Completed,AsyncRouteId=one,two",
    ):
        assert len(flow.query(query)) == 1, query
    assert (
        "%2C"
        in problem(flow.request("GET", "/tasks?AsyncRouteId=one,two=3"), 400, "invalid-query")[
            "detail"
        ]
    )
    assert flow.query("AsyncRouteId=one%2Ctwo=3") == []
    assert flow.query("Url=http://localhost/a,b/c")[0]["State"] == "Completed"


NAMES = [
    "a&b",
    "a=b",
    "a+b",
    "a b",
    "100%",
    "ü\U0001f600",
    "a;b",
    "x[y]",
    "'",
    '"',
    "\\",
    "#",
    "a\tb",
    "é",
    "e\u0301",
    "É",
    "E",
    "e",
]


def test_values_with_special_characters(make_flow: MakeFlow) -> None:
    """Strings compare by code point, without folding of letter case or normalization."""
    flow = make_flow()
    for number, name in enumerate(NAMES):
        flow.route(f"/{number}", endpoint=f"e{number}", name=name, executor="immediate")(lambda: 1)
    for number, name in enumerate(NAMES):
        task = flow.start(f"/{number}")
        assert in_all_styles(flow, {"AsyncRouteId": {"value": name}}) == [task["Id"]]


# -- limit, sort, pages
# ------------------------------------------------------------------------------------------------------


@pytest.mark.covers("A28")
@pytest.mark.parametrize(
    "limit",
    [
        "0",
        "-1",
        "a",
        "",
        "NaN",
        "1.5",
        "+5",
        " 5",
        "5 ",
        "1e2",
        "٣",
        "0x5",
        "1_0",
        "-0",
        "00",
        "None",
        "5,5",
        "９",
    ],
)
def test_invalid_limits_are_refused(make_flow: MakeFlow, limit: str) -> None:
    flow = make_flow()
    for method in ("GET", "POST"):
        response = flow.request(
            method, f"/tasks?limit={quote(limit)}", json={} if method == "POST" else None
        )
        assert "limit" in problem(response, 400, "invalid-query")["detail"]


@pytest.mark.covers("A28")
def test_limits(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.route(endpoint="work", executor="immediate")(lambda: 1)
    for _ in range(510):
        flow.start()
    for limit, count in (
        ("1", 1),
        ("50", 50),
        ("050", 50),
        ("500", 500),
        ("501", 500),
        (str(2**63), 500),
        ("9" * 5000, 500),
    ):
        assert len(flow.query(f"limit={limit}")) == count
    assert len(flow.query()) == 50
    assert len(flow.request("POST", "/tasks?limit=3", json={}).get_json()) == 3


def ids_of_pages(
    flow: Flow, query: str, method: str = "GET", document: Any = None
) -> list[list[str]]:
    """Follow the Link header to the last page; return the ids of each page."""
    pages: list[list[str]] = []
    target = f"/tasks?{query}"
    while True:
        response = flow.request(method, target, json=document)
        assert response.status_code == 200, response.text
        pages.append([task["Id"] for task in response.get_json()])
        link = response.headers.get("Link")
        if link is None:
            return pages
        found = re.fullmatch(r'<(/tasks\?[!-~]*)>; rel="next"', link)
        assert found is not None, link
        target = found[1]
        assert len(pages) < 500


SORTS = [
    f"{sign}{field}Time" for sign in ("", "-") for field in ("Creation", "Starting", "Completed")
]


@pytest.mark.parametrize("sort", SORTS)
def test_links_reach_each_task_exactly_once(flow: Flow, tasks: dict[str, Any], sort: str) -> None:
    field, descending = sort.lstrip("-"), sort.startswith("-")
    present = sorted(
        (task for task in tasks.values() if field in task),
        key=lambda task: (task[field], task["CreationTime"], task["Id"]),
        reverse=descending,
    )
    missing = sorted(
        (task for task in tasks.values() if field not in task),
        key=lambda task: (task["CreationTime"], task["Id"]),
        reverse=descending,
    )
    expected_ids = [task["Id"] for task in (*present, *missing)]
    assert flow.ids(f"sort={sort}") == expected_ids
    for limit in range(1, len(expected_ids) + 2):
        for method in ("GET", "POST"):
            pages = ids_of_pages(
                flow, f"sort={sort}&limit={limit}", method, {} if method == "POST" else None
            )
            assert [task_id for page in pages for task_id in page] == expected_ids
            assert [len(page) for page in pages[:-1]] == [limit] * (len(pages) - 1) and pages[-1]


def test_the_link_keeps_conditions_sort_and_limit(flow: Flow, tasks: dict[str, Any]) -> None:
    """For POST, the client sends the body again."""
    expected_ids = expected(tasks, lambda task: task["IsCompleted"])
    query = "filter[IsCompleted][EQ]=true&sort=-CreationTime&limit=2"
    assert [task_id for page in ids_of_pages(flow, query) for task_id in page] == expected_ids
    assert [
        task_id
        for page in ids_of_pages(flow, "IsCompleted=True,Method=post&limit=2")
        for task_id in page
    ] == [one for one in expected_ids if one != "id-fixed"]
    document = {"IsCompleted": {"value": True}}
    assert [
        task_id for page in ids_of_pages(flow, "limit=2", "POST", document) for task_id in page
    ] == expected_ids


def test_pages_have_each_permanent_task_once_while_others_change(flow: Flow) -> None:
    ids = map("t{:03}".format, itertools.count())
    flow.route(endpoint="work", id_generator=lambda: next(ids), executor="immediate")(lambda: 1)
    first = [flow.start()["Id"] for _ in range(20)]
    seen: list[str] = []
    target: str | None = "/tasks?limit=3"
    to_purge = {"t005", "t010"}
    while target is not None:
        response = flow.request("GET", target)
        seen += [task["Id"] for task in response.get_json()]
        flow.start()
        for task_id in list(to_purge):
            if task_id not in seen:
                flow.purge(task_id)
                to_purge.discard(task_id)
                first.remove(task_id)
                break
        link = response.headers.get("Link")
        target = None if link is None else link[1 : link.index(">")]
    assert sorted(task_id for task_id in seen if task_id in first) == sorted(first)
    assert len(seen) == len(set(seen))


def test_tasks_with_equal_times_are_ordered_by_id(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_asyncroute.request.submission.now_us", lambda: 1_700_000_000_000_000)
    ids = iter(["b", "a", "C", "~", "10", "9", "é".encode().hex()])
    flow.route(endpoint="work", id_generator=lambda: next(ids), executor="immediate")(lambda: 1)
    ids_started = [flow.start()["Id"] for _ in range(7)]
    for sort, reverse in (("CreationTime", False), ("-CreationTime", True)):
        expected_ids = sorted(ids_started, reverse=reverse)
        assert flow.ids(f"sort={sort}") == expected_ids
        assert [
            one for page in ids_of_pages(flow, f"sort={sort}&limit=2") for one in page
        ] == expected_ids


def test_a_link_under_a_mount_point_that_is_not_ascii(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.route(endpoint="work", executor="immediate")(lambda: 1)
    for _ in range(3):
        flow.start()
    mount = "/Bücher €/x".encode().decode("latin-1")
    response = flow.request("GET", "/tasks?limit=1", environ_overrides={"SCRIPT_NAME": mount})
    assert response.headers["Link"].startswith("</B%C3%BCcher%20%E2%82%AC/x/tasks?limit=1&cursor=")


def test_a_link_keeps_the_query_string(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.route(endpoint="work", name='ü <x>, "y"', executor="immediate")(lambda: 1)
    for _ in range(3):
        flow.start()
    for query in (
        "AsyncRouteId=%C3%BC+%3Cx%3E%2C%20%22y%22&limit=1",
        'limit=1&AsyncRouteId=ü <x>%2C "y"',
        "&&limit=1&",
        "filter[AsyncRouteId][LIKE]=*&limit=1",
    ):
        pages = ids_of_pages(flow, query)
        assert [len(page) for page in pages] == [1, 1, 1], query


@pytest.mark.covers("A34")
@pytest.mark.parametrize(
    "sort",
    [
        "id",
        "-User",
        "id desc; --",
        "CreationTime,Id",
        "--CreationTime",
        "+CreationTime",
        "",
        "-",
        "Creation Time",
        "creationtime " + "x" * 1000,
    ],
)
def test_invalid_sorts_are_refused(make_flow: MakeFlow, sort: str) -> None:
    flow = make_flow()
    assert (
        "sort"
        in problem(flow.request("GET", f"/tasks?sort={quote(sort)}"), 400, "invalid-query")[
            "detail"
        ]
    )


# -- cursors
# -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cursor(flow: Flow) -> str:
    """Return the cursor of a list for anna with two tasks per page."""
    flow.route(endpoint="work", executor="immediate")(lambda: 1)
    flow.headers = {"X-User": "anna"}
    for _ in range(5):
        flow.start()
    link = flow.request("GET", "/tasks?limit=2&State=Completed").headers["Link"]
    return re.search(r"cursor=([^>&]+)", link)[1]  # type: ignore[index]


@pytest.mark.covers("A29")
def test_a_cursor_is_opaque_and_needs_no_escaping(flow: Flow, cursor: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9._-]+", cursor)
    assert len(flow.ids(f"State=Completed&cursor={cursor}")) == 3, "another limit is allowed"
    assert len(flow.ids(f"limit=2&State=Completed&cursor={cursor}")) == 2
    assert len(flow.ids(f"cursor={cursor}&filter[State][EQ]=completed")) == 3, (
        "the query is the same in another style"
    )


@pytest.mark.covers("A29")
def test_invalid_cursors_are_refused(flow: Flow, cursor: str) -> None:
    changed = [
        cursor[:-1], cursor + "A", cursor[:-1] + ("A" if cursor[-1] != "A" else "B"), ("A" if cursor[0] != "A" else "B") + cursor[1:], cursor[::-1], cursor.swapcase(),
        cursor + "=", cursor * 2, "", "x", "x" * 10_000, "%00", "%ff", "null", "0", "..", "é", "\U0001f600",
        *(cursor[:n] + ("A" if cursor[n] != "A" else "B") + cursor[n + 1 :] for n in range(0, len(cursor), 3)),
    ]  # fmt: skip
    details = set()
    for one in changed:
        given = one if one.startswith("%") else quote(one)
        details.add(
            problem(
                flow.request("GET", f"/tasks?State=Completed&cursor={given}"), 400, "invalid-query"
            )["detail"]
        )
    assert all("ursor" in detail or "UTF-8" in detail for detail in details)


@pytest.mark.covers("A29")
def test_a_cursor_of_another_query_or_caller_is_refused(flow: Flow, cursor: str) -> None:
    for query in (
        "",
        "State=Failed&",
        "State=Completed&Cancellable=true&",
        "State=Completed&sort=CreationTime&",
        "State=Completed&sort=-StartingTime&",
    ):
        assert (
            "cursor"
            in problem(flow.request("GET", f"/tasks?{query}cursor={cursor}"), 400, "invalid-query")[
                "detail"
            ]
        )
    for user in ("bert", "Anna", "anna;groups=x"):
        response = flow.request(
            "GET", f"/tasks?State=Completed&cursor={cursor}", headers={"X-User": user}
        )
        assert response.status_code == (200 if user.startswith("anna") else 400)
    flow.headers = {}
    problem(flow.request("GET", f"/tasks?State=Completed&cursor={cursor}"), 400, "invalid-query")


@pytest.mark.covers("A29")
def test_a_cursor_of_another_store_is_refused(make_flow: MakeFlow, flow: Flow, cursor: str) -> None:
    other = make_flow()
    other.headers = flow.headers
    problem(other.request("GET", f"/tasks?State=Completed&cursor={cursor}"), 400, "invalid-query")


@pytest.mark.covers("A29")
@pytest.mark.usefixtures("separate_processes")
def test_a_cursor_is_valid_in_another_process(make_app: Any, tmp_path: Any) -> None:
    from flask_asyncroute import AsyncRoute

    flows = []
    for _ in range(2):
        app = make_app("shop", ASYNCROUTE_STORE=f"sqlite:///{tmp_path}/shared.db")
        flows.append(Flow(app, AsyncRoute(app)))
    flows[0].route(endpoint="work", executor="immediate")(lambda: 1)
    for _ in range(3):
        flows[0].start()
    link = flows[0].request("GET", "/tasks?limit=2").headers["Link"]
    response = flows[1].request("GET", link[1 : link.index(">")])
    assert response.status_code == 200 and len(response.get_json()) == 1


# -- refused queries
# ---------------------------------------------------------------------------------------------------------

BAD_QUERIES: list[tuple[str, str]] = [
    ("Colour=red", "Colour"), ("id%3B%20DROP%20TABLE=x", "DROP TABLE"), ("%22=x", '"'), ("__class__=x", "__class__"), ("user.password=x", "user.password"),
    ("=x", "''"), ("State", "State"), ("filter[Colour][EQ]=x", "Colour"), ("filter[State][IS]=x", "IS"), ("filter[State][]=x", "''"), ("filter[][EQ]=x", "''"),
    ("filter[State]=x", "filter[State]"), ("filter=x", "filter"), ("filter[State][op]=EQ", "State"), ("filter[State][op]=OR 1=1&filter[State][value]=x", "OR 1"),
    ("filter[State][op]===&filter[State][value]=x", "=="), ("filter[State][op]=&filter[State][value]=x", "''"), ("filter[State][EQ][x]=x", "filter"),
    ("filter[State][EQ", "filter"), ("[State]=x", "State"), ("State=Sleeping", "Sleeping"), ("State=", "State"), ("State=Completed&State=Failed", "State"),
    ("State=Completed&state=Failed", "state"), ("State=Completed,State=Failed", "State"), ("filter[State][EQ]=Completed&filter[State][EQ]=Failed", "State"),
    ("filter[State][EQ]=Completed&filter[state][eq]=Failed", "state"), ("filter[State][op]=EQ&filter[State][value]=Failed&filter[State][value]=x", "State"),
    ("State=Completed&filter[Cancellable][EQ]=true", "Cancellable"), ("limit=5&limit=6", "limit"), ("sort=CreationTime&sort=CreationTime", "sort"), ("cursor=a&cursor=b", "cursor"),
    ("Cancellable=1", "1"), ("Cancellable=yes", "yes"), ("Cancellable=", "Cancellable"), ("IsCompleted=null", "null"), ("filter[Cancellable][GT]=true", "GT"),
    ("filter[Cancellable][LIKE]=true", "LIKE"), ("filter[CreationTime][LIKE]=2026", "LIKE"), ("Progress=٣", "Progress"), ("Progress=1_000", "1_000"),
    ("Progress=%201", "Progress"), ("Progress=1e999", "Progress"), ("Progress=" + "9" * 5000, "Progress"), ("Progress=NaN", "NaN"), ("Progress=inf", "inf"), ("Progress=0x10", "0x10"),
    ("Progress=true", "true"), ("Progress=", "Progress"), ("Progress=1,5", "1,5"), ("CreationTime=1e18", "1e18"), ("CreationTime=NaN", "NaN"), ("CreationTime=-1", "-1"), ("CreationTime=now", "now"),
    ("CreationTime=2026-02-30T00:00:00Z", "2026-02-30"), ("CreationTime=2026-01-01", "2026-01-01"), ("CreationTime=2026-01-01T25:00:00Z", "T25"), ("CreationTime=2026-01-01T00:00:60Z", ":60"),
    ("CreationTime=2026-01-01T00:00:00%2B25:00", "25:00"), ("CreationTime=٢٠٢٦-01-01T00:00:00Z", "CreationTime"), ("CreationTime=", "CreationTime"),
    ("User=" + "x" * 257, "User"), ("Error=%00", "Error"), ("User=a%00b", "User"), ("User=%ED%A0%80", "UTF-8"), ("User=%ff", "UTF-8"), ("%ff=x", "UTF-8"), ("Result=1", "Result"),
    ("Permission=x", "Permission"), ("Stopping=true", "Stopping"), ("owner=x", "owner"), ("endpoint=x", "endpoint"), ("unknown", "unknown"),
    ("&".join(f"filter[CreationTime][{op}]=2026-01-01T00:00:00Z" for op in ("EQ", "NE", "GT", "GE", "LT", "LE", "EQ")), "CreationTime"),
]  # fmt: skip


@pytest.mark.covers("A32", "A33", "A37", "A40", "A42", "A44")
@pytest.mark.parametrize(("query", "culprit"), BAD_QUERIES, ids=lambda value: ascii(value)[:40])
def test_invalid_queries_are_refused(make_flow: MakeFlow, query: str, culprit: str) -> None:
    flow = make_flow()
    found = problem(flow.request("GET", f"/tasks?{query}"), 400, "invalid-query")
    assert culprit in found["detail"]
    assert len(found["detail"]) < 700 and found["detail"].isprintable()


def test_more_than_32_conditions_are_refused(make_flow: MakeFlow) -> None:
    flow = make_flow()
    condition = {"op": "NE", "value": "x"}
    assert flow.request("POST", "/tasks", json={"User": [condition] * 32}).status_code == 200
    found = problem(
        flow.request("POST", "/tasks", json={"User": [condition] * 33}), 400, "invalid-query"
    )
    assert "32" in found["detail"]
    found = problem(
        flow.request("POST", "/tasks", json={"User": [condition] * 20, "Error": [condition] * 13}),
        400,
        "invalid-query",
    )
    assert "User" in found["detail"]


@pytest.mark.covers("A35", "A38")
@pytest.mark.parametrize(
    "query",
    [
        "filter" + "[a]" * 10_000 + "=x", "&".join(f"p{n}=1" for n in range(10_000)), "&".join(["a=1"] * 10_000), "User=" + "x" * 60_000, "x" * 60_000,
        "State=Completed," * 4_000, "&" * 60_000, "filter[" * 9_000, "]" * 60_000, "%" * 60_000, "filter[User][LIKE]=" + "*" * 60_000, "User=" + "a," * 30_000,
        "sort=" + "-CreationTime," * 1000, "User=x" + ",a" * 20_000 + "=1",
    ],
    ids=lambda query: query[:15],
)  # fmt: skip
def test_very_long_queries_are_refused_quickly(make_flow: MakeFlow, query: str) -> None:
    flow = make_flow()
    flow.request("GET", "/tasks")
    environ = EnvironBuilder(path="/tasks", query_string=query).get_environ()
    answers = []
    # Call the app directly, because quoting such a query takes a test client longer than the app.
    took = thread_seconds(
        lambda: answers.append(run_wsgi_app(flow.app, dict(environ), buffered=True))
    )
    body, status, _ = answers[-1]
    assert status[:3] == ("200" if set(query) == {"&"} else "400")
    assert took < 0.1
    assert len(b"".join(body)) < 5000


@pytest.mark.covers("A38")
def test_a_query_string_over_64_kib_is_refused_quickly(make_flow: MakeFlow) -> None:
    flow = make_flow()

    def ask() -> None:
        for query in ("User=" + "x" * 1_000_000, "&".join(f"p{n}=1" for n in range(100_000))):
            assert problem(flow.request("GET", f"/tasks?{query}"), 400, "invalid-query")["detail"]

    assert thread_seconds(ask) < 0.5


BAD_BODIES: list[tuple[Any, str]] = [
    (b"", "empty"), (b"  \n", "empty"), (b"{", "JSON"), (b"nonsense", "JSON"), (b"[]", "object"), (b"null", "object"), (b"5", "object"), (b'"State"', "object"), (b"true", "object"),
    (b"\xef\xbb\xbf{}", "byte order mark"), ("{}".encode("utf-16"), "byte order mark"), ("{}".encode("utf-16-le"), "UTF-16"), ("{}".encode("utf-32-be"), "UTF-"), (b'{"a": "\xff"}', "UTF-8"),
    (b"{} {}", "JSON"), (b"{'State': 1}", "JSON"), (b'{"State": {"value": "Failed"},}', "JSON"), (b"//x\n{}", "JSON"), (b'{"Progress": {"value": NaN}}', "NaN"),
    (b'{"Progress": {"value": Infinity}}', "Infinity"), (b'{"Progress": {"value": 1e999}}', "1e999"), (b'{"Progress": {"value": ' + b"9" * 5000 + b"}}", "digits"),
    (b'{"State": {"value": "Failed"}, "State": {"value": "Failed"}}', "State"), (b'{"State": {"value": "a", "value": "b"}}', "value"), (b'{"State": {"value": "Failed"}, "state": {"value": "Failed"}}', "state"),
    (b"[" * 100_000, "nested"), (b'{"a":' * 100_000, "nested"), (b'{"State": ' + b"[" * 70 + b"]" * 70 + b"}", "nested"), (b'{"User": {"value": "\\u0000"}}', "NUL"), (b'{"User": {"value": "\\ud800"}}', "surrogate"),
    (b'{"\\ud800": {"value": 1}}', "surrogate"), (b'{"Colour": {"value": 1}}', "Colour"), (b'{"State": "Failed"}', "State"), (b'{"State": null}', "State"), (b'{"State": []}', "State"),
    (b'{"State": [[]]}', "State"), (b'{"State": {}}', "State"), (b'{"State": {"op": "EQ"}}', "State"), (b'{"State": {"value": "Failed", "x": 1}}', "x"), (b'{"State": {"op": "", "value": "Failed"}}', "State"),
    (b'{"State": {"op": null, "value": "Failed"}}', "op"), (b'{"State": {"op": ["EQ"], "value": "Failed"}}', "op"), (b'{"State": {"op": "==", "value": "Failed"}}', "=="), (b'{"State": {"value": null}}', "null"),
    (b'{"State": {"value": ["Failed"]}}', "list"), (b'{"State": {"value": {"a": 1}}}', "object"), (b'{"State": {"value": 1}}', "number"), (b'{"Cancellable": {"value": 1}}', "number"),
    (b'{"Cancellable": {"value": "true"}}', "true"), (b'{"Progress": {"value": true}}', "boolean"), (b'{"Progress": {"value": "1"}}', "1"), (b'{"Progress": {"value": null}}', "null"),
    (b'{"CreationTime": {"value": 1700000000}}', "number"), (b'{"CreationTime": {"value": true}}', "boolean"), (b'{"User": {"value": true}}', "boolean"), (b'{"User": {"value": "' + b"x" * 257 + b'"}}', "User"),
    (b'{"": {"value": 1}}', "''"), (b'{"filter": {"State": {"value": "Failed"}}}', "filter"), (b'{"limit": 5}', "limit"),
]  # fmt: skip


@pytest.mark.covers("A39", "A45", "A46", "A48")
@pytest.mark.parametrize(("body", "culprit"), BAD_BODIES, ids=lambda value: ascii(value)[:45])
def test_invalid_bodies_are_refused(make_flow: MakeFlow, body: bytes, culprit: str) -> None:
    flow = make_flow()

    def ask() -> None:
        for path in ("/tasks", "/tasks/query"):
            found = problem(
                flow.request("POST", path, data=body, content_type="application/json"),
                400,
                "invalid-query",
            )
            assert culprit in found["detail"], found["detail"]
            assert len(found["detail"]) < 700 and found["detail"].isprintable()

    assert thread_seconds(ask) < 0.3


@pytest.mark.covers("A50")
@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/xml", "text/xml", "application/yaml", "multipart/form-data; "
                                                                      "boundary=x", "application/x-www-form-urlencoded", "application/octet-stream",
     "application/json; charset=utf-7", "application/json; charset=latin-1", "application/jsonp", "application/problem+json", "text/json", "json", "", ";;", "application/json, text/plain", "*/*"],
)  # fmt: skip
def test_other_content_types_are_refused(make_flow: MakeFlow, content_type: str) -> None:
    flow = make_flow()
    response = flow.request("POST", "/tasks", data=b"{}", content_type=content_type or None)
    problem(response, 415, "unsupported-media-type")


@pytest.mark.covers("A50")
@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        'application/json;charset="UTF-8"',
        "application/json; charset=utf8",
        "application/json; x=y",
        "application/json;",
    ],
)
def test_json_content_types_are_accepted(make_flow: MakeFlow, content_type: str) -> None:
    flow = make_flow()
    assert flow.request("POST", "/tasks", data=b"{}", content_type=content_type).status_code == 200
    found = problem(
        flow.request("POST", "/tasks", data=b"<xml/>", content_type=content_type),
        400,
        "invalid-query",
    )
    assert "JSON" in found["detail"]


@pytest.mark.covers("A49")
def test_limits_of_size_and_encoding_of_bodies(make_flow: MakeFlow) -> None:
    flow = make_flow()
    fits = b'{"User": {"value": "x"}}' + b" " * (1024 * 1024 - 24)
    assert (
        flow.request("POST", "/tasks", data=fits, content_type="application/json").status_code
        == 200
    )
    problem(
        flow.request("POST", "/tasks", data=fits + b" ", content_type="application/json"),
        413,
        "body-too-large",
    )
    for encoding in ("gzip", "br", "deflate", "x"):
        response = flow.request(
            "POST",
            "/tasks",
            data=b"\x1f\x8b",
            content_type="application/json",
            headers={"Content-Encoding": encoding},
        )
        problem(response, 415, "unsupported-media-type")
    assert (
        flow.request(
            "POST",
            "/tasks",
            data=b"{}",
            content_type="application/json",
            headers={"Content-Encoding": "identity"},
        ).status_code
        == 200
    )


@pytest.mark.covers("A49")
@pytest.mark.parametrize("is_terminated", [True, False])
def test_bodies_that_do_not_arrive_as_announced(make_flow: MakeFlow, is_terminated: bool) -> None:
    from werkzeug.test import EnvironBuilder, run_wsgi_app

    class Stream:
        def __init__(self, data: bytes, error: Exception | None = None) -> None:
            self.data, self.error, self.size_read = data, error, 0

        def read(self, size: int = -1) -> bytes:
            if not self.data and self.error is not None:
                raise self.error
            piece, self.data = self.data[:size], self.data[size:]
            return piece

    class Endless(Stream):
        def read(self, size: int = -1) -> bytes:
            self.size_read += size
            return b" " * size

    def send(stream: Stream, length: int | None) -> Any:
        environ = EnvironBuilder(
            method="POST", path="/tasks", content_type="application/json"
        ).get_environ()
        environ.pop("CONTENT_LENGTH", None)
        environ["wsgi.input"] = stream
        if is_terminated:
            environ["wsgi.input_terminated"] = True
        if length is None:
            environ["HTTP_TRANSFER_ENCODING"] = "chunked"
        else:
            environ["CONTENT_LENGTH"] = str(length)
        answer, status, headers = run_wsgi_app(flow.app, environ, buffered=True)
        return flow.app.response_class(answer, status, headers)

    flow = make_flow()
    problem(send(Stream(b"{}"), 50), 400, "invalid-request")
    problem(send(Stream(b"{}", OSError()), 50), 400, "invalid-request")
    if is_terminated:
        problem(send(Stream(b"{}", RuntimeError("bad chunk")), None), 400, "invalid-request")
        assert send(Stream(b"{}"), None).status_code == 200
        endless = Endless(b"")
        problem(send(endless, None), 413, "body-too-large")
        assert endless.size_read < 3_000_000
    endless = Endless(b"")
    problem(send(endless, 2**40), 413, "body-too-large")
    assert endless.size_read == 0


def test_conditions_in_the_url_of_a_post_are_refused(make_flow: MakeFlow) -> None:
    flow = make_flow()
    for query in ("State=Completed", "filter[State][EQ]=Completed", "colour=red"):
        found = problem(flow.request("POST", f"/tasks?{query}", json={}), 400, "invalid-query")
        assert query.partition("=")[0].partition("[")[0] in found["detail"]


def test_the_body_of_a_get_is_ignored(make_flow: MakeFlow) -> None:
    flow = make_flow()
    assert (
        flow.request(
            "GET", "/tasks", data=b'{"Colour": 1}', content_type="application/json"
        ).get_json()
        == []
    )


# -- answers
# -----------------------------------------------------------------------------------------------------------------


def test_lists_in_xml_and_yaml(flow: Flow, tasks: dict[str, Any]) -> None:
    response = flow.request("GET", "/tasks?limit=3", headers={"Accept": "application/yaml"})
    assert [task["Id"] for task in yaml.safe_load(response.data)] == flow.ids("limit=3")
    assert "Link" in response.headers
    root = ElementTree.fromstring(
        flow.request("GET", "/tasks?limit=3", headers={"Accept": "application/xml"}).data
    )
    assert root.tag == "AsyncRouteTasks"
    assert [item.findtext("Id") for item in root.findall("item")] == flow.ids("limit=3")
    for accept in ("application/json", "application/xml", "application/yaml"):
        empty = flow.request("GET", "/tasks?User=nobody", headers={"Accept": accept})
        assert empty.status_code == 200
    assert json.loads(flow.request("GET", "/tasks?User=nobody").data) == []


def test_large_results_are_omitted_from_lists(flow: Flow) -> None:
    sizes = {"a": 65_536 - 2, "b": 65_536 - 1}
    ids = iter(sizes)
    flow.route("/<int:size>", endpoint="work", id_generator=lambda: next(ids))(
        lambda size: "x" * size
    )
    for size in sizes.values():
        flow.run(f"/{size}")
    for query in ("", "State=Completed", "sort=-CompletedTime"):
        found = {task["Id"]: task for task in flow.query(query)}
        assert len(found["a"]["Result"]) == sizes["a"] and "Result" not in found["b"]
        assert found["b"]["State"] == "Completed"
    assert len(flow.get("b")["Result"]) == sizes["b"]
    with flow.app.app_context():
        assert [record.id for record in flow.async_routes.query()] == ["b", "a"]


def test_head_of_a_list(flow: Flow) -> None:
    assert flow.request("HEAD", "/tasks").status_code == 200
    assert loaded(flow.request("GET", "/tasks")) == []
