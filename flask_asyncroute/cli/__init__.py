"""The commands of ``flask asyncroute``."""

from __future__ import annotations

from .base import CommandGroup
from .reading import list_tasks, routes, show, workers
from .watching import watch
from .worker import worker
from .writing import init_db, purge, redeliver, stop, submit

group = CommandGroup("asyncroute", help="Operate the async routes of this app.")
for command in (
    routes, list_tasks, show, submit, stop, watch, purge, redeliver, workers, worker, init_db
):  # fmt: skip
    group.add_command(command)
