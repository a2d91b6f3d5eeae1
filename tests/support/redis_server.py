"""A Redis server of one test, which can be killed and started again empty."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from tests.support.programs import Program


class RedisServer(Program):
    """Runs ``redis-server`` on a free port, without persistence, while the context lasts."""

    def __init__(self, folder: Path) -> None:
        command = shutil.which("redis-server")
        if command is None and os.environ.get("REQUIRE_SERVICES") != "1":
            pytest.skip("redis-server is not installed")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = int(free.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self._port}/0"
        arguments = f"--port {self._port} --bind 127.0.0.1 --appendonly no --dir {folder} --save"
        super().__init__(folder / "redis.log", [command or "redis-server", *arguments.split(), ""])

    def _is_ready(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self._port)) == 0
