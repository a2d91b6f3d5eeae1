"""Any order of steps by two workers on every store, compared with a model of a task."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from flask_asyncroute.errors import IdTaken
from flask_asyncroute.retries import Retry
from flask_asyncroute.stores.base import Expect, SharedTaskStore, TaskStore
from flask_asyncroute.stores.registry import make_store
from flask_asyncroute.task import TERMINAL, TRANSITIONS, AsyncRouteTask, State
from tests.support.tasks import new_task

OWNERS = st.sampled_from(["one", "two"])
IS_HOLDER = st.sampled_from([True, True, False])
AGES = st.sampled_from([0, 0, 0, 1])
"""How many claims ago the run of a worker began."""
ENDS = st.sampled_from([State.COMPLETED, State.FAILED])
T0 = 1_700_000_000_000_000
RETRY = msgspec.json.encode(Retry(times=99).schedule)
_namespaces = itertools.count()


@dataclass(frozen=True)
class Model:
    """The expected state of a task."""

    state: State = State.NOT_STARTED
    owner: str | None = None
    epoch: int = 0
    restarts: int = 0
    start_by: int | None = None
    start_at: int | None = None
    attempt: int | None = None
    stopping: bool = False
    progress: float | None = None
    revision: int = 1


class LifeCycle(RuleBasedStateMachine):
    """Two workers and clients on one store. A step that comes too late must have no effect."""

    ids = Bundle("ids")

    def __init__(self, store: TaskStore) -> None:
        super().__init__()
        self.store = store
        store.open()
        self.now = T0
        store.now_us = lambda: self.now  # type: ignore[method-assign]
        self.models: dict[str, Model] = {}
        self.records: dict[str, AsyncRouteTask] = {}
        self.ends: dict[str, list[State]] = {}
        self.seen = store.newest()
        self.changed: list[str] = []
        """Tasks whose change has not been read yet, the newest last."""

    def teardown(self) -> None:
        self.store.close()

    def tick(self) -> int:
        self.now += 1000
        return self.now

    def check(self, task_id: str, result: AsyncRouteTask | None, expected: Model | None) -> None:
        """Check the result of a step: the task as in the model, or None if the step must have no
        effect.
        """
        if expected is None:
            assert result is None, f"{task_id}: a step that must not apply had an effect"
            return
        assert result is not None, f"{task_id}: a step had no effect"
        before = self.models[task_id]
        if expected.state is not before.state:
            assert expected.state in TRANSITIONS[before.state]
            if expected.state in TERMINAL:
                self.ends[task_id].append(expected.state)
        expected = replace(expected, revision=before.revision + 1)
        self.models[task_id] = expected
        self.records[task_id] = result
        self.note_change(task_id)
        assert self.store.get(task_id) == result

    def note_change(self, task_id: str) -> None:
        if task_id in self.changed:
            self.changed.remove(task_id)
        self.changed.append(task_id)

    @rule(seconds=st.sampled_from([1, 60]))
    def pass_time(self, seconds: int) -> None:
        self.now += seconds * 1_000_000

    @rule(target=ids, number=st.integers(0, 2), waits=st.sampled_from([None, 5000, 60_000_000]))
    def create(self, number: int, waits: int | None) -> Any:
        task_id = f"task-{number}"
        created = self.tick()
        start_by = None if waits is None else created + waits
        task = new_task(
            task_id,
            created_us=created,
            timeout_us=60_000_000,
            start_by_us=start_by,
            retry_json=RETRY,
        )
        if task_id in self.models:
            with pytest.raises(IdTaken):
                self.store.add(task, b"{}", None, [("groups", "g")])
            return multiple()
        self.store.add(task, b"{}", None, [("groups", "g")])
        self.models[task_id] = Model(start_by=start_by)
        self.ends[task_id] = []
        self.note_change(task_id)
        return task_id

    @rule(task_id=ids, owner=OWNERS)
    def claim(self, task_id: str, owner: str) -> None:
        model = self.models.get(task_id)
        claim = self.store.claim(task_id, owner, self.tick())
        is_waiting = model is not None and model.state is State.NOT_STARTED
        if model is None or not is_waiting or self.is_late(model) or self.is_early(model):
            assert claim is None
            return
        assert claim is not None and claim.request == b"{}"
        self.check(
            task_id,
            claim.task,
            replace(
                model,
                state=State.RUNNING,
                owner=owner,
                epoch=model.epoch + 1,
                attempt=model.attempt or 1,
            ),
        )

    def is_early(self, model: Model) -> bool:
        return model.start_at is not None and model.start_at > self.now

    def is_late(self, model: Model) -> bool:
        return (
            model.state is State.NOT_STARTED
            and model.start_by is not None
            and model.start_by <= self.now
        )

    @rule()
    def abort_late_tasks(self) -> None:
        now = self.tick()
        for task in self.store.not_started_in_time(now, "one", 99):
            values = {
                "state": State.ABORTED, "completed_us": now, "error": "Expired", "stopping": False,
            }  # fmt: skip
            result = self.store.update(task.id, Expect((task.state,), None, task.epoch), values)
            model = self.models[task.id]
            self.check(task.id, result, replace(model, state=State.ABORTED))

    def owner(self, task_id: str, is_holder: bool) -> str:
        """Return the worker that owns a task, or the other one."""
        holder = self.models.get(task_id, Model()).owner or "one"
        return holder if is_holder else {"one": "two", "two": "one"}[holder]

    def is_run_of(self, model: Model | None, owner: str, age: int) -> bool:
        """Return whether the run to which a worker refers, its latest or an earlier one, is the
        current one.
        """
        return (
            model is not None and model.state is State.RUNNING and model.owner == owner and age == 0
        )

    def of_run(self, task_id: str, owner: str, age: int) -> Expect:
        model = self.models.get(task_id, Model())
        return Expect((State.RUNNING,), owner, model.epoch - age)

    @rule(task_id=ids, is_holder=IS_HOLDER, age=AGES, value=st.integers(0, 100))
    def progress(self, task_id: str, is_holder: bool, age: int, value: int) -> None:
        model = self.models.get(task_id)
        owner = self.owner(task_id, is_holder)
        result = self.store.update(
            task_id, self.of_run(task_id, owner, age), {"progress": float(value)}
        )
        is_ours = self.is_run_of(model, owner, age)
        self.check(
            task_id, result, replace(model, progress=float(value)) if model and is_ours else None
        )

    @rule(task_id=ids, is_holder=IS_HOLDER, age=AGES, state=ENDS)
    def finish(self, task_id: str, is_holder: bool, age: int, state: State) -> None:
        model = self.models.get(task_id)
        owner = self.owner(task_id, is_holder)
        values: dict[str, Any] = {"state": state, "completed_us": self.tick()}
        values |= {"result_json": b"1"} if state is State.COMPLETED else {"error": "x"}
        result = self.store.update(task_id, self.of_run(task_id, owner, age), values)
        self.check(
            task_id,
            result,
            replace(model, state=state) if model and self.is_run_of(model, owner, age) else None,
        )

    @rule(task_id=ids, is_holder=IS_HOLDER, age=AGES)
    def expire(self, task_id: str, is_holder: bool, age: int) -> None:
        model = self.models.get(task_id)
        owner = self.owner(task_id, is_holder)
        values = {
            "state": State.ABORTED,
            "completed_us": self.tick(),
            "error": "Timeout",
            "stopping": True,
        }
        result = self.store.update(task_id, self.of_run(task_id, owner, age), values)
        is_ours = self.is_run_of(model, owner, age)
        self.check(
            task_id,
            result,
            replace(model, state=State.ABORTED, stopping=True) if model and is_ours else None,
        )

    @rule(task_id=ids, is_fresh=st.booleans())
    def abort(self, task_id: str, is_fresh: bool) -> None:
        """Stop a task like a client, with a record that may be outdated."""
        read = self.store.get(task_id) if is_fresh else self.records.get(task_id)
        if read is None or read.state in TERMINAL:
            return
        model = self.models.get(task_id)
        is_running = read.state is State.RUNNING
        values = {
            "state": State.ABORTED,
            "completed_us": self.tick(),
            "error": "stop",
            "stopping": is_running,
        }
        result = self.store.update(task_id, Expect((read.state,), read.owner, read.epoch), values)
        is_same = model is not None and model.state is read.state and model.epoch == read.epoch
        is_same = is_same and (read.owner is None or model.owner == read.owner)  # type: ignore[union-attr]
        expected = (
            replace(model, state=State.ABORTED, stopping=is_running) if model and is_same else None
        )
        self.check(task_id, result, expected)

    @rule(task_id=ids, is_holder=IS_HOLDER)
    def release(self, task_id: str, is_holder: bool) -> None:
        model = self.models.get(task_id)
        owner = self.owner(task_id, is_holder)
        expect = Expect((State.ABORTED,), owner, model.epoch if model else 0, stopping=True)
        result = self.store.update(task_id, expect, {"stopping": False})
        is_ours = (
            model is not None
            and model.state is State.ABORTED
            and model.stopping
            and model.owner == owner
        )
        self.check(task_id, result, replace(model, stopping=False) if model and is_ours else None)

    @rule(task_id=ids, is_holder=IS_HOLDER, age=AGES, is_undo=st.booleans())
    def restart(self, task_id: str, is_holder: bool, age: int, is_undo: bool) -> None:
        """Requeue a run, or undo a claim, after which the limit of the wait still applies."""
        model = self.models.get(task_id)
        owner = self.owner(task_id, is_holder)
        values: dict[str, Any] = dict.fromkeys(
            ("owner", "started_us", "expires_us", "progress", "progress_message")
        )
        start_by = model.start_by if model and is_undo else None
        start_at = model.start_at if model and is_undo else None
        values |= {
            "state": State.NOT_STARTED, "restarts": (model.restarts if model else 0) + 1,
            "start_by_us": start_by, "start_at_us": start_at,
        }  # fmt: skip
        result = self.store.update(task_id, self.of_run(task_id, owner, age), values)
        expected = None
        if model and self.is_run_of(model, owner, age):
            expected = Model(
                epoch=model.epoch,
                restarts=model.restarts + 1,
                start_by=start_by,
                start_at=start_at,
                attempt=model.attempt,
            )
        self.check(task_id, result, expected)

    @rule(task_id=ids, is_holder=IS_HOLDER, age=AGES, delay=st.sampled_from([0, 5000, 60_000_000]))
    def retry(self, task_id: str, is_holder: bool, age: int, delay: int) -> None:
        model = self.models.get(task_id)
        owner = self.owner(task_id, is_holder)
        attempt = ((model.attempt if model else None) or 1) + 1
        values: dict[str, Any] = dict.fromkeys(
            ("owner", "started_us", "expires_us", "progress", "progress_message", "start_by_us")
        )
        start_at = self.tick() + delay
        values |= {
            "state": State.NOT_STARTED, "attempt": attempt, "last_error": "x",
            "start_at_us": start_at,
        }  # fmt: skip
        result = self.store.update(task_id, self.of_run(task_id, owner, age), values)
        expected = None
        if model and self.is_run_of(model, owner, age):
            expected = Model(
                epoch=model.epoch, restarts=model.restarts, start_at=start_at, attempt=attempt
            )
        self.check(task_id, result, expected)

    @rule(task_id=ids, is_purge=st.booleans())
    def delete(self, task_id: str, is_purge: bool) -> Any:
        model = self.models.get(task_id)
        expect = (
            Expect(tuple(TERMINAL), stopping=False) if is_purge else Expect((State.NOT_STARTED,))
        )
        is_fit = model is not None and model.state in expect.states and not model.stopping
        assert self.store.delete(task_id, expect) == ("work" if is_fit else None)
        if is_fit:
            assert self.store.get(task_id) is None
            for kept in (self.models, self.records, self.ends):
                kept.pop(task_id, None)
            if task_id in self.changed:
                self.changed.remove(task_id)

    @rule()
    def read_changes(self) -> None:
        if not isinstance(self.store, SharedTaskStore):
            return
        found = self.store.changes_since(self.seen)
        assert found.change >= self.seen
        assert [task.id for task in found.tasks] == self.changed, (
            "each changed task once, in the order of its last change"
        )
        changes = [task.change for task in found.tasks]
        assert changes == sorted(set(changes)) and all(
            self.seen < change <= found.change for change in changes
        )
        self.seen, self.changed = found.change, []

    @invariant()
    def tasks_match_the_model(self) -> None:
        for task_id, model in self.models.items():
            task = self.store.get(task_id)
            assert task is not None, f"{task_id} is missing"
            assert Model(
                task.state,
                task.owner,
                task.epoch,
                task.restarts,
                task.start_by_us,
                task.start_at_us,
                task.attempt,
                task.stopping,
                task.progress,
                task.revision,
            ) == (model), task_id
            assert len(self.ends[task_id]) == (task.state in TERMINAL), (
                f"{task_id} ended {self.ends[task_id]}"
            )
            times = [
                at for at in (task.created_us, task.started_us, task.completed_us) if at is not None
            ]
            assert times == sorted(times), f"the times of {task_id} are not in order"
            assert (task.started_us is None) is (
                task.state is State.NOT_STARTED or task.epoch == 0 or task.owner is None
            )

    @invariant()
    def late_tasks_are_those_not_started_in_time(self) -> None:
        late = {task.id for task in self.store.not_started_in_time(self.now, "one", 99)}
        assert late == {name for name, model in self.models.items() if self.is_late(model)}

    @invariant()
    def waiting_tasks_are_those_that_may_start(self) -> None:
        waiting = {task.id for task in self.store.waiting({"work": 99}, self.now + 1)}
        due = {
            task_id: model
            for task_id, model in self.models.items()
            if model.state is State.NOT_STARTED and not self.is_early(model)
        }
        if not isinstance(self.store, SharedTaskStore):
            # It omits new tasks, which its only process has queued.
            due = {task_id: model for task_id, model in due.items() if model.start_at is not None}
        assert waiting == due.keys()


@pytest.mark.covers("I2", "I4")
@pytest.mark.parametrize("kind", ["memory", "sqlite", "postgresql"])
def test_any_order_of_steps_matches_the_model(
    kind: str, request: pytest.FixtureRequest, sqlite_path: Any
) -> None:
    if kind == "memory":
        url = "memory://"
    elif kind == "sqlite":
        url = f"sqlite:///{sqlite_path}"
    else:
        url = request.getfixturevalue("postgresql_url")
    examples = {"memory": 60, "sqlite": 40, "postgresql": 12}[kind]
    run_state_machine_as_test(
        lambda: LifeCycle(make_store(url, "", f"machine-{next(_namespaces)}", True)),
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
