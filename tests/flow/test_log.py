"""What an operator finds in the log: the start and the end of tasks, and the exit of a process."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator

import pytest
from flask import abort

from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.workers import shutdown
from tests.support.flow import Flow

MakeFlow = Callable[..., Flow]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return the messages of level INFO so far."""
    caplog.set_level(logging.INFO, "flask_asyncroute")
    return lambda: [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]


def test_start_and_end_of_a_task(
    make_flow: MakeFlow, lines: Callable[[], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    flow = make_flow()
    flow.route(endpoint="work")(lambda: None)
    flow.route("/fail", endpoint="fail")(lambda: abort(404))
    done, failed = flow.run(), flow.run("/fail")
    for task, endpoint, state in (done, "work", "Completed"), (failed, "fail", "Failed"):
        started, ended = [line for line in lines() if task["Id"] in line]
        assert started == f"Task {task['Id']} of endpoint {endpoint} started."
        pattern = rf"Task {task['Id']} of endpoint {endpoint} is {state} after \d\.\d{{3}} s\."
        assert re.fullmatch(pattern, ended)
        assert [r.__dict__["task_id"] for r in caplog.records if r.getMessage() == ended] == [
            task["Id"]
        ]


def test_a_stop_before_the_start(
    make_flow: MakeFlow, lines: Callable[[], list[str]], gate: threading.Event
) -> None:
    flow = make_flow()
    flow.route(endpoint="work", max_workers=1)(lambda: gate.wait(20))
    first = flow.start()
    second = flow.start()
    flow.stop(second)
    gate.set()
    flow.ended(first)
    (line,) = [line for line in lines() if second["Id"] in line]
    assert re.fullmatch(
        r"Task \S+ of endpoint work is Aborted after \d\.\d{3} s of waiting\.", line
    )


def test_an_exit_names_the_tasks_that_it_cut_off(
    make_flow: MakeFlow, lines: Callable[[], list[str]], gate: threading.Event
) -> None:
    flow = make_flow()
    flow.route(endpoint="work", max_workers=1, interrupt_after=None)(lambda: gate.wait(20))
    task = flow.start()
    flow.became(task, "Running")
    flow.start()
    shutdown.shut_down({runtime_of(flow.app).runner: 0.05})
    first = "This process exits; it waits up to 0.1 s for 1 running tasks."
    last = (
        f"At the exit of this process 0 tasks had ended, 1 were aborted or requeued ({task['Id']}), "
        "and 1 had not started."
    )
    assert [line for line in lines() if "exit" in line] == [first, last]


@pytest.fixture
def failing_filter() -> Iterator[None]:
    """Let every message of the package raise, as a filter that needs a request does."""

    def fail(record: logging.LogRecord) -> bool:
        raise RuntimeError("no request")

    logger = logging.getLogger("flask_asyncroute")
    level = logger.level
    logger.addFilter(fail)
    logger.setLevel(logging.INFO)
    yield
    logger.removeFilter(fail)
    logger.setLevel(level)


def test_a_failing_log_filter_does_not_stop_a_task(
    make_flow: MakeFlow, failing_filter: None
) -> None:
    flow = make_flow()
    flow.route()(lambda: "done")
    assert flow.result() == "done"


def test_a_failing_log_filter_does_not_stop_a_shutdown(
    make_flow: MakeFlow, failing_filter: None, gate: threading.Event
) -> None:
    flow = make_flow()
    flow.route(interrupt_after=None)(lambda: gate.wait(20))
    task = flow.start()
    flow.became(task, "Running")
    shutdown.shut_down({runtime_of(flow.app).runner: 0.05})
    assert flow.get(task)["Error"] == "Server shutdown"
