"""A PostgreSQL and a Redis server that only the benchmark uses.

Their CPU time counts, and no other client disturbs them or loses data. Both have the settings of a
new installation, except that Redis writes every command to its append-only file. Otherwise a kill
of Redis would lose tasks.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from .processes import Process, free_port

PATIENCE = 30.0


class Unavailable(Exception):
    """The program of a service is not installed."""


@contextmanager
def redis() -> Iterator[str]:
    """Yield the URL of a new Redis server, without its scheme and database number.

    :raises Unavailable: if redis-server is missing.
    """
    program = _redis_server()
    folder, port = Path(mkdtemp(prefix="peers-redis-")), free_port()
    command = [
        program, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder),
        "--save", "", "--appendonly", "yes", "--appendfsync", "everysec",
    ]  # fmt: skip
    server = Process(command, folder / "log")
    try:
        _wait_for_port(server, port)
        yield f"://127.0.0.1:{port}"
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def postgresql() -> Iterator[str]:
    """Yield the URL of a new PostgreSQL server, without its scheme and database name.

    :raises Unavailable: if its programs are missing, or if root has no user "postgres" to run them.
    """
    initdb, postgres = _program("initdb"), _postgres()
    folder, port = Path(mkdtemp(prefix="peers-postgresql-")), free_port()
    try:
        # PostgreSQL refuses to run as root.
        user = "postgres" if os.geteuid() == 0 else None
        if user is not None:
            try:
                shutil.chown(folder, user, user)
            except LookupError:
                raise Unavailable('root needs a user "postgres" to run PostgreSQL') from None
        data = str(folder / "data")
        arguments = ["--pgdata", data, "--auth", "trust", "--username", "postgres"]
        creation = Process([initdb, *arguments], folder / "log", user=user)
        try:
            creation.wait(PATIENCE)
        finally:
            creation.kill()
        command = [
            postgres, "-D", data, "-p", str(port), "-c", "listen_addresses=127.0.0.1",
            "-c", "unix_socket_directories=",
        ]  # fmt: skip
        server = Process(command, folder / "log", user=user)
        try:
            _wait_for_port(server, port)
            yield f"://postgres@127.0.0.1:{port}"
        finally:
            server.terminate(10)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def versions() -> dict[str, str]:
    """Return the versions of the installed servers."""
    found = {}
    for name, locate in ("PostgreSQL", _postgres), ("Redis server", _redis_server):
        try:
            output = subprocess.run([locate(), "--version"], capture_output=True, text=True).stdout
        except Unavailable:
            continue
        number = re.search(r"\d+\.[\d.]+", output)
        found[name] = number[0] if number else "unknown"
    return found


def _postgres() -> str:
    return _program("postgres")


def _redis_server() -> str:
    program = shutil.which("redis-server")
    if program is None:
        raise Unavailable("redis-server is not installed")
    return program


def _program(name: str) -> str:
    """Return the path of a program of PostgreSQL. Debian keeps them out of PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    program = str(found[-1]) if found else shutil.which(name)
    if program is None:
        raise Unavailable(f"{name} of PostgreSQL is not installed")
    return program


def _wait_for_port(server: Process, port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        server.check()
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"The server did not start: {server.output()}") from None
            time.sleep(0.05)


@contextmanager
def empty_redis(url: str) -> Iterator[str]:
    """Yield the URL of the server, and delete all keys at the end."""
    from redis import Redis

    yield url
    with Redis.from_url(f"redis{url}") as client:
        client.flushall()


@contextmanager
def empty_postgresql(url: str) -> Iterator[str]:
    """Yield the URL of a new database without its scheme, and drop it at the end."""
    import psycopg

    with psycopg.connect(f"postgresql{url}/postgres", autocommit=True) as connection:
        connection.execute("CREATE DATABASE peers")
        try:
            yield f"{url}/peers"
        finally:
            connection.execute("DROP DATABASE peers WITH (FORCE)")


EMPTY = {"redis": empty_redis, "postgresql": empty_postgresql}
