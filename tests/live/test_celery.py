"""Tasks on real Celery workers, with Redis and RabbitMQ: what a route may rely on with each pool,
and what happens when a worker, one of its processes, a message or the broker is lost.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from pytest_httpserver import HTTPServer

pytest.importorskip("celery")

from tests.support.apps.celery_crowd import APP, environ
from tests.support.brokers import delete_queue, new_celery, purge_queue
from tests.support.celery_workers import CeleryWorker
from tests.support.client import Connection, send
from tests.support.event_streams import Stream
from tests.support.processes import is_running
from tests.support.redis_server import RedisServer
from tests.support.server import START, Server, gunicorn
from tests.support.waiting import eventually_true

from .test_gunicorn import lines

pytestmark = pytest.mark.live

Eventually = Callable[..., Any]
KILL_SECONDS = 0.5
LOST_SECONDS = 2.5
"""The time within which a lost process on the same host is detected."""
RESEND_SECONDS = 10.0
"""The time within which a task starts whose message was lost."""
OVERDUE_SECONDS = 15.0
"""The time within which a web server kills code that has not ended. A worker also needs some
seconds to connect to a broker that is back.
"""
TASK = "flask_asyncroute.run"


class Site:
    """A web server, a queue and Celery workers of one app."""

    def __init__(self, folder: Path, broker: str, stack: ExitStack, **config: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.broker = broker
        self.queue = f"live-{uuid4().hex}"
        self.environ = environ(folder, broker, self.queue, **config)
        self._stack = stack
        stack.callback(delete_queue, broker, self.queue)
        self.server: Server = stack.enter_context(
            gunicorn(folder / "web", APP, "--threads", "8", environ=self.environ, conf=START)
        )
        self.port = self.server.port

    def worker(
        self, pool: str = "prefork", concurrency: int = 2, *options: str, name: str = "worker"
    ) -> CeleryWorker:
        """Start a worker."""
        worker = CeleryWorker(
            self.folder / name, self.environ, *options, pool=pool, concurrency=concurrency
        )
        return self._stack.enter_context(worker)

    def start(self, path: str, **values: Any) -> str:
        reply = send(self.port, "PUT", path, **values)
        assert reply.status == 202, reply.body
        return str(reply.json()["Id"])

    def task(self, task_id: str) -> Any:
        return send(self.port, "GET", f"/task/{task_id}").json()

    def ended(self, task_id: str, seconds: float = 15) -> Any:
        """Wait until a task and its view have ended; return the task."""

        def ended() -> Any:
            found = self.task(task_id)
            return found if found["IsCompleted"] and not found.get("Stopping") else None

        return eventually_true(ended, seconds, 0.02, f"{task_id} did not end")

    def begun(self, task_id: str, runs: int = 1, seconds: float = 15) -> int:
        """Wait until the view runs; return its process id."""
        found = eventually_true(
            lambda: lines(self.folder, "begin")[task_id][runs - 1 :], seconds, 0.01
        )
        return int(found[0]["pid"])

    def runs(self, task_id: str) -> int:
        return len(lines(self.folder, "begin")[task_id])

    def stop(self, task_id: str) -> Any:
        reply = send(self.port, "DELETE", f"/task/{task_id}")
        assert reply.status == 200, reply.body
        return reply.json()


@contextmanager
def new_site(folder: Path, broker: str, **config: Any) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(folder, broker, stack, **config)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Site]]:
    """Return ``sites(broker, pool)``, which returns a site that all tests share."""
    made: dict[tuple[str, str], Site] = {}
    with ExitStack() as stack:

        def make(broker: str, pool: str) -> Site:
            if (broker, pool) not in made:
                if pool == "gevent":
                    pytest.importorskip("gevent")
                site = Site(tmp_path_factory.mktemp(pool), broker, stack)
                site.worker(pool)
                made[broker, pool] = site
            return made[broker, pool]

        yield make


@pytest.fixture(params=["prefork", "threads", "solo", "gevent"])
def pool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def any_pool(sites: Callable[[str, str], Site], redis: str, pool: str) -> Site:
    """Return a site with each kind of pool, on Redis."""
    return sites(redis, pool)


@pytest.fixture
def prefork(sites: Callable[[str, str], Site], redis: str) -> Site:
    return sites(redis, "prefork")


@pytest.fixture(params=["redis", "rabbitmq"])
def any_broker(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def site(tmp_path: Path, redis: str) -> Iterator[Site]:
    """Return a site of this test, on Redis, without a worker."""
    with new_site(tmp_path / "site", redis) as found:
        yield found


def test_a_task_runs_in_the_worker(any_pool: Site) -> None:
    task = any_pool.ended(any_pool.start("/echo/5", document={"a": [1]}, headers={"X-Own": "own"}))
    assert task["State"] == "Completed", task
    result = task["Result"]
    assert result["prepared_in"] == result["pid"] != any_pool.server.workers()[0]
    assert 0 < result["remaining"] <= 36000
    assert (result["number"], result["fixed"], result["id"]) == (5, "yes", task["Id"])
    assert (result["json"], result["header"]) == ({"a": [1]}, "own")


@pytest.mark.parametrize("size", [0, 300_000, 5_000_000])
def test_bodies_reach_the_worker(any_pool: Site, size: int) -> None:
    task = any_pool.ended(any_pool.start("/echo/1", body=b"x" * size))
    assert task["Result"]["size"] == size


def test_an_upload_reaches_the_worker(prefork: Site) -> None:
    body = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        + b"x" * 400_000
        + b"\r\n--b--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    task = prefork.ended(prefork.start("/echo/1", body=body, headers=headers))
    assert task["Result"]["size"] == 400_000


def test_an_exception_in_the_worker_fails_the_task(any_pool: Site) -> None:
    task = any_pool.ended(any_pool.start("/fail"))
    assert (task["State"], task["Error"]) == ("Failed", "ValueError: on purpose")


def test_progress_and_events_are_streamed_by_the_web_server(any_pool: Site) -> None:
    task_id = any_pool.start("/talk/10")
    with Stream(any_pool.port, f"/task/{task_id}/events") as stream:
        messages = list(stream.messages())
    words = [message.short for message in messages if message.name == "word"]
    assert words == list(range(10))
    assert any(message.name == "task.progress" for message in messages)
    assert messages[-1].data["State"] == "Completed"
    task = any_pool.task(task_id)
    assert (task["Progress"], task["Result"]) == (100, "said")


def test_the_web_server_sends_the_callback(tmp_path: Path, redis: str) -> None:
    hosts = {"callback_allowed_hosts": ["127.0.0.1"]}
    with (
        HTTPServer("127.0.0.1", threaded=True) as receiver,
        new_site(tmp_path / "site", redis, **hosts) as site,
    ):
        receiver.expect_request("/hook").respond_with_data(status=204)
        site.worker("threads")
        task_id = site.start("/calling", document={"callbackUrl": receiver.url_for("/hook")})
        (sent,) = eventually_true(lambda: lines(site.folder, "sent")[task_id], 15, 0.02)
        assert sent["pid"] in site.server.workers()
        ((request, _),) = receiver.log
        document = request.get_json()
        assert (document["Id"], document["State"]) == (task_id, "Completed")
        assert document["Result"] == "called"
        assert site.task(task_id)["CallbackInfo"]["State"] == "Completed"


def test_a_wait_returns_when_the_task_ends(any_pool: Site) -> None:
    task_id = any_pool.start("/work/300")
    began = time.monotonic()
    task = send(any_pool.port, "GET", f"/task/{task_id}?wait=10").json()
    assert task["State"] == "Completed"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
@pytest.mark.parametrize("path", ["/loop", "/slow/60000"])
def test_a_stop_ends_a_running_task(
    sites: Callable[[str, str], Site], redis: str, pool: str, path: str
) -> None:
    """With gevent, a view is only asked to stop."""
    site = sites(redis, pool)
    task_id = site.start(path)
    site.begun(task_id)
    stopped = site.stop(task_id)
    assert (stopped["State"], stopped["Error"]) == ("Aborted", "Aborted by the user")
    site.ended(task_id, 5)
    assert site.ended(site.start("/work/1"))["State"] == "Completed"


@pytest.mark.parametrize("path", ["/loop", "/deaf/60000", "/gil"])
@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_a_stop_kills_a_prefork_process(
    request: pytest.FixtureRequest, sites: Callable[[str, str], Site], broker: str, path: str
) -> None:
    site = sites(request.getfixturevalue(broker), "prefork")
    task_id = site.start(path)
    pid = site.begun(task_id)
    began = time.monotonic()
    site.stop(task_id)
    eventually_true(lambda: not is_running(pid), 5)
    assert time.monotonic() - began <= KILL_SECONDS
    assert site.ended(task_id, 5)["State"] == "Aborted"
    assert site.runs(task_id) == 1
    assert site.ended(site.start("/work/1"))["State"] == "Completed"


def test_a_timeout_kills_a_prefork_process_that_holds_the_gil(prefork: Site) -> None:
    task_id = prefork.start("/short-gil")
    pid = prefork.begun(task_id)
    task = prefork.ended(task_id, OVERDUE_SECONDS)
    assert (task["State"], task["Error"]) == ("Aborted", "Timeout")
    assert not is_running(pid)
    assert prefork.runs(task_id) == 1
    assert prefork.ended(prefork.start("/work/1"))["State"] == "Completed"


def test_a_stop_while_the_broker_is_down(tmp_path: Path) -> None:
    """The worker reads the stop from the store. It needs the broker only to kill code that holds
    the GIL.
    """
    with RedisServer(tmp_path) as redis, new_site(tmp_path / "site", redis.url) as site:
        site.worker("prefork", 2)
        held, slow = site.start("/gil"), site.start("/slow/60000")
        pid = site.begun(held)
        site.begun(slow)
        redis.kill()
        for task_id in (held, slow):
            stopped = site.stop(task_id)
            assert (stopped["State"], stopped["Error"]) == ("Aborted", "Aborted by the user")
        site.ended(slow)
        assert site.task(held)["Stopping"] and is_running(pid)
        redis.start()
        site.ended(held, OVERDUE_SECONDS)
        assert not is_running(pid)
        assert site.ended(site.start("/work/1"))["State"] == "Completed"


def test_a_view_that_cannot_be_killed_is_reported_as_stopping(
    sites: Callable[[str, str], Site], redis: str
) -> None:
    site = sites(redis, "threads")
    task_id = site.start("/deaf/3000")
    site.begun(task_id)
    site.stop(task_id)
    task = site.task(task_id)
    assert (task["State"], task["Stopping"]) == ("Aborted", True)
    site.ended(task_id)


def test_a_stopped_waiting_task_does_not_start(site: Site) -> None:
    task_id = site.start("/work/1")
    assert site.stop(task_id)["State"] == "Aborted"
    site.worker("solo")
    assert site.ended(site.start("/work/1"))["State"] == "Completed"
    assert site.runs(task_id) == 0


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_timeout_ends_the_task(sites: Callable[[str, str], Site], redis: str, pool: str) -> None:
    """With gevent, a view is only asked to stop."""
    site = sites(redis, pool)
    began = time.monotonic()
    task = site.ended(site.start("/short"))
    assert (task["State"], task["Error"]) == ("Aborted", "Timeout")
    assert time.monotonic() - began < 5


def test_a_killed_process_of_the_pool_loses_its_task(prefork: Site) -> None:
    task_id, again_id = prefork.start("/deaf/60000"), prefork.start("/again/500")
    os.kill(prefork.begun(again_id), signal.SIGKILL)
    os.kill(prefork.begun(task_id), signal.SIGKILL)
    task = prefork.ended(task_id, LOST_SECONDS)
    assert (task["State"], task["Error"]) == ("Aborted", "Worker lost")
    assert prefork.ended(again_id)["State"] == "Completed"
    assert (prefork.runs(task_id), prefork.runs(again_id)) == (1, 2)


def test_a_view_that_exits_its_process_loses_its_task(prefork: Site) -> None:
    task = prefork.ended(prefork.start("/exit/3"), LOST_SECONDS + 2)
    assert (task["State"], task["Error"]) == ("Aborted", "Worker lost")


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_killed_worker_loses_its_tasks(site: Site, pool: str) -> None:
    worker = site.worker(pool)
    task_id, again_id = site.start("/deaf/60000"), site.start("/again/500")
    site.begun(task_id)
    site.begun(again_id)
    worker.kill()
    assert site.ended(task_id, LOST_SECONDS)["Error"] == "Worker lost"
    assert site.task(again_id)["State"] == "NotStarted"
    worker.start()
    assert site.ended(again_id, RESEND_SECONDS)["State"] == "Completed"
    assert (site.runs(task_id), site.runs(again_id)) == (1, 2)


def test_a_warm_shutdown_waits_for_tasks(site: Site, pool: str) -> None:
    if pool == "gevent":
        pytest.importorskip("gevent")
    worker = site.worker(pool)
    task_id = site.start("/slow/1500")
    site.begun(task_id)
    worker.send(signal.SIGTERM)
    worker.wait()
    assert site.ended(task_id)["State"] == "Completed"
    assert site.runs(task_id) == 1
    assert "Traceback" not in worker.output()


def test_a_cold_shutdown_ends_tasks(site: Site) -> None:
    """With other pools, Celery cannot end them: it waits, or raises an exception in the view."""
    worker = site.worker("prefork")
    task_id, again_id = site.start("/slow/20000"), site.start("/again/300")
    site.begun(task_id)
    worker.send(signal.SIGQUIT)
    task = site.ended(task_id)
    assert (task["State"], task["Error"]) == ("Aborted", "Server shutdown")
    worker.wait(30)  # Celery waits up to 10 s for the results of processes that have exited
    worker.start()
    assert site.ended(again_id, RESEND_SECONDS)["State"] == "Completed"


@pytest.mark.parametrize("limit", ["task_time_limit", "task_soft_time_limit"])
def test_time_limits_of_celery_end_the_task(tmp_path: Path, redis: str, limit: str) -> None:
    with new_site(tmp_path / "site", redis, **{limit: 3}) as site:
        site.worker("prefork", 1)
        # The first task of a process also opens the store.
        assert site.ended(site.start("/work/1"))["State"] == "Completed"
        task = site.ended(site.start("/loop"))
        if limit == "task_time_limit":
            # Celery sends SIGTERM and soon after SIGKILL.
            assert task["State"] == "Aborted"
            assert task["Error"] in ("Worker lost", "Server shutdown")
        else:
            assert task["State"] == "Failed" and "SoftTimeLimitExceeded" in task["Error"]
        assert site.ended(site.start("/work/1"))["State"] == "Completed"


def test_late_acknowledgements_run_no_task_twice(tmp_path: Path, rabbitmq: str) -> None:
    """RabbitMQ delivers the messages of a dead worker again at once."""
    with new_site(tmp_path / "site", rabbitmq, task_acks_late=True) as site:
        worker = site.worker("prefork", 2)
        task_id, again_id = site.start("/deaf/60000"), site.start("/again/300")
        site.begun(task_id)
        site.begun(again_id)
        worker.kill()
        worker.start()
        assert site.ended(task_id)["Error"] == "Worker lost"
        assert site.ended(again_id, RESEND_SECONDS)["State"] == "Completed"
        assert site.ended(site.start("/work/1"))["State"] == "Completed"
        assert (site.runs(task_id), site.runs(again_id)) == (1, 2)


@pytest.mark.covers("F36")
def test_a_preloaded_app_that_has_sent_a_message(tmp_path: Path, any_broker: str) -> None:
    """Each process that gunicorn forks needs its own connection to the broker."""
    with ExitStack() as stack:
        folder = tmp_path / "site"
        folder.mkdir()
        queue = f"live-{uuid4().hex}"
        stack.callback(delete_queue, any_broker, queue)
        variables = environ(folder, any_broker, queue)
        module = tmp_path / "used_app.py"
        module.write_text(
            "from tests.support.apps.celery_crowd import create_app\n"
            "app = create_app()\n"
            "assert app.test_client().put('/named/before').status_code == 202\n"
        )
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        server = stack.enter_context(
            gunicorn(
                tmp_path / "web", "used_app:app", "--workers", "2", "--preload",
                environ={**variables, "PYTHONPATH": path}, conf=START,
            )
        )  # fmt: skip
        stack.enter_context(CeleryWorker(tmp_path / "worker", variables, pool="threads"))
        started: dict[str, int] = {}

        def have_both_started() -> bool:
            with Connection(server.port) as connection:
                reply = connection.send("PUT", "/quick")
                assert reply.status == 202, reply.body
                started[reply.json()["Id"]] = reply.pid
            return set(started.values()) == set(server.workers())

        eventually_true(have_both_started, 20, 0.02)
        for task_id in ("before", *started):
            eventually_true(
                lambda path=f"/task/{task_id}": (
                    send(server.port, "GET", path).json()["State"] == "Completed"
                ),
                15, 0.02,
            )  # fmt: skip
        server.assert_no_traceback()


def test_a_doubled_message_runs_the_task_once(any_broker: str, tmp_path: Path) -> None:
    with new_site(tmp_path / "site", any_broker) as site:
        celery = new_celery(any_broker, site.queue)
        task_id = site.start("/work/200")
        for _ in range(5):
            celery.send_task(TASK, (task_id,), task_id=task_id)
        site.worker("prefork", 2)
        assert site.ended(task_id)["State"] == "Completed"
        assert site.ended(site.start("/work/1"))["State"] == "Completed"
        assert site.runs(task_id) == 1


@pytest.mark.covers("F52")
def test_a_message_for_an_ended_task_does_nothing(prefork: Site) -> None:
    celery = new_celery(prefork.broker, prefork.queue)
    done, stopped = prefork.start("/work/1"), prefork.start("/loop")
    prefork.ended(done)
    prefork.begun(stopped)
    prefork.stop(stopped)
    before = [prefork.ended(done), prefork.ended(stopped)]
    for task_id in (done, stopped):
        celery.send_task(TASK, (task_id,), task_id=task_id)
    assert prefork.ended(prefork.start("/work/1"))["State"] == "Completed"
    assert [prefork.task(done), prefork.task(stopped)] == before
    assert (prefork.runs(done), prefork.runs(stopped)) == (1, 1)


def test_a_lost_message_is_sent_again(any_broker: str, tmp_path: Path) -> None:
    with new_site(tmp_path / "site", any_broker) as site:
        task_id = site.start("/work/1")
        assert purge_queue(any_broker, site.queue) == 1
        site.worker("threads", 2)
        assert site.ended(task_id, RESEND_SECONDS)["State"] == "Completed"
        assert site.runs(task_id) == 1


def test_a_lost_message_of_a_retry_is_sent_again(site: Site) -> None:
    worker = site.worker("threads", 2)
    task_id = site.start("/later/1.5")
    eventually_true(lambda: site.task(task_id).get("NextAttemptTime"))
    worker.kill()
    eventually_true(lambda: purge_queue(site.broker, site.queue), 10, 0.05)
    worker.start()
    assert site.ended(task_id, RESEND_SECONDS)["Result"] == 2


def test_a_lost_message_is_found_while_others_wait(site: Site) -> None:
    lost = site.start("/work/1")
    purge_queue(site.broker, site.queue)
    waiting = [site.start("/work/1") for _ in range(3)]
    eventually_true(lambda: _length(site) == 4, RESEND_SECONDS, 0.1)
    site.worker("solo")
    for task_id in (lost, *waiting):
        assert site.ended(task_id)["State"] == "Completed"


def _length(site: Site) -> int:
    with new_celery(site.broker).connection_for_read() as connection:
        queue = connection.default_channel.queue_declare(site.queue, passive=True)
        return int(queue.message_count)


def test_failed_attempts_are_retried(any_pool: Site) -> None:
    task = any_pool.ended(any_pool.start("/retry/2"))
    assert (task["State"], task["Result"], task["Attempt"]) == ("Completed", 3, 3)
    task = any_pool.ended(any_pool.start("/retry/5"))
    assert (task["State"], task["Error"]) == ("Failed", "ValueError: attempt 3")
    assert any_pool.runs(task["Id"]) == 3


def test_a_unique_key_has_one_unfinished_task(prefork: Site) -> None:
    headers = {"Authorization": "anna"}
    task_id = prefork.start("/unique/one", headers=headers)
    prefork.begun(task_id)
    assert prefork.start("/unique/one", headers=headers) == task_id
    prefork.stop(task_id)
    prefork.ended(task_id)
    other = prefork.start("/unique/one", headers=headers)
    assert other != task_id
    prefork.begun(other)
    prefork.stop(other)
    prefork.ended(other)


def test_a_task_that_waits_too_long_for_a_worker_expires(site: Site) -> None:
    task_id = site.start("/impatient")
    task = site.ended(task_id, 5)
    assert (task["State"], task["Error"]) == ("Aborted", "Expired")
    site.worker("solo")
    assert site.ended(site.start("/work/1"))["State"] == "Completed"
    assert site.runs(task_id) == 0


def test_an_id_is_used_again_after_its_task_was_stopped(prefork: Site) -> None:
    """Celery ignores messages of an id for hours after `revoke`."""
    for path in ("/named/again?long=1", "/named/again"):
        assert prefork.start(path) == "again"
        prefork.begun("again", 1 if "long" in path else 2)
        if "long" in path:
            prefork.stop("again")
        prefork.ended("again")
        reply = send(prefork.port, "DELETE", "/task/again?purge=true")
        assert reply.status == 204, reply.body


def test_a_worker_without_the_route_leaves_the_task_to_others(site: Site, tmp_path: Path) -> None:
    old = environ(site.folder, site.broker, site.queue, is_old=True)
    with CeleryWorker(tmp_path / "old", old, pool="solo") as worker:
        task_id = site.start("/new")
        eventually_true(lambda: "has no async route with the endpoint 'new'" in worker.output(), 10)
    assert site.task(task_id)["State"] == "NotStarted"
    site.worker("solo")
    assert site.ended(task_id, RESEND_SECONDS)["State"] == "Completed"
