"""The executor behind ``executor="celery"``: sends the ids of tasks to the app's Celery workers.

In a Celery worker, the same executor interrupts views that do not stop; see `celery_task`.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import CodeType, FrameType
from typing import Any, TypeVar

from billiard.process import current_process
from celery import Celery, shared_task
from celery.exceptions import OperationalError
from celery.signals import worker_init, worker_process_init

from ..errors import BrokerUnavailable
from ..task import AsyncRouteTask
from .base import PoolSettings, TaskExecutor
from .execution import Execution
from .interruption import interrupt
from .registry import CELERY_CHILD

logger = logging.getLogger("flask_asyncroute")

T = TypeVar("T")
TASK_NAME = "flask_asyncroute.run"
KILL = "flask_asyncroute_kill"
"""The remote control command that kills the process of a stopped task."""
RESPONSE_SECONDS = 4.0
"""How long the broker may take to respond. A start is refused within 5 s."""
FORGET_SECONDS = 60.0  # seconds after which a call without a response no longer counts
NOT_FOUND = "404"  # the code in AMQP, which all transports use
LOG_AGAIN_SECONDS = 60.0  # seconds until the same error is logged again
ONE_RETRY = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}


class CeleryTaskExecutor(TaskExecutor):
    """Sends tasks to Celery workers. The broker holds the queue, so no slots are counted here."""

    can_kill = False
    """Whether this process is a worker's child, which runs one task at a time (prefork)."""

    def __init__(self, settings: PoolSettings) -> None:
        super().__init__(settings)
        assert settings.host is not None
        self.interrupt_after = settings.interrupt_after
        self._celery = settings.host.celery
        self._options = dict(settings.celery)
        self._asked: dict[Future[Any], float] = {}
        """The calls that wait for the broker, and when they began."""
        self._logged = ""
        self._log_again_at = 0.0

    def reserve(self) -> None: ...

    def release(self) -> None: ...

    def close(self) -> None: ...

    def submit(self, task_id: str) -> None:
        """Send a task to the workers.

        :raises BrokerUnavailable: if the broker does not accept the message.
        """

        def send() -> None:
            self._celery.send_task(
                TASK_NAME, (task_id,), task_id=task_id, ignore_result=True, retry=True,
                retry_policy=ONE_RETRY, **self._options,
            )  # fmt: skip

        try:
            self._ask(send).result(RESPONSE_SECONDS)
        except (OperationalError, OSError) as error:
            self._log(error)
            raise BrokerUnavailable(
                "The message broker is unavailable at the moment, so the task was not started. Try "
                "again.",
                retry_after=5,
            ) from error

    def takeover_capacity(self) -> int:
        """Return 0: lost messages are sent again by `workers.lost_messages`."""
        return 0

    def cancel(self, task: AsyncRouteTask) -> None:
        if task.owner is None or not task.owner.startswith(CELERY_CHILD):
            return  # The worker reads the stop from the store, and other pools cannot kill.
        # Not Celery's command `revoke`, because workers would ignore a later task with this id.
        pid = int(task.owner.removeprefix(CELERY_CHILD).partition("-")[0])
        arguments = {"task_id": task.id, "pid": pid}

        def kill() -> None:
            try:
                self._celery.control.broadcast(KILL, arguments=arguments)
            except Exception as error:
                self._log(error)

        try:
            self._ask(kill)
        except OSError as error:
            self._log(error)

    def interrupt(self, execution: Execution) -> bool:
        return interrupt(execution)

    def abandon(self, task_id: str) -> None:
        if self.can_kill:
            # The abort is stored. Other processes notice the death, and the worker replaces this
            # child.
            os.kill(os.getpid(), signal.SIGKILL)

    def queue_name(self) -> str | None:
        """Return the queue of this route; None if only the broker knows it."""
        queue = self._celery.amqp.router.route(dict(self._options), TASK_NAME).get("queue")
        return None if queue is None else str(queue.name)

    def waiting_messages(self) -> int | None:
        """Return the number of messages in the queue of this route; None if it is unknown."""
        name = self.queue_name()

        def count() -> int:
            with self._celery.connection_for_read() as connection:
                declared = connection.default_channel.queue_declare(name, passive=True)
                return int(declared.message_count)

        if name is None:
            return None
        try:
            return self._ask(count).result(RESPONSE_SECONDS)
        except Exception as error:
            if str(getattr(error, "reply_code", "")) == NOT_FOUND:
                return 0  # Redis has no empty queues.
            # Some brokers cannot count.
            logger.debug("The messages of a Celery queue could not be counted: %r", error)
            return None

    def _ask(self, call: Callable[[], T]) -> Future[T]:
        """Call a function on a new thread, because a broker that accepts connections but never
        responds can block it forever.

        :raises TimeoutError: if the broker has not responded to an earlier call, so that only the
            threads of a few seconds are blocked.
        """
        now = time.monotonic()
        ages = [now - began for began in list(self._asked.values())]
        if any(RESPONSE_SECONDS <= age < FORGET_SECONDS for age in ages):
            raise TimeoutError("The broker does not respond.")
        future: Future[T] = Future()
        self._asked[future] = now

        def work() -> None:
            try:
                answer = call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(answer)
            finally:
                del self._asked[future]

        try:
            threading.Thread(target=work, name="asyncroute-broker", daemon=True).start()
        except RuntimeError as error:  # the system has no more threads
            del self._asked[future]
            raise OSError(str(error)) from error
        return future

    def _log(self, error: Exception) -> None:
        text = f"{type(error).__name__}: {error or 'The broker does not respond.'}"
        now = time.monotonic()
        if text != self._logged or now >= self._log_again_at:
            self._logged, self._log_again_at = text, now + LOG_AGAIN_SECONDS
            logger.error(
                "The broker of ASYNCROUTE_CELERY cannot be used: %s. Check that it is running.",
                text,
            )


def register(
    run: Callable[[Celery, str], None], prepare: Callable[[], None], end: Callable[[], None],
    during: CodeType,
) -> None:  # fmt: skip
    """Make ``run`` the task :data:`TASK_NAME` of all Celery apps of this process.

    :param run: called in a worker with the Celery app and the task's id.
    :param prepare: called in a worker's main process before it creates its pool.
    :param end: called on its own thread in a child process that must exit during a run.
    :param during: the code that handles all exceptions of a view. Celery's soft time limit
        raises its exception only while this code runs.
    """

    def call(self: Any, task_id: str) -> None:
        if not CeleryTaskExecutor.can_kill:
            run(self.app, task_id)
            return
        handlers: dict[int, Callable[..., None]] = {signal.SIGTERM: on_term}
        on_soft_limit = signal.getsignal(signal.SIGUSR1)  # Celery's pool sends this signal
        if callable(on_soft_limit):
            handlers[signal.SIGUSR1] = _only_within(during, on_soft_limit)
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            run(self.app, task_id)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_term(*_: Any) -> None:
        # Celery would raise SystemExit in the view, which would look like its error. A thread,
        # because the interrupted code can hold any lock.
        threading.Thread(target=end_process, name="asyncroute-end", daemon=True).start()

    def end_process() -> None:
        try:
            end()
        finally:
            os._exit(0)

    def on_worker(**extra: Any) -> None:
        from celery.worker.control import control_command  # web servers do not need it

        control_command(name=KILL, args=[("task_id", str), ("pid", int)])(_kill)
        prepare()

    shared_task(name=TASK_NAME, bind=True, ignore_result=True, max_retries=0, typing=False)(call)
    worker_init.connect(on_worker, weak=False)
    worker_process_init.connect(_on_process, weak=False)


def _only_within(code: CodeType, handler: Callable[..., Any]) -> Callable[..., None]:
    """Return a signal handler that calls ``handler`` if the signal interrupts this code.

    Celery's handler raises an exception. While a task is claimed or its outcome is stored, that
    would leave the task Running without an end.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        caller = frame
        while caller is not None:
            if caller.f_code is code:
                handler(number, frame)
                return
            caller = caller.f_back

    return handle


def _on_process(**extra: Any) -> None:
    # The solo pool also sends this signal, in the worker's only process, which must not be killed.
    CeleryTaskExecutor.can_kill = current_process().daemon


def _kill(state: Any, task_id: str, pid: int) -> None:
    """Kill the child process that runs a task. All workers receive this command."""
    from celery.worker.state import active_requests

    # Not by id alone: a second message for the task replaces the first in other tables.
    for request in list(active_requests):
        if request.id == task_id and request.worker_pid == pid:
            request.terminate(state.consumer.pool, signal="SIGKILL")
            return
