"""The kinds of executors, one row for each value of the ``executor`` option.

A new kind needs a module with a `TaskExecutor`, a row here, and tests. No other module compares
kinds by name.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

from ..errors import ConfigurationError
from ..validators import refuse
from .base import PoolSettings, TaskExecutor
from .queue import QueueTaskExecutor


@dataclass(frozen=True, slots=True)
class ExecutorKind:
    name: str
    location: str  # module and class
    default_min_workers: int = 1
    is_bound: bool = False  # only the process that started a task can run it
    runs_inline: bool = False  # `submit` returns when the task has ended
    runs_elsewhere: bool = False  # `submit` sends the task to workers of another system
    needs: str | None = None  # the package to install, which is also the name of the pip extra
    needs_app: bool = False  # child processes load the app from ASYNCROUTE_APP
    platform: str | None = None  # the only supported system; None: any


CELERY_WORKER = "celery-"
"""The names of Celery workers begin with this. They only run tasks."""
CELERY_CHILD = "celery-prefork-"  # the same for workers whose processes can be killed

IMMEDIATE = ExecutorKind(
    "immediate", "inline:ImmediateTaskExecutor", is_bound=True, runs_inline=True
)
_ROWS = (
    ExecutorKind("thread", "thread:ThreadTaskExecutor"),
    ExecutorKind(
        "process", "process.executor:ProcessTaskExecutor", default_min_workers=0, needs_app=True,
        platform="Linux",
    ),
    IMMEDIATE,
    ExecutorKind(
        "celery", "celery:CeleryTaskExecutor", default_min_workers=0, runs_elsewhere=True,
        needs="celery",
    ),
)  # fmt: skip
KINDS = {kind.name: kind for kind in _ROWS}
APP_EXECUTOR = ExecutorKind("the app's own", "inline:FutureTaskExecutor", is_bound=True)
"""The kind of the app's own `concurrent.futures.Executor`, with threads of this process."""


def checked(label: str, value: Any) -> str | Executor:
    """Return ``value`` if it is a kind's name or an Executor.

    :raises ConfigurationError: for any other value; the message names the option.
    """
    if isinstance(value, ProcessPoolExecutor):
        raise ConfigurationError(
            f"{label} must not be a ProcessPoolExecutor, because its processes cannot run tasks. "
            'Use executor="process".'
        )
    if isinstance(value, Executor):
        return value
    if not isinstance(value, str) or value not in KINDS:
        names = ", ".join(map(repr, KINDS))
        raise refuse(label, f"one of {names} or a concurrent.futures.Executor", value)
    kind = KINDS[value]
    if kind.needs is not None and find_spec(kind.needs) is None:
        raise ConfigurationError(
            f'{label}: executor="{kind.name}" needs {kind.needs}, which is not installed; run pip '
            f"install 'flask-asyncroute[{kind.needs}]'."
        )
    return kind.name


def kind_of(value: str | Executor) -> ExecutorKind:
    return KINDS[value] if isinstance(value, str) else APP_EXECUTOR


def check_usable(label: str, value: str | Executor) -> None:
    """Raise ConfigurationError, naming the route, if a kind does not work on this system."""
    kind = kind_of(value)
    if kind.platform not in (None, platform.system()):
        raise ConfigurationError(
            f'{label}: executor="{kind.name}" works only on {kind.platform}; use "thread" here.'
        )


def make_queue(settings: PoolSettings, count: Callable[[int], int]) -> TaskExecutor:
    """Return the executor of a process that leaves the tasks to worker processes.

    :param count: see `QueueTaskExecutor`.
    """
    return QueueTaskExecutor(settings, count)


def make_executor(settings: PoolSettings) -> TaskExecutor:
    module, _, name = kind_of(settings.option).location.partition(":")
    executor = getattr(import_module(f".{module}", __package__), name)(settings)
    return cast(TaskExecutor, executor)
