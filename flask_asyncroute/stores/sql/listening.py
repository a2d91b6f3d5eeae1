"""Hears what PostgreSQL tells (``LISTEN``), on a thread and a connection of its own.

What is told while that connection is lost is not heard; once there is another, it is as if something had been told.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from .database import logger

RETRY_SECONDS = 1.0


class PostgreSQLListener:
    """Listens until it is closed. Thread-safe.

    :param engine: gives a connection, which leaves its pool.
    :param heard: called in the listener's thread; must return at once and not raise.
    """

    def __init__(self, engine: Engine, channel: str, payload: str, heard: Callable[[], None]) -> None:
        self._engine = engine
        self._channel = channel
        self._payload = payload
        self._heard = heard
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="asyncroute-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and wait for it, five seconds at most."""
        self._closed.set()
        with self._lock, suppress(OSError):
            if self._socket is not None:
                # The thread sits in a read, which nothing else ends.
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread is not threading.current_thread():
            self._thread.join(5)

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                with self._engine.connect() as connection:
                    driver: Any = connection.connection.driver_connection
                    connection.detach()
                    self._listen(connection, driver)
            except (SQLAlchemyError, OSError) as error:
                self._complain(error)
            except Exception as error:
                # The driver's own, which it raises outside of SQLAlchemy.
                if not any(kind.__module__.startswith("psycopg") for kind in type(error).__mro__):
                    raise
                self._complain(error)
            self._closed.wait(RETRY_SECONDS)

    def _listen(self, connection: Connection, driver: Any) -> None:
        connection.exec_driver_sql(f"LISTEN {self._channel}")
        with self._lock:
            self._socket = socket.socket(fileno=os.dup(driver.fileno()))
        try:
            if self._closed.is_set():
                return
            self._heard()
            for told in driver.notifies():
                if told.payload == self._payload:
                    self._heard()
        finally:
            with self._lock:
                self._socket.close()
                self._socket = None

    def _complain(self, error: Exception) -> None:
        if not self._closed.is_set():
            logger.warning(
                "What other processes write cannot be listened to now; it is asked for four times a second. (%s)",
                type(error).__name__,
            )
