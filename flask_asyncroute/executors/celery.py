"""The executor behind ``executor="celery"``: sends the ids of tasks to the app's Celery workers.

In a Celery worker, the same executor interrupts views that do not stop; see `celery_task`.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from celery import Celery, shared_task
from celery.exceptions import OperationalError
from celery.signals import worker_init, worker_process_init
from flask import Flask
from werkzeug.utils import import_string

from ..errors import BrokerUnavailable, ConfigurationError
from ..task import AsyncRouteTask
from .base import PoolSettings, TaskExecutor
from .execution import Execution
from .interruption import interrupt
from .registry import CELERY_CHILD

logger = logging.getLogger("flask_asyncroute")

TASK_NAME = "flask_asyncroute.run"
LOG_AGAIN_SECONDS = 60.0  # seconds until the same error is logged again
ONE_RETRY = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}


class CeleryTaskExecutor(TaskExecutor):
    """Sends tasks to Celery workers. The broker holds the queue, so no slots are counted here."""

    can_kill = False
    """Whether this process is a worker's child, which runs one task at a time (prefork)."""

    def __init__(self, settings: PoolSettings) -> None:
        super().__init__(settings)
        assert settings.host is not None
        self.interrupt_after = settings.interrupt_after
        self._celery = settings.host.celery
        self._options = dict(settings.celery)
        self._logged = ""
        self._log_again_at = 0.0

    def reserve(self) -> None: ...

    def release(self) -> None: ...

    def close(self) -> None: ...

    def submit(self, task_id: str) -> None:
        """Send a task to the workers.

        :raises BrokerUnavailable: if the broker does not accept the message.
        """
        try:
            self._celery.send_task(
                TASK_NAME, (task_id,), task_id=task_id, ignore_result=True, retry=True,
                retry_policy=ONE_RETRY, **self._options,
            )  # fmt: skip
        except (OperationalError, OSError) as error:
            self._log(error)
            raise BrokerUnavailable(
                "The message broker is unavailable at the moment, so the task was not started. Try "
                "again.",
                retry_after=5,
            ) from error

    def takeover_capacity(self) -> int:
        """Return 0: lost messages are sent again by `workers.lost_messages`."""
        return 0

    def cancel(self, task: AsyncRouteTask) -> None:
        # This waits for the broker, and the worker may learn of the stop from the store first.
        threading.Thread(
            target=self._revoke, args=(task,), name="asyncroute-revoke", daemon=True
        ).start()

    def interrupt(self, execution: Execution) -> bool:
        return interrupt(execution)

    def abandon(self, task_id: str) -> None:
        if self.can_kill:
            # The abort is stored. Other processes notice the death, and the worker replaces this
            # child.
            os.kill(os.getpid(), signal.SIGKILL)

    def waiting_messages(self) -> int | None:
        """Return the number of messages in the queue of this route; None if it is unknown."""
        try:
            route = self._celery.amqp.router.route(dict(self._options), TASK_NAME)
            with self._celery.connection_for_read() as connection:
                queue = connection.default_channel.queue_declare(route["queue"].name, passive=True)
                return int(queue.message_count)
        except Exception as error:
            # Some brokers cannot count, and a queue that does not exist raises an error.
            logger.debug("The messages of a Celery queue could not be counted: %r", error)
            return None

    def _revoke(self, task: AsyncRouteTask) -> None:
        # The solo pool would kill the whole worker, and the others would log errors.
        can_kill = task.owner is not None and task.owner.startswith(CELERY_CHILD)
        try:
            self._celery.control.revoke(task.id, terminate=can_kill, signal="SIGKILL")
        except Exception as error:
            self._log(error)

    def _log(self, error: Exception) -> None:
        text, now = f"{type(error).__name__}: {error}", time.monotonic()
        if text != self._logged or now >= self._log_again_at:
            self._logged, self._log_again_at = text, now + LOG_AGAIN_SECONDS
            logger.error(
                "The broker of ASYNCROUTE_CELERY cannot be used: %s. Check that it is running.",
                text,
            )


def register(run: Callable[[Celery, str], None]) -> None:
    """Make ``run`` the task :data:`TASK_NAME` of all Celery apps of this process.

    :param run: called in a worker with the Celery app and the task's id.
    """

    def call(self: Any, task_id: str) -> None:
        run(self.app, task_id)

    shared_task(name=TASK_NAME, bind=True, ignore_result=True, max_retries=0, typing=False)(call)
    worker_init.connect(_on_worker, weak=False)
    worker_process_init.connect(_on_process, weak=False)


_worker_pid: list[int] = []
"""The main process of this Celery worker."""


def _on_worker(**extra: Any) -> None:
    _worker_pid[:] = [os.getpid()]


def _on_process(**extra: Any) -> None:
    # The solo pool sends this signal in the worker's only process, which must not be killed.
    CeleryTaskExecutor.can_kill = os.getpid() not in _worker_pid


def find_celery(app: Flask, setting: Celery | str | Mapping[str, Any] | None) -> Celery:
    """Return the Celery app that ``ASYNCROUTE_CELERY`` names, else ``app.extensions["celery"]``.

    :raises ConfigurationError: if there is none.
    """
    found: Any = setting
    if isinstance(setting, str):
        try:
            found = import_string(setting)
        except ImportError as error:
            raise ConfigurationError(
                f"ASYNCROUTE_CELERY: {setting!r} cannot be imported: {error}. Use the import path "
                "of the Celery app, such as 'package.module:celery'."
            ) from error
    elif isinstance(setting, Mapping):
        found = app.extensions.get("celery")
        if found is None:
            found = app.extensions["celery"] = Celery(app.import_name, set_as_current=False)
            found.config_from_object(dict(setting))
    elif setting is None:
        found = app.extensions.get("celery")
        if found is None:
            raise ConfigurationError(
                'A route has executor="celery", but the app has no Celery app. Set '
                'ASYNCROUTE_CELERY, or app.extensions["celery"] as in Flask\'s documentation.'
            )
    if not isinstance(found, Celery):
        raise ConfigurationError(
            f"ASYNCROUTE_CELERY must be a Celery app, its import path or Celery settings, not "
            f"{type(found).__name__}."
        )
    return found


def is_local(celery: Celery) -> bool:
    """Return whether the broker is on this machine."""
    url = celery.connection_for_write().as_uri()
    host = urlsplit(url).hostname
    if host is None or host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
