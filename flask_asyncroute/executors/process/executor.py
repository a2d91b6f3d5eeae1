"""The executor that runs tasks in child processes (``executor="process"``)."""

from __future__ import annotations

import logging
import threading
from collections import deque
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import msgspec

from ...background import when_gone
from ...encoding import clean_text
from ...snapshot import Body
from ...stores.base import Claim
from ...task import MAX_ERROR, State
from ..base import Host, PoolSettings
from ..execution import Execution
from ..outcome import Outcome, cause_of, died
from ..thread import PooledTaskExecutor
from . import protocol
from .supervisor import Child, ForkServer

logger = logging.getLogger("flask_asyncroute")

LEAVE_SECONDS = 2.0
"""Seconds that a child process has, after its view, for exit functions and non-daemon threads."""

_fork_servers: WeakKeyDictionary[Host, ForkServer] = WeakKeyDictionary()


def fork_server_of(host: Host) -> ForkServer:
    """Return the fork server of ``host``, which forks the children of all its pools."""
    server = _fork_servers.get(host)
    if server is None:
        server = _fork_servers[host] = ForkServer(host.child_settings())
    return server


class ProcessTaskExecutor(PooledTaskExecutor):
    """Runs each task in its own child process. A stop kills the child and its process group.

    A thread of this process supervises each child. After the first task, ``min_workers`` spare
    children are kept ready, because loading the app takes time.
    """

    def __init__(self, settings: PoolSettings) -> None:
        super().__init__(settings, 0)
        assert settings.host is not None
        self._server = fork_server_of(settings.host)
        self._min_workers = settings.min_workers
        self._children: dict[str, Child] = {}
        self._spares: deque[Child] = deque()
        self._refilling = threading.Lock()
        self._is_closed = False
        when_gone(self, _drop_all, self._spares)

    def take_child(self) -> Child:
        """Return a spare child process, or start a new one.

        The caller must end it with `Child.leave`.

        :raises OSError: if no child can be started.
        """
        with suppress(IndexError):
            while True:
                child = self._spares.popleft()
                if not child.is_gone():
                    return child
                child.drop()
        return self._server.start()

    def refill(self) -> None:
        # If this fails, the next task starts its own child and reports the error.
        with self._refilling, suppress(OSError):
            while not self._is_closed and len(self._spares) < self._min_workers:
                self._spares.append(self._server.start())

    def hand_over(self, claim: Claim, body: Body | None, execution: Execution) -> Outcome:
        task = claim.task
        job = protocol.Job(
            task.id, task.endpoint, task.user, task.epoch, execution.deadline,
            msgspec.Raw(claim.request), task.body_size, execution.attempt, execution.retries_left,
        )  # fmt: skip
        child = self._children[task.id] = self.take_child()
        execution.cancel_with(child.kill)
        try:
            child.send(job, body)
            self.refill()
            return _receive_outcome(child, execution)
        finally:
            execution.cancel_with(None)

    def close(self) -> None:
        # Waiting tasks stay in the store, for other processes.
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._refilling:
            self._is_closed = True
            _drop_all(self._spares)
        self._server.close()

    def _leave(self, task_id: str) -> None:
        # The outcome is already stored. The slot stays in use until the child ends.
        try:
            child = self._children.pop(task_id, None)
            if child is not None:
                child.leave(LEAVE_SECONDS)
        finally:
            self.release()


def _drop_all(children: deque[Child]) -> None:
    while children:
        children.popleft().drop()


def _receive_outcome(child: Child, execution: Execution) -> Outcome:
    # Until the outcome arrives, pass the child's progress and events on.
    try:
        for kind, payload in child.listen():
            if kind == protocol.PROGRESS:
                execution.advance(*msgspec.json.decode(payload, type=protocol.Report))
            elif kind == protocol.EVENT:
                name, data = msgspec.json.decode(payload, type=protocol.Event)
                execution.send_event(name, bytes(data))
            elif kind == protocol.OUTCOME:
                ending = msgspec.json.decode(payload, type=protocol.Ending)
                execution.advance(*ending.report)
                return _outcome(ending)
    except (protocol.FrameError, msgspec.DecodeError) as error:
        child.kill()
        child.is_gone(None)
        logger.error(
            "The child process of task %s sent invalid data and was killed: %s",
            execution.task_id, error,
        )  # fmt: skip
        return died("it sent invalid data")
    cause = cause_of(child.status)
    if not execution.stop.is_set():
        level = logging.WARNING if execution.retries_left else logging.ERROR
        logger.log(level, "The child process of task %s died: %s.", execution.task_id, cause)
    return died(cause)


def _outcome(ending: protocol.Ending) -> Outcome:
    if ending.state is State.COMPLETED:
        result = bytes(ending.result)
        # Decode the result to validate it. null means that the view returned None.
        is_none = msgspec.json.decode(result) is None
        return Outcome(State.COMPLETED, {} if is_none else {"result_json": result})
    if not ending.state.is_terminal or ending.error is None:
        raise protocol.FrameError(f"invalid outcome with the State {ending.state}")
    values: dict[str, Any] = {"error": clean_text(ending.error, MAX_ERROR)}
    if ending.error_status is not None:
        values["error_status"] = ending.error_status
    return Outcome(ending.state, values, ending.can_retry, ending.retry_after)
