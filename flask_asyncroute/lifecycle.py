"""The only writer of State: each step is one transaction of the store, then the facts go out.

`dispatcher`, `worker` and `housekeeping` call it. It runs nothing and decides nothing but whether a step may be taken.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from blinker import NamedSignal

from . import context, signals
from .delivery import PENDING, Delivery
from .errors import CommitUnknown, StoreUnavailable
from .execution import Execution
from .snapshot import Body
from .start_key import StartKey
from .states import TERMINAL, TRANSITIONS, State
from .stores.base import Claim, Expect, TaskStore
from .task import AsyncRouteTask, now_us
from .unwritten import Unwritten

if TYPE_CHECKING:
    from flask import Flask

logger = logging.getLogger("flask_asyncroute")

MAX_RESTARTS = 2
"""How often a task that asks for it is restarted after its worker was lost."""
LOST = "Worker lost"
SHUT_DOWN = "Server shutdown"

_OF_A_RUN = ("owner", "started_us", "expires_us", "progress", "progress_message")
"""The record fields that a run sets and that are empty before it."""
_FINISHED = {
    State.COMPLETED: signals.task_completed,
    State.FAILED: signals.task_failed,
    State.ABORTED: signals.task_aborted,
}


class Lifecycle:
    """Takes tasks from state to state in one store.

    Each method may be called from any thread, with or without an app context, and raises `StoreUnavailable` where the
    store does.

    :param owner: the name of this process as a worker.
    """

    def __init__(self, app: Flask, store: TaskStore, owner: str) -> None:
        self._app = app
        self._store = store
        self.owner = owner
        self.unwritten = Unwritten()
        """What could not be stored yet."""
        # Weak, unlike other receivers: the signal must not keep this object, and with it the app, alive.
        signals.progress_reported.connect(self.on_progress_reported, sender=app)

    def create(
        self, task: AsyncRouteTask, request: bytes, body: Body | None, grants: Collection[tuple[str, str]],
        key: StartKey | None = None, quota: int | None = None, delivery: Delivery | None = None,
    ) -> None:  # fmt: skip
        """Store a new task, or raise what :meth:`TaskStore.add` does where it may not be."""
        try:
            self._store.add(task, request, body, grants, key, quota, delivery)
        except CommitUnknown:
            # Its client is told that nothing was started, so nothing may. With a key the next try finds what there is.
            if key is None:
                self.unwritten.keep(task.id, lambda: self._uncreate(task))
            raise
        self.tell(signals.task_created, task)

    def claim(self, task_id: str) -> Claim | None:
        """Take a waiting task for this process: NotStarted → Running. None where somebody else was first."""
        now = now_us()
        try:
            claim = self._store.claim(task_id, self.owner, now)
        except CommitUnknown:
            # It would be Running with nobody to run it.
            self.unwritten.keep(task_id, lambda: self._unclaim(task_id, now))
            raise
        if claim is not None:
            self.tell(signals.task_started, claim.task)
        return claim

    def finish(self, execution: Execution, state: State, values: dict[str, Any]) -> AsyncRouteTask | None:
        """Write the outcome of a run: Running → ``state``; with it the last progress.

        A run that was aborted meanwhile, or whose task another worker holds by now, writes nothing but that its code
        has ended.

        :return: the task, where this run decided its outcome.
        """
        self.write_events(execution)
        progress, message = execution.final_report()
        if progress is not None:
            values = {
                "progress": 100.0 if state is State.COMPLETED else progress,
                "progress_message": message,
                **values,
            }
        expect = Expect((State.RUNNING,), self.owner, execution.epoch)
        task = self._step(execution.task_id, expect, state, values)
        if task is None:
            self.release(execution)
        return task

    def abort(self, task: AsyncRouteTask, error: str) -> AsyncRouteTask | None:
        """Move a task to Aborted, if it is still in the state that ``task`` has; its code, where it runs, is then Stopping."""
        expect = Expect((task.state,), task.owner, task.epoch)
        return self._step(task.id, expect, State.ABORTED, {"error": error, "stopping": task.state is State.RUNNING})

    def lose(self, task: AsyncRouteTask) -> AsyncRouteTask | None:
        """Settle a task whose worker is gone: one that ran is aborted or, as its route wants it, restarted; one that nobody
        else can run is aborted; one that was Stopping has stopped.
        """
        if task.state is State.NOT_STARTED:
            return self.abort(task, LOST)
        if task.state is not State.RUNNING:
            return self._change(
                task.id, Expect((task.state,), task.owner, task.epoch, stopping=True), {"stopping": False}
            )
        expect = Expect((State.RUNNING,), task.owner, task.epoch)
        if task.on_loss == "restart" and task.restarts < MAX_RESTARTS:
            return self._put_back(task.id, expect, {"restarts": task.restarts + 1})
        return self._step(task.id, expect, State.ABORTED, {"error": LOST})

    def cut_short(self, execution: Execution, is_over: bool) -> None:
        """Settle a task whose process shuts down: Aborted or, as its route wants it, waiting again, which is no loss.

        :param is_over: whether its code has ended. A task is not put back before.
        """
        self.write_events(execution)
        expect = Expect((State.RUNNING,), self.owner, execution.epoch)
        task = None
        if not execution.restarts_on_loss:
            task = self._step(execution.task_id, expect, State.ABORTED, {"error": SHUT_DOWN, "stopping": not is_over})
        elif is_over:
            task = self._put_back(execution.task_id, expect, {})
        if task is None and is_over:
            self.release(execution)

    def expire(self, execution: Execution, error: str) -> AsyncRouteTask | None:
        """Move a task that runs in this process to Aborted, its code Stopping."""
        self.write_events(execution)
        expect = Expect((State.RUNNING,), self.owner, execution.epoch)
        return self._step(execution.task_id, expect, State.ABORTED, {"error": error, "stopping": True})

    def forsake(self, task_id: str, error: str) -> None:
        """Abort a task that only this process can run, and does not; as soon as the store can be written."""

        def abort() -> None:
            task = self._store.get(task_id)
            if task is not None and not task.state.is_terminal:
                self._step(task_id, Expect((task.state,), task.owner, task.epoch), State.ABORTED, {"error": error})

        self.unwritten.keep(task_id, abort)

    def release(self, execution: Execution) -> None:
        """Write that the code of an aborted task has ended."""
        expect = Expect((State.ABORTED,), self.owner, execution.epoch, stopping=True)
        self._change(execution.task_id, expect, {"stopping": False})

    def withdraw(self, task: AsyncRouteTask) -> bool:
        """Remove a task that could not be submitted; return whether it was still waiting."""
        return self._store.delete(task.id, Expect((State.NOT_STARTED,)))

    def purge(self, task_id: str) -> bool:
        """Remove a finished task whose code has ended; return whether it was there and so."""
        return self._store.delete(task_id, Expect(tuple(TERMINAL), stopping=False))

    def write_events(self, execution: Execution) -> None:
        """Write what a view has sent, if there is something; where the task is this run's no more, nobody hears of it."""
        if not execution.has_events:
            return
        with execution.writing:
            sent = execution.take_events()
            if not sent:
                return
            expect = Expect((State.RUNNING,), self.owner, execution.epoch)
            try:
                is_written = self._store.add_events(execution.task_id, expect, sent)
            except StoreUnavailable:
                execution.return_events(sent)
                raise
        if is_written:
            signals.send_fact(signals.events_written, self._app, logger, task_id=execution.task_id)

    def on_progress_reported(self, sender: Flask, execution: Execution, **extra: Any) -> None:
        """Write the newest progress of a run, if there is any that is not written. The receiver of `progress_reported`."""
        report = execution.take_report()
        if report is None:
            return
        expect = Expect((State.RUNNING,), self.owner, execution.epoch)
        try:
            task = self._store.update(execution.task_id, expect, {"progress": report[0], "progress_message": report[1]})
        except StoreUnavailable:
            execution.return_report()
            raise
        if task is not None:
            self.tell(signals.task_progressed, task)

    def _step(self, task_id: str, expect: Expect, state: State, values: dict[str, Any]) -> AsyncRouteTask | None:
        if state not in _FINISHED or any(state not in TRANSITIONS[before] for before in expect.states):
            raise ValueError(f"There is no step from {' or '.join(expect.states)} to {state}.")
        task = self._store.update(task_id, expect, {"state": state, "completed_us": now_us(), **values})
        if task is not None:
            self.tell(_FINISHED[state], task)
        return task

    def _uncreate(self, task: AsyncRouteTask) -> None:
        """Remove a task that may have been stored, though its start was refused, where it has not begun."""
        found = self._store.get(task.id)
        if found is not None and found.created_us == task.created_us:
            self.withdraw(task)

    def _unclaim(self, task_id: str, claimed_us: int) -> None:
        """Have a task wait again whose claim may have been stored, though this process was told that it could not."""
        task = self._store.get(task_id)
        if task is not None and task.started_us == max(claimed_us, task.created_us):
            self._put_back(task_id, Expect((State.RUNNING,), self.owner, task.epoch), {})

    def _put_back(self, task_id: str, expect: Expect, values: dict[str, Any]) -> AsyncRouteTask | None:
        """Have a task wait again, as if it had never run."""
        values = {**dict.fromkeys(_OF_A_RUN), **values, "state": State.NOT_STARTED}
        return self._change(task_id, expect, values)

    def _change(self, task_id: str, expect: Expect, values: dict[str, Any]) -> AsyncRouteTask | None:
        """Write what is no fact for the app's receivers, but news for whoever waits."""
        task = self._store.update(task_id, expect, values)
        if task is not None:
            self.tell(None, task)
        return task

    def tell(self, fact: NamedSignal | None, task: AsyncRouteTask, **more: Any) -> None:
        """Send what is in the store by now: to who waits for news, to who sends callbacks, and to the app's receivers.

        :param fact: what has happened; None: nothing that the app's receivers are told of.
        :param more: what they are told beside the task.
        """
        if signals.task_changed.receivers:
            signals.send_fact(signals.task_changed, self._app, logger, task=task)
        if task.callback_state in PENDING and task.state.is_terminal:
            signals.send_fact(signals.callback_pending, self._app, logger, task=task)
        if fact is None:
            return
        is_end = task.state.is_terminal and fact in _FINISHED.values()
        if fact.receivers or (is_end and signals.task_finished.receivers):
            try:
                with context.in_app(self._app):
                    signals.send_fact(fact, self._app, logger, task=task, **more)
                    if is_end:
                        signals.send_fact(signals.task_finished, self._app, logger, task=task)
            except Exception:
                # The app's own teardown functions run here; the step was taken, and who took it must hear of it.
                logger.exception(
                    "The app context in which %s was told of could not be left. The fact stands.", fact.name
                )
