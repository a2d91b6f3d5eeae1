"""The message brokers that tests run Celery on."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest
from celery import Celery
from kombu.connection import Connection

REDIS = "redis://127.0.0.1:6379"
RABBITMQ = "amqp://guest:guest@127.0.0.1:5672//"
DATABASES = range(9, 16)
"""The databases of a Redis server that tests use. Two runs at once mostly have different ones."""


def redis_url() -> str:
    """Return the URL of a Redis database for this run. Without Redis, see :func:`_checked`."""
    server = os.environ.get("TEST_REDIS_URL", REDIS)
    return _checked("Redis", f"{server}/{DATABASES[os.getpid() % len(DATABASES)]}")


def rabbitmq_url() -> str:
    """Return the URL of RabbitMQ. Without RabbitMQ, see :func:`_checked`."""
    return _checked("RabbitMQ", os.environ.get("TEST_RABBITMQ_URL", RABBITMQ))


def _checked(name: str, url: str) -> str:
    """Return the URL of a broker. If it does not respond, skip the test, or fail if
    ``REQUIRE_SERVICES`` is 1.
    """
    try:
        with Connection(url, connect_timeout=3) as connection:
            connection.ensure_connection(max_retries=1, timeout=3)
    except Exception as error:
        if os.environ.get("REQUIRE_SERVICES") == "1":
            raise
        pytest.skip(f"no {name} at {url}: {type(error).__name__}")
    return url


def new_celery(broker: str, queue: str = "celery", **settings: object) -> Celery:
    """Return a Celery app that does not become the default one of this process."""
    celery = Celery("tests", set_as_current=False)
    celery.config_from_object(
        {
            "broker_url": broker,
            "task_default_queue": queue,
            "broker_connection_retry_on_startup": True,
            "worker_hijack_root_logger": False,
            **settings,
        }
    )
    return celery


def delete_queue(broker: str, queue: str) -> None:
    """Delete a queue, also if it does not exist."""
    with Connection(broker) as connection, suppress(connection.channel_errors):
        connection.default_channel.queue_delete(queue)


def purge_queue(broker: str, queue: str) -> int:
    """Delete the messages of a queue; return how many there were."""
    with Connection(broker) as connection:
        try:
            return int(connection.default_channel.queue_purge(queue) or 0)
        except connection.channel_errors:
            return 0
