"""Tasks that run: stopped, out of time, deaf to both; their progress while they run, and their removal long after."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import pytest

from flask_asyncroute import TaskAborted, current_task
from tests.conftest import label
from tests.flow.driving import Flow, problem

MakeFlow = Callable[..., Flow]


def spin(until: threading.Event, seconds: float = 10) -> None:
    """Busy in Python, as a view that computes is: it can be interrupted and hears of nothing else."""
    end = time.monotonic() + seconds
    while not until.is_set() and time.monotonic() < end:
        sum(range(100))


# -- stop ------------------------------------------------------------------------------------------------------------------


def test_a_running_task_is_aborted_at_once_and_stopping_until_it_ends(
    flow: Flow, gate: threading.Event, begun: threading.Semaphore
) -> None:
    @flow.route(interrupt_after=None)
    def work() -> str:
        begun.release()
        gate.wait(10)
        return "late"

    task = flow.start()
    assert begun.acquire(timeout=5)
    stopped = flow.stop(task)
    assert (stopped["State"], stopped["Error"], stopped["Stopping"], stopped["IsCompleted"]) == (
        "Aborted", "Aborted by the user", True, True,
    )  # fmt: skip
    assert stopped["CreationTime"] <= stopped["StartingTime"] <= stopped["CompletedTime"]
    found = flow.request("GET", f"/task/{task['Id']}")
    assert found.get_json() == stopped and "Retry-After" not in found.headers
    again = flow.stop(task)
    assert again == stopped, "an Aborted one answers 200 again (F16)"
    gate.set()
    ended = flow.still(task)
    assert "Stopping" not in ended and "Result" not in ended
    assert ended == {key: value for key, value in stopped.items() if key != "Stopping"}
    etag = flow.request("GET", f"/task/{task['Id']}").headers["ETag"]
    assert etag != found.headers["ETag"], "the end of Stopping raises the revision"
    assert flow.stop(task) == ended


def test_a_view_is_told_of_a_stop(flow: Flow, executor: Any) -> None:
    begun, told = threading.Event(), []

    @flow.route(executor=executor)
    def work() -> str:
        begun.set()
        told.append(current_task.stop_requested)
        told.append(current_task.sleep(10))
        told.append(current_task.stop_requested)
        with pytest.raises(TaskAborted):
            current_task.check()
        return "late"

    answers: list[Any] = []
    starter = threading.Thread(target=lambda: answers.append(flow.app.test_client().post("/work")))
    starter.start()
    assert begun.wait(5)
    [task_id] = flow.ids()
    at = time.monotonic()
    assert flow.stop(task_id)["State"] == "Aborted"
    starter.join(5)
    flow.still(task_id)
    assert time.monotonic() - at < 1
    assert told == [False, False, True]
    assert answers[0].status_code == 202
    if executor == "immediate":
        assert answers[0].get_json()["State"] == "Aborted"


def test_a_view_that_does_not_listen_is_interrupted(
    flow: Flow, gate: threading.Event, begun: threading.Semaphore
) -> None:
    ended: list[str] = []

    @flow.route(interrupt_after=0.1, max_workers=1)
    def work() -> None:
        try:
            begun.release()
            spin(gate)
        except TaskAborted:
            ended.append("interrupted")
            raise
        finally:
            ended.append("cleaned up")

    task = flow.start()
    assert begun.acquire(timeout=5)
    flow.stop(task)
    assert flow.still(task)["State"] == "Aborted"
    assert ended == ["interrupted", "cleaned up"]
    gate.set()
    assert flow.run()["State"] == "Completed"


def test_without_interrupt_after_a_stop_only_asks(
    flow: Flow, gate: threading.Event, begun: threading.Semaphore
) -> None:
    ended: list[str] = []

    @flow.route(interrupt_after=None)
    def work() -> None:
        begun.release()
        spin(gate)
        ended.append("by itself")

    task = flow.start()
    assert begun.acquire(timeout=5)
    flow.stop(task)
    assert not gate.wait(0.3)
    assert flow.get(task)["Stopping"] is True
    gate.set()
    flow.still(task)
    assert ended == ["by itself"]


def test_f14_a_view_that_swallows_everything(flow: Flow, gate: threading.Event, begun: threading.Semaphore) -> None:
    """Aborted at once, Stopping until its real end, its late result dropped, and its place free for another."""
    caught: list[str] = []

    @flow.route("/deaf", interrupt_after=0, max_workers=1, queue_size=1, pool="p")
    def deaf() -> str:
        begun.release()
        while not gate.is_set():
            try:
                spin(gate)
            except BaseException as error:
                caught.append(type(error).__name__)
        return "late"

    @flow.route("/quick", interrupt_after=0, max_workers=1, queue_size=1, pool="p")
    def quick() -> str:
        return "done"

    task = flow.start("/deaf")
    assert begun.acquire(timeout=5)
    assert flow.stop(task)["Stopping"] is True
    for _ in range(3):
        assert flow.result("/quick") == "done", "the pool has put another thread in its place"
    assert flow.get(task)["Stopping"] is True
    flow.purge(task, status=409)
    gate.set()
    ended = flow.still(task)
    assert ended["State"] == "Aborted" and "Result" not in ended
    assert caught == ["TaskAborted"]
    for _ in range(3):
        assert flow.result("/quick") == "done"


def test_f14_as_many_deaf_views_linger_as_there_are_places(
    flow: Flow, gate: threading.Event, begun: threading.Semaphore
) -> None:
    """One more keeps its place, so that a process never has more than twice max_workers threads in a pool."""

    @flow.route(interrupt_after=None, max_workers=2, queue_size=0)
    def work() -> None:
        begun.release()
        gate.wait(10)

    tasks = []
    for _ in range(4):
        task = flow.start()
        assert begun.acquire(timeout=5)
        flow.stop(task)
        tasks.append(task)
    problem(flow.request("POST", "/work"), 503, "queue-full")
    gate.set()
    for task in tasks:
        flow.still(task)
    assert flow.run()["State"] == "Completed"


def test_f18_a_waiting_task_that_is_stopped_never_starts(
    flow: Flow, gate: threading.Event, later_executor: Any
) -> None:
    ran: list[str] = []

    @flow.route("/<name>", max_workers=2, queue_size=2, executor=later_executor)
    def work(name: str) -> None:
        ran.append(name)
        gate.wait(10)

    running = [flow.start("/a"), flow.start("/b")]
    for task in running:
        flow.became(task, "Running")
    waiting = [flow.start("/c"), flow.start("/d")]
    problem(flow.request("POST", "/x"), 503, "queue-full")
    for task in waiting:
        stopped = flow.stop(task)
        assert (stopped["State"], stopped["Error"]) == ("Aborted", "Aborted by the user")
        assert not {"Stopping", "StartingTime", "ExpireTime"} & set(stopped)
    later = [flow.start("/e"), flow.start("/f")]
    problem(flow.request("POST", "/x"), 503, "queue-full")
    gate.set()
    for task in (*running, *later):
        flow.ended(task)
    assert sorted(ran) == ["a", "b", "e", "f"]


def test_a_task_that_is_not_cancellable(flow: Flow, gate: threading.Event) -> None:
    @flow.route(cancellable=False)
    def work() -> str:
        gate.wait(10)
        return "done"

    task = flow.start()
    assert task["Cancellable"] is False
    found = problem(flow.request("DELETE", f"/task/{task['Id']}"), 423, "not-cancellable")
    assert found["Id"] == task["Id"]
    gate.set()
    assert flow.ended(task)["Result"] == "done"


def test_a_late_result_of_a_stopped_task_is_dropped(
    flow: Flow, gate: threading.Event, begun: threading.Semaphore, later_executor: Any
) -> None:
    @flow.route(executor=later_executor)
    def work() -> str:
        begun.release()
        gate.wait(10)
        current_task.progress = 70
        return "late"

    task = flow.start()
    assert begun.acquire(timeout=5)
    flow.stop(task)
    gate.set()
    ended = flow.still(task)
    assert ended["State"] == "Aborted" and not {"Result", "Progress"} & set(ended)


def test_an_own_executor_gets_only_asked(
    flow: Flow, gate: threading.Event, begun: threading.Semaphore, own_pool: ThreadPoolExecutor
) -> None:
    @flow.route(executor=own_pool, interrupt_after=0)
    def work() -> None:
        begun.release()
        spin(gate)

    task = flow.start()
    assert begun.acquire(timeout=5)
    flow.stop(task)
    assert not gate.wait(0.2)
    assert flow.get(task)["Stopping"] is True
    gate.set()
    flow.still(task)


# -- time ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0.05, 0.3])
def test_a_task_runs_out_of_time(flow: Flow, executor: Any, timeout: float) -> None:
    """Within 0.2 s of its limit; a machine that is busy with something else gets three tries at that."""
    ended: list[float] = []

    @flow.route(executor=executor, timeout=timeout)
    def work() -> None:
        begun = time.monotonic()
        current_task.sleep(10)
        ended.append(time.monotonic() - begun)

    late: list[float] = []
    while not late or (late[-1] >= 0.2 and len(late) < 3):
        task = flow.still(flow.start())
        assert (task["State"], task["Error"]) == ("Aborted", "Timeout")
        times = [datetime.fromisoformat(task[name]) for name in ("ExpireTime", "CompletedTime")]
        assert times[1] >= times[0], "not before its time"
        late.append(max(ended[-1] - timeout, (times[1] - times[0]).total_seconds()))
    assert late[-1] < 0.2, late


def test_a_view_that_does_not_listen_runs_out_of_time(flow: Flow, gate: threading.Event) -> None:
    @flow.route(timeout=0.2, interrupt_after=0.1)
    def work() -> None:
        spin(gate)

    task = flow.start()
    found = flow.ended(task)
    assert (found["State"], found["Error"]) == ("Aborted", "Timeout")
    flow.still(task)


def test_a_view_that_checks_runs_out_of_time(flow: Flow, executor: Any) -> None:
    @flow.route(executor=executor, timeout=0.1)
    def work() -> None:
        for _ in range(1000):
            current_task.check()
            time.sleep(0.01)

    task = flow.still(flow.start())
    assert (task["State"], task["Error"]) == ("Aborted", "Timeout")


def test_remaining_counts_down(flow: Flow) -> None:
    @flow.route(timeout=0.2, interrupt_after=None)
    def work() -> None:
        seen = [current_task.remaining() or 0]
        current_task.sleep(0.05)
        seen.append(current_task.remaining() or 0)
        assert 0.2 >= seen[0] > seen[1] > 0
        current_task.sleep(1)
        assert current_task.remaining() == 0
        assert current_task.stop_requested

    assert flow.still(flow.start())["Error"] == "Timeout"


@pytest.mark.parametrize("ending", ["return", "raise", "check"])
def test_a_view_that_sees_by_the_clock_that_its_time_is_up_has_timed_out(
    make_flow: MakeFlow, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """Before anybody else has noticed, and whatever it does then."""
    monkeypatch.setattr("flask_asyncroute.dispatcher.Dispatcher.expire", lambda dispatcher, execution: None)
    flow = make_flow()

    @flow.route(timeout=0.05)
    def work() -> Any:
        while not current_task.stop_requested:
            time.sleep(0)
        if ending == "raise":
            raise ValueError("no")
        if ending == "check":
            current_task.check()
        return {"Done": True}

    found = flow.ended(flow.start())
    assert (found["State"], found["Error"]) == ("Aborted", "Timeout")


def test_time_is_counted_from_the_start_of_execution(flow: Flow, gate: threading.Event) -> None:
    @flow.route(timeout=0.4, max_workers=1)
    def work() -> str:
        gate.wait(0.3)
        return "done"

    first, second = flow.start(), flow.start()
    assert flow.ended(first)["Result"] == "done"
    gate.set()
    found = flow.ended(second)
    assert found["Result"] == "done"
    assert found["ExpireTime"] > flow.get(first)["ExpireTime"]


def test_a_task_that_is_not_cancellable_runs_out_of_time(flow: Flow) -> None:
    """423 is for who asks; the limit is the app's own."""

    @flow.route(timeout=0.1, cancellable=False)
    def work() -> None:
        current_task.sleep(10)

    assert flow.ended(flow.start())["Error"] == "Timeout"


def test_no_limit(make_flow: MakeFlow) -> None:
    for number, timeout in enumerate((None, -1)):
        flow = make_flow()
        flow.route(timeout=timeout, endpoint=f"work{number}")(lambda: current_task.remaining())
        task = flow.run()
        assert task["State"] == "Completed" and not {"ExpireTime", "Result"} & set(task)


def test_sleep(make_flow: MakeFlow) -> None:
    flow = make_flow()

    @flow.route()
    def work() -> Any:
        begun = time.monotonic()
        whole = [current_task.sleep(0.05), current_task.sleep(0), current_task.sleep(-1)]
        return [whole, 0.05 <= time.monotonic() - begun < 0.5]

    assert flow.result() == [[True, True, True], True]


@pytest.mark.parametrize("seconds", [math.inf, 1e12, 10**400])
def test_a_sleep_without_end(make_flow: MakeFlow, seconds: float) -> None:
    """A service that runs until it is stopped sleeps like that."""
    flow = make_flow()

    @flow.route()
    def work() -> bool:
        return current_task.sleep(seconds)

    task = flow.start()
    flow.became(task, "Running", "Failed")
    flow.stop(task)
    flow.still(task)


@pytest.mark.parametrize("seconds", [None, "5", True, []], ids=repr)
def test_a_sleep_that_is_none(make_flow: MakeFlow, seconds: Any) -> None:
    flow = make_flow()
    flow.route()(lambda: current_task.sleep(seconds))
    assert flow.error().startswith("TypeError: seconds must be a number")


# -- progress ----------------------------------------------------------------------------------------------------------------


class Steps:
    """A view that goes one step at a time, as the test says."""

    def __init__(self, flow: Flow, steps: list[Callable[[], Any]], **options: Any) -> None:
        self.flow = flow
        self.go = [threading.Event() for _ in steps]
        self.done = [threading.Event() for _ in steps]

        @flow.route(**options)
        def work() -> None:
            for step, go, done in zip(steps, self.go, self.done, strict=True):
                assert go.wait(10)
                step()
                done.set()

        self.task = flow.start()

    def step(self, number: int) -> None:
        self.go[number].set()
        assert self.done[number].wait(5)

    def await_progress(self, progress: Any, message: str | None = None) -> None:
        from tests.conftest import eventually_true

        eventually_true(lambda: self.seen() == (progress, message))

    def seen(self) -> tuple[Any, Any]:
        task = self.flow.get(self.task)
        return task.get("Progress"), task.get("ProgressMessage")

    def end(self) -> dict[str, Any]:
        for go in self.go:
            go.set()
        return self.flow.ended(self.task)


def test_progress_is_visible_while_a_task_runs(flow: Flow) -> None:
    def set_by_attribute() -> None:
        current_task.progress = 12.345

    steps = Steps(
        flow,
        [
            set_by_attribute,
            lambda: current_task.set_progress(50, "half"),
            lambda: current_task.set_progress(20),
            lambda: current_task.set_progress(60, "more"),
            lambda: None,
        ],
    )
    assert steps.seen() == (None, None)
    before = flow.request("GET", f"/task/{steps.task['Id']}").headers["ETag"]
    steps.step(0)
    steps.await_progress(12.35)
    assert flow.request("GET", f"/task/{steps.task['Id']}").headers["ETag"] != before
    steps.step(1)
    steps.await_progress(50, "half")
    steps.step(2)
    steps.step(3)
    steps.await_progress(60, "more")
    ended = steps.end()
    assert (ended["Progress"], ended["ProgressMessage"]) == (100, "more")


@pytest.mark.parametrize("ending", ["fails", "is stopped", "runs out of time"])
def test_progress_is_left_as_it_is_at_other_ends(flow: Flow, ending: str) -> None:
    @flow.route(timeout=0.3 if ending == "runs out of time" else 50)
    def work() -> None:
        current_task.progress = 33
        if ending == "fails":
            raise ValueError
        current_task.sleep(10)

    task = flow.start()
    if ending == "is stopped":
        from tests.conftest import eventually_true

        eventually_true(lambda: flow.get(task).get("Progress") == 33)
        flow.stop(task)
    assert flow.still(task)["Progress"] == 33


def test_a_task_without_progress_has_none(flow: Flow, executor: Any) -> None:
    flow.route(executor=executor)(lambda: 1)
    assert not {"Progress", "ProgressMessage"} & set(flow.run())


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        ([150], 100), ([-5], 0), ([math.nan], 0), ([50, math.nan], 50), ([50, 20], 50), ([math.inf], 100), ([-math.inf], 0), ([33.333333], 33.33), ([0.004], 0),
        ([99.999], 100), ([10**400], 100), ([-(10**400)], 0), ([0], 0), ([40, 40.001], 40), ([7], 7),
    ],
)  # fmt: skip
def test_a71_progress_is_clipped_and_never_goes_back(make_flow: MakeFlow, values: list[Any], seen: float) -> None:
    flow = make_flow()

    @flow.route()
    def work() -> Any:
        for value in values:
            current_task.progress = value
        return current_task.progress

    assert flow.result() == seen


@pytest.mark.parametrize("value", [None, "5", True, b"5", [], object()], ids=label)
def test_a71_progress_that_is_no_number_raises(make_flow: MakeFlow, value: Any) -> None:
    flow = make_flow()
    flow.route()(lambda: current_task.set_progress(value))
    assert flow.error().startswith("TypeError: progress must be a number")


def test_a71_messages_are_cut_and_cleaned(flow: Flow) -> None:
    @flow.route()
    def work() -> None:
        current_task.set_progress(1, "x" * 1_000_000)

    @flow.route("/odd")
    def odd() -> None:
        current_task.set_progress(1, "a\x00\ud800é\U0001f600")

    assert flow.run()["ProgressMessage"] == "x" * 500
    assert flow.run("/odd")["ProgressMessage"] == "a\ufffd\ufffdé\U0001f600"


def test_a71_a_flood_of_updates_is_coalesced(flow: Flow, hear: Any) -> None:
    from flask_asyncroute import task_progressed

    @flow.route()
    def work() -> int:
        begun = time.monotonic()
        count = 0
        while time.monotonic() - begun < 0.5:
            count += 1
            current_task.set_progress(min(count / 1000, 99), f"step {count}")
        return count

    heard = hear(task_progressed)
    task = flow.run()
    assert task["Result"] > 100
    assert 1 <= len(heard) <= 8
    assert task["ProgressMessage"] == f"step {task['Result']}"


def test_track(flow: Flow) -> None:
    seen: list[Any] = []

    @flow.route()
    def work() -> None:
        for item in current_task.track("abcd", max_progress=80):
            seen.append((item, current_task.progress))
        seen.append(current_task.progress)
        for _ in current_task.track(iter([1, 2]), total=4):
            seen.append(current_task.progress)
        seen.append(current_task.progress)
        list(current_task.track([]))
        list(current_task.track(iter([1])))

    flow.result()
    assert seen == [("a", 0), ("b", 20), ("c", 40), ("d", 60), 80, 80, 85, 100]


def test_ranges_follow_each_other(flow: Flow) -> None:
    seen: list[Any] = []

    @flow.route()
    def work() -> None:
        first = current_task.progress_range(0, 3, max_progress=80)
        for _ in range(3):
            first.tick()
            seen.append(current_task.progress)
        first.tick()
        second = current_task.progress_range(10, 0, step=-5)
        seen.append(len(second))
        for value in second:
            seen.append((value, current_task.progress))
        seen.append(current_task.progress)

    flow.result()
    assert seen == [26, 53, 80, 2, (10, 80), (5, 90), 100]


def test_a_range_of_no_steps(make_flow: MakeFlow) -> None:
    """A loop over nothing is no error, and has nothing left to do."""
    flow = make_flow()

    @flow.route()
    def work() -> Any:
        nothing = current_task.progress_range(0, 0)
        nothing.tick()
        return [len(nothing), list(nothing)]

    assert flow.result() == [0, []]


def test_a_range_with_decimals(make_flow: MakeFlow) -> None:
    flow = make_flow()

    @flow.route()
    def work() -> Any:
        tick = current_task.progress_range(0, 3, decimal=True).tick
        tick("one")
        return current_task.progress

    task = flow.run()
    assert (task["Result"], task["ProgressMessage"]) == (33.33, "one")


@pytest.mark.parametrize("given", [(0, 5, 0), (0, 5, -1), (5, 0, 1), (0, math.inf, 1), (math.nan, 1, 1)])
def test_ranges_without_steps(make_flow: MakeFlow, given: tuple[Any, ...]) -> None:
    flow = make_flow()
    flow.route()(lambda: len(current_task.progress_range(*given)))
    assert flow.error().startswith("ValueError: progress_range(")


def test_progress_over_time(flow: Flow, eventually: Any) -> None:
    """It returns at once, and goes on by itself until another call."""
    seen: list[float] = []
    go = threading.Event()

    @flow.route()
    def work() -> None:
        begun = time.monotonic()
        current_task.progress_over(0.4, interval=0.1, max_progress=80)
        assert time.monotonic() - begun < 0.1
        assert go.wait(10)
        seen.append(current_task.progress)
        current_task.progress_over(0.5, interval=0.1)
        current_task.progress = 90
        seen.append(current_task.progress)
        current_task.sleep(0.25)
        seen.append(current_task.progress)

    task = flow.start()
    on_the_way: list[float] = []

    def look() -> bool:
        on_the_way.append(flow.get(task).get("Progress", 0))
        return on_the_way[-1] == 80

    eventually(look)
    assert on_the_way == sorted(on_the_way)
    assert any(0 < value < 80 for value in on_the_way)
    go.set()
    assert flow.ended(task)["Progress"] == 100
    assert seen == [80, 90, 90]


def test_progress_over_ends_with_the_task(flow: Flow) -> None:
    @flow.route()
    def work() -> None:
        current_task.progress_over(10, interval=0.1)
        current_task.sleep(0.35)
        raise ValueError

    task = flow.run()
    assert 0 < task["Progress"] < 10
    assert flow.get(task) == task


@pytest.mark.parametrize("given", [(-1,), (1, 0), (1, -1), (math.nan,), (1, math.nan)])
def test_progress_over_times_that_are_none(make_flow: MakeFlow, given: tuple[Any, ...]) -> None:
    flow = make_flow()
    flow.route()(lambda: current_task.progress_over(*given))
    assert flow.error().startswith("ValueError: progress_over()")


def test_progress_from_a_thread_of_the_view(flow: Flow) -> None:
    @flow.route()
    def work() -> Any:
        task = current_task._get_current_object()  # type: ignore[attr-defined]
        thread = threading.Thread(target=lambda: task.set_progress(40, "from a thread"))
        thread.start()
        thread.join()
        return task.progress

    task = flow.run()
    assert (task["Result"], task["ProgressMessage"]) == (40, "from a thread")


# -- retention ---------------------------------------------------------------------------------------------------------------


def test_f34_retention(
    make_flow: MakeFlow, store_url: str, gate: threading.Event, begun: threading.Semaphore, eventually: Any
) -> None:
    """Age is counted from the finish; what runs, waits or is stopping is never removed."""
    flow = make_flow(ASYNCROUTE_STORE=store_url, ASYNCROUTE_HOUSEKEEPING_INTERVAL=0.1)

    @flow.route("/brief", retention=0)
    def brief() -> None: ...

    @flow.route("/kept", retention=60)
    def kept() -> None: ...

    @flow.route("/slow", retention=0, max_workers=1, interrupt_after=None)
    def slow() -> None:
        begun.release()
        gate.wait(10)

    running, waiting = flow.start("/slow"), flow.start("/slow")
    assert begun.acquire(timeout=5)
    stopping = flow.start("/slow")
    keeper = flow.run("/kept")
    gone = [flow.start("/brief")["Id"] for _ in range(3)]
    eventually(lambda: not set(gone) & set(flow.ids()))
    for task_id in gone:
        flow.get(task_id, status=404)
    assert flow.get(running)["State"] == "Running" and flow.get(waiting)["State"] == "NotStarted"
    assert flow.get(keeper) == keeper
    assert flow.stop(running)["Stopping"] is True
    flow.stop(stopping)
    eventually(lambda: stopping["Id"] not in flow.ids())
    assert flow.get(running)["Stopping"] is True
    gate.set()
    eventually(lambda: flow.ids() == [keeper["Id"]])


def test_an_app_wide_retention(make_flow: MakeFlow, eventually: Any) -> None:
    flow = make_flow(ASYNCROUTE_RETENTION=0, ASYNCROUTE_HOUSEKEEPING_INTERVAL=0.1)
    flow.route()(lambda: 1)
    flow.start()
    eventually(lambda: flow.query() == [])


def test_a_task_is_never_purged_before_its_time(make_flow: MakeFlow, eventually: Any) -> None:
    """I1: age counts from the finish, so a long task is there to be read after its end."""
    flow = make_flow(ASYNCROUTE_HOUSEKEEPING_INTERVAL=0.1)

    @flow.route("/slow", retention=0.5)
    def slow() -> None:
        current_task.sleep(0.6)

    task = flow.ended(flow.start("/slow"))
    ended_at = time.monotonic()
    eventually(lambda: task["Id"] not in flow.ids())
    assert time.monotonic() - ended_at > 0.35
