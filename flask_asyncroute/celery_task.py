"""The task that Celery workers run. `executors.registry` imports this module if a route has
``executor="celery"``, so that Celery registers the task.
"""

from __future__ import annotations

import logging
from contextvars import Context
from typing import Any

from celery import shared_task
from celery.signals import worker_process_init

from .errors import AsyncRouteError, ConfigurationError
from .executors.celery import TASK_NAME, CeleryTaskExecutor
from .executors.registry import CELERY_CHILD, CELERY_WORKER
from .runtime import Runtime, runtimes
from .workers import run_task
from .workers.runner import Runner

logger = logging.getLogger("flask_asyncroute")


@shared_task(  # type: ignore[untyped-decorator]
    name=TASK_NAME, bind=True, ignore_result=True, max_retries=0, typing=False
)
def run(self: Any, task_id: str) -> None:
    """Run a task of an async route if it still waits. A second message for it does nothing."""
    Context().run(_run, self.app, task_id)


@worker_process_init.connect(weak=False)  # type: ignore[untyped-decorator]
def _on_child(**extra: Any) -> None:
    # Celery sends this signal only in the children of prefork workers.
    CeleryTaskExecutor.can_kill = True


def _run(celery: Any, task_id: str) -> None:
    for runtime in runtimes():
        runner = _runner_of(runtime, celery)
        if runner is None:
            continue
        task = runner.store.get(task_id)
        if task is None:
            continue
        route = runner.routes.get(task.endpoint)
        if route is None:
            raise ConfigurationError(
                f"This Celery worker has no async route with the endpoint {task.endpoint!r}. Start "
                "the workers and the web servers with the same release of the app."
            )
        run_task.run(runner, runner.executor_of(route), task_id)
        return
    logger.warning(
        "The Celery worker received the task %s, which is in no store of its apps: it was removed, "
        "or the worker has another ASYNCROUTE_STORE or ASYNCROUTE_NAMESPACE than the web servers.",
        task_id,
    )


def _runner_of(runtime: Runtime, celery: Any) -> Runner | None:
    """Return the runner of an app whose routes use this Celery app; None for other apps."""
    try:
        runtime.become_celery_worker(CELERY_CHILD if CeleryTaskExecutor.can_kill else CELERY_WORKER)
        runner = runtime.runner
        return runner if runner.has_celery and runner.celery is celery else None
    except AsyncRouteError as error:
        logger.error("The app of an async route cannot be used in this Celery worker: %s", error)
        return None
