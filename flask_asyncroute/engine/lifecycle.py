"""The only module that changes the State of tasks. Each change is one store transaction, followed
by a signal.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

from blinker import NamedSignal
from flask import Flask

from .. import signals
from ..callbacks.model import PENDING, Delivery
from ..errors import CommitUnknown, StoreUnavailable, TaskUnfinished
from ..executors.execution import Execution
from ..request import context
from ..snapshot import Body
from ..stores.base import Claim, Expect, SharedTaskStore, StartKey, TaskStore
from ..task import TERMINAL, TRANSITIONS, AsyncRouteTask, State, now_us
from .pending_writes import PendingWrites

logger = logging.getLogger("flask_asyncroute")

MAX_RESTARTS = 2  # Maximum restarts of a task with ``on_loss="restart"`` after its worker died.
NOTIFIED_SECONDS = 0.3
"""Minimum time between the end of a task and its deletion, so that streams and waits read it."""
EXPIRING_SECONDS = 1.0
"""Maximum time of one check for expired tasks, so that other maintenance is not delayed."""
PAGE = 500
LOST = "Worker lost"
SHUT_DOWN = "Server shutdown"
NOT_STARTED_IN_TIME = "Expired"

_SET_BY_RUN = ("owner", "started_us", "expires_us", "progress", "progress_message")
_FINISHED = {
    State.COMPLETED: signals.task_completed,
    State.FAILED: signals.task_failed,
    State.ABORTED: signals.task_aborted,
}


class Lifecycle:
    """Executes the state transitions of tasks in one store.

    Thread-safe; needs no app context. Methods raise `StoreUnavailable` if the store does. Methods
    that return a task return None, and change nothing, if the task is not in the expected state.
    """

    def __init__(self, app: Flask, store: TaskStore, owner: str) -> None:
        self._app = app
        self._store = store
        self.owner = owner  # The worker name of this process.
        self.pending_writes = PendingWrites()
        self.call_at: Callable[[int], None] = lambda time_us: None
        """Called with the start time of each task that waits for a retry or has a start time."""
        self.on_restart: Callable[[AsyncRouteTask], None] = lambda task: None
        """Called with each task that waits again because its worker ended."""
        # Signals hold weak references, so they do not keep this object alive.
        signals.progress_reported.connect(self.on_progress_reported, sender=app)

    def create(
        self, task: AsyncRouteTask, request: bytes, body: Body | None,
        grants: Collection[tuple[str, str]], key: StartKey | None = None, quota: int | None = None,
        delivery: Delivery | None = None,
    ) -> None:  # fmt: skip
        """Store a new task; see :meth:`TaskStore.add` for parameters and errors."""
        try:
            self._store.add(task, request, body, grants, key, quota, delivery)
        except CommitUnknown:
            # The client gets an error, so delete the task if it was stored. With an idempotency
            # key, keep it for the client's retry. Also keep it if another start can have got its
            # id because of the unique key; any process can run it.
            is_shared = task.unique_key is not None and task.owner is None
            if key is None and not is_shared:
                self.pending_writes.keep(task.id, lambda: self._undo_create(task))
            raise
        self._created(task)

    def publish(self, task: AsyncRouteTask) -> AsyncRouteTask | None:
        """Publish a task that a transaction of the app has added; see `SharedTaskStore.joined`.
        Return None if it is already published.
        """
        published = None
        if isinstance(self._store, SharedTaskStore):
            published = self._store.publish(task.id)
        if published is not None:
            self._created(published)
        return published

    def claim(self, task_id: str) -> Claim | None:
        """Move a task from NotStarted to Running, with this process as its owner. Return None if it
        is not NotStarted, its start time has not come, or its time for the first start has passed.
        """
        now = now_us()
        try:
            claim = self._store.claim(task_id, self.owner, now)
        except CommitUnknown:
            # The task could be stored as Running although no process runs it.
            self.pending_writes.keep(task_id, lambda: self._undo_claim(task_id, now))
            raise
        if claim is None:
            return None
        start_by_us = claim.task.start_by_us
        if start_by_us is not None and start_by_us <= now_us():
            # The store has answered late. The view must not begin now.
            expect = Expect((State.RUNNING,), self.owner, claim.task.epoch)
            never = {"started_us": None, "expires_us": None}
            self.pending_writes.write(
                task_id,
                lambda: self._abort(task_id, expect, NOT_STARTED_IN_TIME, stopping=False, **never),
            )
            return None
        self.notify(signals.task_started, claim.task)
        return claim

    def finish(
        self, execution: Execution, state: State, values: dict[str, Any]
    ) -> AsyncRouteTask | None:
        """Store the terminal ``state``, ``values`` and last progress of an executed task. If the
        task was already aborted, only clear its Stopping flag.
        """
        self.write_events(execution)
        progress, message = execution.final_report()
        if progress is not None:
            reached = 100.0 if state is State.COMPLETED else progress
            values = {"progress": reached, "progress_message": message, **values}
        task = self._finish(execution.task_id, self._held_by(execution), state, values)
        if task is None:
            self.release(execution)
        return task

    def retry(
        self, execution: Execution, error: str, start_at_us: int, is_bound: bool
    ) -> AsyncRouteTask | None:
        """Schedule the next attempt of a task whose attempt has failed. If the task was already
        aborted, only clear its Stopping flag.

        :param is_bound: whether only this process can run the task.
        """
        self.write_events(execution)
        task = self._requeue(
            execution.task_id, self._held_by(execution), signals.task_retried,
            attempt=execution.attempt + 1, last_error=error, start_at_us=start_at_us,
            owner=self.owner if is_bound else None,
        )  # fmt: skip
        if task is None:
            self.release(execution)
        else:
            self.call_at(start_at_us)
        return task

    def abort(self, task: AsyncRouteTask, error: str) -> AsyncRouteTask | None:
        """Abort a task unless its state, owner or epoch (run number) has changed. If it was
        Running, set its Stopping flag: its code is still running.
        """
        is_running = task.state is State.RUNNING
        if not task.change:
            self.publish(task)  # so that the task is announced before its end
        return self._abort(task.id, _unchanged(task), error, stopping=is_running)

    def expire(self, execution: Execution, error: str) -> AsyncRouteTask | None:
        """Abort a task of this process, and set its Stopping flag: its code is still running."""
        self.write_events(execution)
        return self._abort(execution.task_id, self._held_by(execution), error, stopping=True)

    def recover(self, task: AsyncRouteTask) -> AsyncRouteTask | None:
        """Restart or abort a task whose worker died. If the task was already aborted, clear its
        Stopping flag.
        """
        if task.state is State.NOT_STARTED:
            return self.abort(task, LOST)
        if task.state is not State.RUNNING:
            return self._change(task.id, _unchanged(task, stopping=True), stopping=False)
        if task.on_loss == "restart" and task.restarts < MAX_RESTARTS:
            return self._restart(task.id, _unchanged(task), restarts=task.restarts + 1)
        return self._abort(task.id, _unchanged(task), LOST, stopping=False)

    def cut_short(self, execution: Execution, is_over: bool) -> None:
        """Abort the task of a run, because this process shuts down.

        With ``on_loss="restart"``, requeue the task if its code has ended (``is_over``). If its
        code is still running, leave the task unchanged: another process will restart it.
        """
        self.write_events(execution)
        expect = self._held_by(execution)
        task = None
        if not execution.restarts_on_loss:
            task = self._abort(execution.task_id, expect, SHUT_DOWN, stopping=not is_over)
        elif is_over:
            task = self._restart(execution.task_id, expect)
        if task is None and is_over:
            self.release(execution)

    def abort_later(self, task_id: str, error: str) -> None:
        """Abort a task in the background. Only for tasks that no other process can run.

        A task that waits for a start time is not taken for lost, because this process looks for it
        again.
        """

        def abort() -> None:
            task = self._store.get(task_id)
            if task is None or task.state.is_terminal:
                return
            if error != LOST or task.start_at_us is None:
                self._abort(task_id, _unchanged(task), error)

        self.pending_writes.keep(task_id, abort)

    def release(self, execution: Execution) -> None:
        """Clear the Stopping flag of an aborted task, because its code has ended."""
        expect = Expect((State.ABORTED,), self.owner, execution.epoch, stopping=True)
        self._change(execution.task_id, expect, stopping=False)

    def withdraw(self, task: AsyncRouteTask) -> bool:
        """Delete a new task that no executor accepted; return whether it was deleted. It is not
        deleted if it has been claimed.
        """
        return self._delete(task.id, Expect((State.NOT_STARTED,)))

    def purge(self, task_id: str) -> bool:
        """Delete a finished task whose code has ended; return whether it was deleted."""
        return self._delete(task_id, Expect(tuple(TERMINAL), stopping=False))

    def delete_expired(self) -> None:
        """Delete tasks whose retention has expired."""
        while True:
            ended_before = now_us() - int(NOTIFIED_SECONDS * 1_000_000)
            expired = self._store.past_retention(ended_before, PAGE)
            for task_id in expired:
                self.purge(task_id)
            if len(expired) < PAGE:
                return

    def abort_expired(self) -> None:
        """Abort tasks whose time for the first start has passed.

        Of the bound tasks, abort only those of this process: it must remove them from its queue.
        """
        # With a large backlog, the next call aborts the rest.
        deadline = time.monotonic() + EXPIRING_SECONDS
        while True:
            expired = self._store.not_started_in_time(now_us(), self.owner, PAGE)
            for task in expired:
                self.abort(task, NOT_STARTED_IN_TIME)
                if time.monotonic() >= deadline:
                    return
            if len(expired) < PAGE:
                return

    def abort_if_expired(self, task_id: str) -> None:
        """Abort a waiting task if its time for the first start has passed."""
        task = self._store.get(task_id)
        if task is None or task.state is not State.NOT_STARTED or task.start_by_us is None:
            return
        if task.start_by_us <= now_us():
            self.abort(task, NOT_STARTED_IN_TIME)

    def write_events(self, execution: Execution) -> None:
        """Store the view's new events; drop them if this run no longer owns the task."""
        # Wait for a thread that is storing events: the end of the task must be stored after them.
        with execution.writing:
            sent = execution.take_events()
            if not sent:
                return
            expect = self._held_by(execution)
            try:
                changes = self._store.add_events(execution.task_id, expect, sent)
            except StoreUnavailable:
                execution.return_events(sent)
                raise
        if changes is not None:
            signals.send_to_receivers(
                signals.events_written, self._app, task_id=execution.task_id, changes=changes
            )

    def on_progress_reported(self, sender: Flask, execution: Execution, **extra: Any) -> None:
        self.write_progress(execution)

    def write_progress(self, execution: Execution) -> None:
        """Store the newest progress that the view has reported."""
        report = execution.take_report()
        if report is None:
            return
        values = {"progress": report[0], "progress_message": report[1]}
        try:
            task = self._store.update(execution.task_id, self._held_by(execution), values)
        except StoreUnavailable:
            execution.return_report()
            raise
        if task is not None:
            self.notify(signals.task_progressed, task)

    def notify(self, signal: NamedSignal | None, task: AsyncRouteTask, **more: Any) -> None:
        """Send the internal signals of a stored change; send ``signal`` to the app's receivers,
        with ``task`` and ``more`` as arguments.
        """
        signals.send_to_receivers(signals.task_changed, self._app, task=task)
        if logger.isEnabledFor(logging.INFO):
            with suppress(Exception):  # a log filter or handler of the app can fail
                _log(signal, task)
        if task.callback_state in PENDING and task.state.is_terminal:
            signals.send_to_receivers(signals.callback_pending, self._app, task=task)
        if signal is not None:
            is_end = signal in _FINISHED.values()
            sent_signals = (signal, signals.task_finished) if is_end else (signal,)
            self._send(sent_signals, task=task, **more)

    def _send(self, sent_signals: Sequence[NamedSignal], **values: Any) -> None:
        """Send public signals in an app context, if any of them has receivers."""
        if not any(signal.receivers for signal in sent_signals):
            return
        try:
            with context.in_app(self._app):
                for signal in sent_signals:
                    signals.send_to_receivers(signal, self._app, **values)
        except Exception:
            # A teardown function of the app raised. The caller must still get the stored change.
            logger.exception(
                "A teardown function raised an exception after the signal %s. The change of "
                "the task is stored.",
                sent_signals[0].name,
            )

    def _created(self, task: AsyncRouteTask) -> None:
        self.notify(signals.task_created, task)
        if task.start_at_us is not None:
            self.call_at(task.start_at_us)

    def _held_by(self, execution: Execution) -> Expect:
        return Expect((State.RUNNING,), self.owner, execution.epoch)

    def _finish(
        self, task_id: str, expect: Expect, state: State, values: dict[str, Any]
    ) -> AsyncRouteTask | None:
        is_allowed = all(state in TRANSITIONS[before] for before in expect.states)
        if state not in _FINISHED or not is_allowed:
            before = " or ".join(expect.states)
            raise ValueError(f"A transition from {before} to {state} is not allowed.")
        values = {"state": state, "completed_us": now_us(), **values}
        task = self._store.update(task_id, expect, values)
        if task is not None:
            self.notify(_FINISHED[state], task)
        return task

    def _abort(
        self, task_id: str, expect: Expect, error: str, **values: Any
    ) -> AsyncRouteTask | None:
        return self._finish(task_id, expect, State.ABORTED, {"error": error, **values})

    def _delete(self, task_id: str, expect: Expect) -> bool:
        endpoint = self._store.delete(task_id, expect)
        if endpoint:  # empty if another process can have sent the signal
            self._send((signals.task_removed,), task_id=task_id, endpoint=endpoint)
        return endpoint is not None

    def _restart(self, task_id: str, expect: Expect, **values: Any) -> AsyncRouteTask | None:
        task = self._requeue(task_id, expect, None, **values)
        if task is not None:
            self.on_restart(task)
        return task

    def _requeue(
        self, task_id: str, expect: Expect, signal: NamedSignal | None, **values: Any
    ) -> AsyncRouteTask | None:
        # `start_timeout` limits only the wait for the first start, so forget it.
        empty = dict.fromkeys((*_SET_BY_RUN, "start_by_us", "start_at_us"))
        values = {**empty, "state": State.NOT_STARTED, **values}
        return self._change(task_id, expect, signal, **values)

    def _change(
        self, task_id: str, expect: Expect, signal: NamedSignal | None = None, **values: Any
    ) -> AsyncRouteTask | None:
        task = self._store.update(task_id, expect, values)
        if task is not None:
            self.notify(signal, task)
        return task

    def _undo_create(self, task: AsyncRouteTask) -> None:
        found = self._store.get(task.id)
        if found is not None and found.created_us == task.created_us:
            self._store.delete(task.id, Expect((State.NOT_STARTED,)))

    def _undo_claim(self, task_id: str, claimed_us: int) -> None:
        task = self._store.get(task_id)
        if task is not None and task.started_us == max(claimed_us, task.created_us):
            # The task has not run, so the limits of its wait still apply.
            expect = Expect((State.RUNNING,), self.owner, task.epoch)
            same = {"start_by_us": task.start_by_us, "start_at_us": task.start_at_us}
            self._requeue(task_id, expect, None, **same)


def _log(signal: NamedSignal | None, task: AsyncRouteTask) -> None:
    extra = {"task_id": task.id}
    if signal is signals.task_started:
        logger.info("Task %s of endpoint %s started.", task.id, task.endpoint, extra=extra)
    elif signal in _FINISHED.values() and task.completed_us is not None:
        began_us = task.created_us if task.started_us is None else task.started_us
        logger.info(
            "Task %s of endpoint %s is %s after %.3f s%s.",
            task.id, task.endpoint, task.state.value, (task.completed_us - began_us) / 1_000_000,
            " of waiting" if task.started_us is None else "", extra=extra,
        )  # fmt: skip


def _unchanged(task: AsyncRouteTask, stopping: bool | None = None) -> Expect:
    return Expect((task.state,), task.owner, task.epoch, stopping)


def purge(store: TaskStore, lifecycle: Lifecycle, task: AsyncRouteTask) -> bool:
    """Delete a finished task after streams and waits have had time to read it. Return False if it
    was already deleted.

    :raises TaskUnfinished: if the task has not ended, or its code is still running.
    """
    current: AsyncRouteTask | None = task
    while current is not None:
        if not current.is_completed or current.stopping:
            reason = "its code is still running. Try again."
            if not current.is_completed:
                reason = f"its State is {current.state}; stop it first."
            message = f"The task cannot be removed: {reason}"
            raise TaskUnfinished(message, task_id=current.id, retry_after=1)
        time.sleep(NOTIFIED_SECONDS - seconds_since_end(current))
        if lifecycle.purge(current.id):
            return True
        current = store.get(current.id)
    return False


def seconds_since_end(task: AsyncRouteTask) -> float:
    """Return the seconds since a task ended: at least 0 and at most :data:`NOTIFIED_SECONDS`,
    because clocks can differ between processes.
    """
    assert task.completed_us is not None
    return min(max((now_us() - task.completed_us) / 1_000_000, 0.0), NOTIFIED_SECONDS)
