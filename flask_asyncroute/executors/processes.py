"""Runs each task in a child process of its own: for work that computes, that crashes, or that must be stopped for certain.

A thread of this process supervises each: it claims the task, hands it over, writes what comes back, and outlives whatever
happens to the child.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future

import msgspec

from ..encoding import clean_text
from ..execution import Execution
from ..finalizers import when_gone
from ..outcome import Outcome, cause_of, died
from ..snapshot import Body
from ..states import State
from ..stores.base import Claim
from ..task import MAX_ERROR
from . import frames
from .base import Run, TaskExecutor
from .children import Child, ForkServer
from .pool import ElasticThreadPool
from .spares import Spares

logger = logging.getLogger("flask_asyncroute")

LEAVE_SECONDS = 2.0
"""How long a child may take to end after its view has: exit functions, threads that are no daemons."""


class ProcessTaskExecutor(TaskExecutor):
    """Runs up to ``max_workers`` children at once, one task each; a stop kills the child and its process group.

    :param server: starts the children.
    :param min_workers: how many more children are kept ready once there was a task.
    """

    def __init__(
        self, name: str, run: Run, server: ForkServer, min_workers: int, max_workers: int, queue_size: int
    ) -> None:
        super().__init__(run, max_workers, queue_size)
        self._pool = ElasticThreadPool(name, 0, max_workers)
        when_gone(self, self._pool.shutdown, False)
        self._spares = Spares(server, min_workers)
        when_gone(self, self._spares.close)
        self._running: dict[str, Child] = {}

    def hand_over(self, claim: Claim, body: Body | None, execution: Execution) -> Outcome:
        task = claim.task
        child = self._running[task.id] = self._spares.take()
        execution.cancel_with(child.kill)
        try:
            child.send(
                frames.Job(
                    task.id,
                    task.endpoint,
                    task.user,
                    task.epoch,
                    execution.deadline,
                    msgspec.Raw(claim.request),
                    task.body_size,
                ),
                body,
            )
            self._spares.refill()
            return _follow(child, execution)
        finally:
            execution.cancel_with(None)

    def close(self) -> None:
        # What waits stays where it is stored, and is taken by another process.
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._spares.close()

    def _start(self, task_id: str) -> Future[None]:
        return self._pool.submit(self._run_counted, task_id)

    def _leave(self, task_id: str) -> None:
        # The outcome is written by now. The place is taken as long as the child is there.
        try:
            child = self._running.pop(task_id, None)
            if child is not None:
                child.leave(LEAVE_SECONDS)
        finally:
            super()._leave(task_id)


def _follow(child: Child, execution: Execution) -> Outcome:
    """Pass on what a child reports until its view has ended; return how."""
    try:
        for kind, payload in child.listen():
            if kind == frames.PROGRESS:
                _advance(execution, msgspec.json.decode(payload, type=frames.Report))
            elif kind == frames.EVENT:
                sent = msgspec.json.decode(payload, type=frames.Sent)
                execution.send_event(sent.name, bytes(sent.data))
            elif kind == frames.OUTCOME:
                return _outcome(execution, msgspec.json.decode(payload, type=frames.Ending))
    except (frames.FrameError, msgspec.DecodeError) as error:
        child.kill()
        child.is_gone(None)
        logger.error("The child of task %s sent what cannot be read: %s", execution.task_id, error)
        return died("what it sent cannot be read")
    cause = cause_of(child.status)
    if not execution.stop.is_set():
        logger.error("The child of task %s died: %s.", execution.task_id, cause)
    return died(cause)


def _advance(execution: Execution, report: frames.Report) -> None:
    if report.progress is not None:
        execution.advance(report.progress, report.message)


def _outcome(execution: Execution, ending: frames.Ending) -> Outcome:
    _advance(execution, ending.report)
    if ending.state is State.COMPLETED:
        result = bytes(ending.result)
        # Looked through, since a child's word is no proof; null is the result of a view that returned None.
        return Outcome(ending.state, {} if msgspec.json.decode(result) is None else {"result_json": result})
    if not ending.state.is_terminal or ending.error is None:
        raise frames.FrameError(f"An outcome came with the State {ending.state}, which is none.")
    values = {"error": clean_text(ending.error, MAX_ERROR), "error_status": ending.error_status}
    return Outcome(ending.state, {name: value for name, value in values.items() if value is not None})
