"""Any order of steps by two workers, against a model of what a task is: on every store the same (I2, I4)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

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
from flask_asyncroute.states import TERMINAL, TRANSITIONS, State
from flask_asyncroute.stores.base import Expect, TaskStore
from flask_asyncroute.stores.opening import make_store
from flask_asyncroute.task import AsyncRouteTask
from tests.conftest import new_task

OWNERS = st.sampled_from(["one", "two"])
IS_HOLDER = st.sampled_from([True, True, False])
AGES = st.sampled_from([0, 0, 0, 1])
"""How many claims ago the one was that a worker means."""
ENDS = st.sampled_from([State.COMPLETED, State.FAILED])
T0 = 1_700_000_000_000_000
_namespaces = itertools.count()


@dataclass(frozen=True)
class Model:
    """What a task must be."""

    state: State = State.NOT_STARTED
    owner: str | None = None
    epoch: int = 0
    restarts: int = 0
    stopping: bool = False
    progress: float | None = None
    revision: int = 1


class LifeCycle(RuleBasedStateMachine):
    """Two workers and clients at one store. Each step may come too late, and must then do nothing."""

    ids = Bundle("ids")

    def __init__(self, store: TaskStore) -> None:
        super().__init__()
        self.store = store
        store.open()
        self.now = T0
        self.models: dict[str, Model] = {}
        self.records: dict[str, AsyncRouteTask] = {}
        self.ends: dict[str, list[State]] = {}
        self.seen = store.news(-1).change
        self.changed: list[str] = []
        """Whose change is not in the news yet, the newest last."""

    def teardown(self) -> None:
        self.store.close()

    def tick(self) -> int:
        self.now += 1000
        return self.now

    def took(self, task_id: str, made: AsyncRouteTask | None, wanted: Model | None) -> None:
        """Check what a step gave: the task as the model has it, or nothing where it was not to be taken."""
        if wanted is None:
            assert made is None, f"{task_id}: a step that was none"
            return
        assert made is not None, f"{task_id}: a step that was not taken"
        before = self.models[task_id]
        if wanted.state is not before.state:
            assert wanted.state in TRANSITIONS[before.state]
            if wanted.state in TERMINAL:
                self.ends[task_id].append(wanted.state)
        wanted = replace(wanted, revision=before.revision + 1)
        self.models[task_id] = wanted
        self.records[task_id] = made
        self.noted(task_id)
        assert self.store.get(task_id) == made

    def noted(self, task_id: str) -> None:
        if task_id in self.changed:
            self.changed.remove(task_id)
        self.changed.append(task_id)

    @rule(target=ids, number=st.integers(0, 2))
    def create(self, number: int) -> Any:
        task_id = f"task-{number}"
        task = new_task(task_id, created_us=self.tick(), timeout_us=60_000_000)
        if task_id in self.models:
            with pytest.raises(IdTaken):
                self.store.add(task, b"{}", None, [("groups", "g")])
            return multiple()
        self.store.add(task, b"{}", None, [("groups", "g")])
        self.models[task_id] = Model()
        self.ends[task_id] = []
        self.noted(task_id)
        return task_id

    @rule(task_id=ids, owner=OWNERS)
    def claim(self, task_id: str, owner: str) -> None:
        model = self.models.get(task_id)
        claim = self.store.claim(task_id, owner, self.tick())
        if model is None or model.state is not State.NOT_STARTED:
            assert claim is None
            return
        assert claim is not None and claim.request == b"{}"
        self.took(task_id, claim.task, replace(model, state=State.RUNNING, owner=owner, epoch=model.epoch + 1))

    def owner(self, task_id: str, is_holder: bool) -> str:
        """Return the worker that has a task, or the other one."""
        holder = self.models.get(task_id, Model()).owner or "one"
        return holder if is_holder else {"one": "two", "two": "one"}[holder]

    def is_run_of(self, model: Model | None, owner: str, age: int) -> bool:
        """Return whether the run that a worker means, its latest or one before, is the one that has the task."""
        return model is not None and model.state is State.RUNNING and model.owner == owner and age == 0

    def of_run(self, task_id: str, owner: str, age: int) -> Expect:
        model = self.models.get(task_id, Model())
        return Expect((State.RUNNING,), owner, model.epoch - age)

    @rule(task_id=ids, is_holder=IS_HOLDER, age=AGES, value=st.integers(0, 100))
    def progress(self, task_id: str, is_holder: bool, age: int, value: int) -> None:
        model = self.models.get(task_id)
        owner = self.owner(task_id, is_holder)
        made = self.store.update(task_id, self.of_run(task_id, owner, age), {"progress": float(value)})
        is_ours = self.is_run_of(model, owner, age)
        self.took(task_id, made, replace(model, progress=float(value)) if model and is_ours else None)

    @rule(task_id=ids, is_holder=IS_HOLDER, age=AGES, state=ENDS)
    def finish(self, task_id: str, is_holder: bool, age: int, state: State) -> None:
        model = self.models.get(task_id)
        owner = self.owner(task_id, is_holder)
        values: dict[str, Any] = {"state": state, "completed_us": self.tick()}
        values |= {"result_json": b"1"} if state is State.COMPLETED else {"error": "x"}
        made = self.store.update(task_id, self.of_run(task_id, owner, age), values)
        self.took(task_id, made, replace(model, state=state) if model and self.is_run_of(model, owner, age) else None)

    @rule(task_id=ids, is_holder=IS_HOLDER, age=AGES)
    def expire(self, task_id: str, is_holder: bool, age: int) -> None:
        model = self.models.get(task_id)
        owner = self.owner(task_id, is_holder)
        values = {"state": State.ABORTED, "completed_us": self.tick(), "error": "Timeout", "stopping": True}
        made = self.store.update(task_id, self.of_run(task_id, owner, age), values)
        is_ours = self.is_run_of(model, owner, age)
        self.took(task_id, made, replace(model, state=State.ABORTED, stopping=True) if model and is_ours else None)

    @rule(task_id=ids, is_fresh=st.booleans())
    def abort(self, task_id: str, is_fresh: bool) -> None:
        """As a client's stop does it, from what it has read, which may be old by now."""
        read = self.store.get(task_id) if is_fresh else self.records.get(task_id)
        if read is None or read.state in TERMINAL:
            return
        model = self.models.get(task_id)
        is_running = read.state is State.RUNNING
        values = {"state": State.ABORTED, "completed_us": self.tick(), "error": "stop", "stopping": is_running}
        made = self.store.update(task_id, Expect((read.state,), read.owner, read.epoch), values)
        is_same = model is not None and model.state is read.state and model.epoch == read.epoch
        is_same = is_same and (read.owner is None or model.owner == read.owner)  # type: ignore[union-attr]
        wanted = replace(model, state=State.ABORTED, stopping=is_running) if model and is_same else None
        self.took(task_id, made, wanted)

    @rule(task_id=ids, is_holder=IS_HOLDER)
    def release(self, task_id: str, is_holder: bool) -> None:
        model = self.models.get(task_id)
        owner = self.owner(task_id, is_holder)
        expect = Expect((State.ABORTED,), owner, model.epoch if model else 0, stopping=True)
        made = self.store.update(task_id, expect, {"stopping": False})
        is_ours = model is not None and model.state is State.ABORTED and model.stopping and model.owner == owner
        self.took(task_id, made, replace(model, stopping=False) if model and is_ours else None)

    @rule(task_id=ids, is_holder=IS_HOLDER, age=AGES)
    def restart(self, task_id: str, is_holder: bool, age: int) -> None:
        model = self.models.get(task_id)
        owner = self.owner(task_id, is_holder)
        values: dict[str, Any] = dict.fromkeys(("owner", "started_us", "expires_us", "progress", "progress_message"))
        values |= {"state": State.NOT_STARTED, "restarts": (model.restarts if model else 0) + 1}
        made = self.store.update(task_id, self.of_run(task_id, owner, age), values)
        wanted = None
        if model and self.is_run_of(model, owner, age):
            wanted = Model(epoch=model.epoch, restarts=model.restarts + 1)
        self.took(task_id, made, wanted)

    @rule(task_id=ids, is_purge=st.booleans())
    def delete(self, task_id: str, is_purge: bool) -> Any:
        model = self.models.get(task_id)
        expect = Expect(tuple(TERMINAL), stopping=False) if is_purge else Expect((State.NOT_STARTED,))
        is_fit = model is not None and model.state in expect.states and not model.stopping
        assert self.store.delete(task_id, expect) is is_fit
        if is_fit:
            assert self.store.get(task_id) is None
            for kept in (self.models, self.records, self.ends):
                kept.pop(task_id, None)
            if task_id in self.changed:
                self.changed.remove(task_id)

    @rule()
    def news(self) -> None:
        found = self.store.news(self.seen)
        assert found.change >= self.seen
        assert [task.id for task in found.tasks] == self.changed, (
            "each changed task once, in the order of its last change"
        )
        changes = [task.change for task in found.tasks]
        assert changes == sorted(set(changes)) and all(self.seen < change <= found.change for change in changes)
        self.seen, self.changed = found.change, []

    @invariant()
    def tasks_are_as_the_model_has_them(self) -> None:
        for task_id, model in self.models.items():
            task = self.store.get(task_id)
            assert task is not None, f"I1: {task_id} is gone"
            assert Model(
                task.state, task.owner, task.epoch, task.restarts, task.stopping, task.progress, task.revision
            ) == (model), task_id
            assert len(self.ends[task_id]) == (task.state in TERMINAL), f"I2: {task_id} ended {self.ends[task_id]}"
            times = [at for at in (task.created_us, task.started_us, task.completed_us) if at is not None]
            assert times == sorted(times), f"I4: {task_id}"
            assert (task.started_us is None) is (
                task.state is State.NOT_STARTED or task.epoch == 0 or task.owner is None
            )

    @invariant()
    def what_waits_is_what_is_not_started(self) -> None:
        waiting = {task_id for task_id, _ in self.store.waiting({"work": 99}, self.now + 1)}
        assert waiting == {task_id for task_id, model in self.models.items() if model.state is State.NOT_STARTED}


@pytest.mark.parametrize("kind", ["memory", "sqlite", "postgresql"])
def test_i2_any_order_of_steps(kind: str, request: pytest.FixtureRequest, sqlite_path: Any) -> None:
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
            max_examples=examples, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
