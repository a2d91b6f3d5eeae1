"""A stop against the end of a run, at the store: exactly one of the two wins, each time."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from flask_asyncroute.states import State
from flask_asyncroute.stores.base import Expect, TaskStore
from flask_asyncroute.stores.memory import MemoryTaskStore
from flask_asyncroute.stores.sql.sqlite import SQLiteDatabase
from flask_asyncroute.stores.sql.store import SQLTaskStore
from flask_asyncroute.task import AsyncRouteTask, now_us

RACES = 10_000


def prove(share: float) -> Iterator[str]:
    """Prove it for the memory store and for two connections to one SQLite file."""
    count = max(int(RACES * share), 200)
    memory = MemoryTaskStore()
    yield f"memory: {_race(memory, memory, count)}"
    with tempfile.TemporaryDirectory(prefix="asyncroute-prove-") as folder:
        path = Path(folder) / "asyncroute.db"
        stores = [SQLTaskStore(SQLiteDatabase(path), "prove", True) for _ in range(2)]
        for store in stores:
            store.open()
        yield f"sqlite: {_race(stores[0], stores[1], count)}"
        for store in stores:
            store.close()


def _race(one: TaskStore, other: TaskStore, count: int) -> str:
    """Let two threads go for the end of each task at once."""
    barrier = threading.Barrier(2)
    wins: dict[State, set[str]] = {State.COMPLETED: set(), State.ABORTED: set()}
    ids = []
    for number in range(count):
        task = AsyncRouteTask(
            f"race-{number}", "[Put]/race", "race", State.NOT_STARTED, True, None, "http://x/", "PUT", now_us()
        )
        one.add(task, b"{}", None, ())
        assert one.claim(task.id, "prove", now_us()) is not None
        ids.append(task.id)

    def run(store: TaskStore, state: State) -> None:
        for task_id in ids:
            barrier.wait(30)
            if store.update(task_id, Expect((State.RUNNING,)), {"state": state, "completed_us": now_us()}) is not None:
                wins[state].add(task_id)

    threads = [
        threading.Thread(target=run, args=arguments) for arguments in ((one, State.COMPLETED), (other, State.ABORTED))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wins[State.COMPLETED] & wins[State.ABORTED]
    assert wins[State.COMPLETED] | wins[State.ABORTED] == set(ids)
    for state, won in wins.items():
        assert all((found := one.get(task_id)) is not None and found.state is state for task_id in won)
    return f"{count} races, {len(wins[State.COMPLETED])} won by the end, {len(wins[State.ABORTED])} by the stop, one winner each"
