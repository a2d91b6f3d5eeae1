"""PgQueuer on PostgreSQL. Run this module as the worker."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import psycopg
from flask import Flask
from pgqueuer import Job, PgQueuer
from pgqueuer.db import SyncPsycopgDriver
from pgqueuer.queries import SyncQueries

from .app import PATIENCE, POLL, Started, do_task, make_app, store


@asynccontextmanager
async def worker() -> AsyncIterator[PgQueuer]:
    """Yield a worker."""
    # PgQueuer's driver for psycopg delays queries by up to a second while it waits for NOTIFY.
    connection = await asyncpg.connect(store())
    try:
        queuer = PgQueuer.from_asyncpg_connection(connection)

        @queuer.entrypoint("run")
        async def run(job: Job) -> None:
            do_task(json.loads(job.payload or b""))

        yield queuer
    finally:
        await connection.close()


class Jobs(threading.local):
    """Polls the states of jobs. Each thread has its own connection."""

    def __init__(self) -> None:
        self.driver = SyncPsycopgDriver(psycopg.connect(store(), autocommit=True))
        self.queries = SyncQueries(self.driver)
        self.states = self.queries.qbq.build_job_status_query()

    def start(self, body: dict[str, Any]) -> Started:
        (job_id,) = self.queries.enqueue("run", json.dumps(body).encode())
        return job_id, lambda: self._wait(job_id)

    def have_ended(self, started: int) -> bool:
        """Return whether the queue is empty. Ended jobs move to the log table."""
        return not self.queries.queue_size()

    def _wait(self, job_id: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while not any(
            row["status"] == "successful" for row in self.driver.fetch(self.states, [job_id])
        ):
            if time.monotonic() > deadline:
                raise TimeoutError(f"Job {job_id} has not ended within {PATIENCE} s.")
            time.sleep(POLL)


def create_app() -> Flask:
    """Return the app."""
    return make_app(Jobs())


async def main() -> None:
    """Run a worker until it is killed."""
    async with worker() as queuer:
        await queuer.run()


if __name__ == "__main__":
    asyncio.run(main())
