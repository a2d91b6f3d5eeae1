"""The systems to compare: how each is served, and what it keeps."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum

PYTHON = (sys.executable, "-m")


class Durability(Enum):
    """What a system guarantees for a task whose start was acknowledged."""

    NOTHING = "nothing kept"
    KILL = "survives kill -9"
    FSYNC = "fsync per commit"


@dataclass(frozen=True)
class System:
    """One row of the table.

    :param module: the module of this package with ``create_app()``.
    :param package: the package to import; without it, the system is skipped.
    :param service: ``redis`` or ``postgresql``, if it needs one.
    :param store: ``PEERS_STORE``; ``{folder}`` and ``{service}`` are replaced.
    :param prepares: a command that creates the tables.
    :param worker: the command of one worker.
    :param workers: how many of them run.
    :param one_process: served by 1 process with 8 threads instead of 2 with 4.
    """

    name: str
    durability: Durability
    module: str
    package: str
    service: str | None = None
    store: str = ""
    prepares: tuple[str, ...] = ()
    worker: tuple[str, ...] = ()
    workers: int = 1
    one_process: bool = False

    @property
    def layout(self) -> tuple[int, int]:
        """The processes of gunicorn, and the threads of each."""
        return (1, 8) if self.one_process else (2, 4)

    @property
    def is_plain(self) -> bool:
        """Whether this is the plain view, the unit of the others."""
        return self.module == "plain"


def _here(module: str) -> str:
    return f"benchmarks.peers.{module}"


HUEY = ("huey.bin.huey_consumer", _here("with_huey.huey"), "--workers", "2")
CELERY = ("celery", "--app", _here("with_celery:celery"), "worker", "--concurrency", "2")
PROCRASTINATE = ("procrastinate", f"--app={_here('with_procrastinate')}.app")
PGQUEUER = ("pgqueuer", "--pg-dsn", "{store}")

SYSTEMS = (
    System("plain view, 1 × 8", Durability.NOTHING, "plain", "flask", one_process=True),
    System("plain view, 2 × 4", Durability.NOTHING, "plain", "flask"),
    System(
        "Flask-Executor", Durability.NOTHING, "with_flask_executor", "flask_executor",
        one_process=True,
    ),
    System(
        "flask_asyncroute, memory", Durability.NOTHING, "with_asyncroute", "flask_asyncroute",
        store="memory://", one_process=True,
    ),
    System(
        "flask_asyncroute, SQLite", Durability.KILL, "with_asyncroute", "flask_asyncroute",
        store="sqlite:///{folder}/tasks.db",
    ),
    System(
        "Huey, SQLite fsync=False", Durability.KILL, "with_huey", "huey",
        store="{folder}/huey.db", worker=(*HUEY, "--worker-type", "process"),
    ),
    System(
        "RQ, Redis", Durability.KILL, "with_rq", "rq", "redis", "redis{service}",
        worker=(_here("with_rq"),), workers=2,
    ),
    System(
        "Celery, Redis", Durability.KILL, "with_celery", "celery", "redis", "redis{service}",
        worker=(*CELERY, "--pool", "prefork", "--loglevel", "WARNING"),
    ),
    System(
        "flask_asyncroute, SQLite FULL", Durability.FSYNC, "with_asyncroute", "flask_asyncroute",
        store="sqlite:///{folder}/tasks.db?synchronous=FULL",
    ),
    System(
        "Huey, SQLite fsync=True", Durability.FSYNC, "with_huey", "huey",
        store="{folder}/huey.db?fsync", worker=(*HUEY, "--worker-type", "process"),
    ),
    System(
        "DBOS, SQLite", Durability.FSYNC, "with_dbos", "dbos", store="sqlite:///{folder}/dbos.db"
    ),
    System(
        "flask_asyncroute, PostgreSQL", Durability.FSYNC, "with_asyncroute", "flask_asyncroute",
        "postgresql", "postgresql+psycopg{service}",
    ),
    System(
        "DBOS, PostgreSQL", Durability.FSYNC, "with_dbos", "dbos", "postgresql",
        "postgresql{service}",
    ),
    System(
        "Procrastinate, PostgreSQL", Durability.FSYNC, "with_procrastinate", "procrastinate",
        "postgresql", "postgresql{service}", prepares=(*PROCRASTINATE, "schema", "--apply"),
        worker=(*PROCRASTINATE, "worker"), workers=2,
    ),
    System(
        "PgQueuer, PostgreSQL", Durability.FSYNC, "with_pgqueuer", "pgqueuer",
        "postgresql", "postgresql{service}", prepares=(*PGQUEUER, "install"),
        worker=(_here("with_pgqueuer"),), workers=2,
    ),
)  # fmt: skip
