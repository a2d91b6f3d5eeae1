"""The task that Celery workers run. Import this module if a route has ``executor="celery"``, so
that the workers know the task.
"""

from __future__ import annotations

import logging
from contextvars import Context
from importlib import import_module
from typing import Any

from .errors import ConfigurationError
from .executors.celery import CeleryTaskExecutor, register
from .executors.registry import CELERY_CHILD, CELERY_WORKER
from .runtime import Runtime, runtimes
from .stores.registry import modules_of
from .task import AsyncRouteTask, State
from .workers import run_task, shutdown
from .workers.runner import Runner

logger = logging.getLogger("flask_asyncroute")


def run(celery: Any, task_id: str) -> None:
    """Run a task of an async route if it still waits. A second message for it does nothing."""
    Context().run(_run, celery, task_id)


def _run(celery: Any, task_id: str) -> None:
    found: AsyncRouteTask | None = None
    for runtime in runtimes():
        runner = _runner_of(runtime, celery)
        task = None if runner is None else runner.store.get(task_id)
        if runner is None or task is None:
            continue
        found = task
        if task.state is not State.NOT_STARTED:
            continue  # another app of this process can have a task with this id
        route = runner.routes.get(task.endpoint)
        if route is None:
            raise ConfigurationError(
                f"This Celery worker has no async route with the endpoint {task.endpoint!r}. Start "
                "the workers and the web servers with the same release of the app."
            )
        run_task.run(runner, runner.executor_of(route), task_id)
        return
    if found is None:
        logger.warning(
            "The Celery worker received the task %s, which is in no store of its apps: it was "
            "removed, or the worker has another ASYNCROUTE_STORE, ASYNCROUTE_NAMESPACE or "
            "ASYNCROUTE_CELERY than the web servers.",
            task_id,
        )


def _runner_of(runtime: Runtime, celery: Any) -> Runner | None:
    """Return the runner of one Flask app; None if its routes do not use the Celery app.

    :param runtime: the runtime of the Flask app.
    :param celery: the Celery app.
    :raises StoreUnavailable: if the store of the Flask app cannot be opened now.
    """
    try:
        if runtime.celery is not celery:
            return None
        prefix = CELERY_CHILD if CeleryTaskExecutor.can_kill else CELERY_WORKER
        runtime.become_celery_worker(prefix)
        return runtime.runner
    except ConfigurationError as error:
        logger.error("The app of an async route cannot be used in this Celery worker: %s", error)
        return None


def prepare() -> None:
    """Import what the child processes of this worker need, so that they do not import it again."""
    for runtime in runtimes():
        for name in modules_of(runtime.initial.store):
            import_module(name)


def end() -> None:
    """End the tasks of this process now, because the process must exit."""
    shutdown.shut_down(dict.fromkeys(shutdown.runners, 0.0))


register(run, prepare, end, during=run_task.execute.__code__)
