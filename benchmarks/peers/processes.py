"""Processes of the benchmark, and the CPU time that they have used (Linux)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
TICKS = os.sysconf("SC_CLK_TCK")


class Process:
    """Runs a command in a session of its own. Call `kill` at the end.

    :param log: the file for its output.
    :param environ: added to the environment.
    :param user: the user that runs it; None: the current user.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        environ: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, cwd=ROOT if user is None else "/", stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, env={**os.environ, **(environ or {})}, user=user,
                group=user, extra_groups=None if user is None else [], start_new_session=True,
            )  # fmt: skip

    def check(self) -> None:
        """Raise an error if the process has ended.

        :raises RuntimeError: with the end of its output.
        """
        if self._process.poll() is not None:
            raise RuntimeError(f"A process has ended: {self.output()}")

    def wait(self, seconds: float) -> None:
        """Wait for the end of the process.

        :raises RuntimeError: if it fails.
        """
        if self._process.wait(seconds):
            raise RuntimeError(f"A command has failed: {self.output()}")

    def output(self) -> str:
        """Return the last lines of its output."""
        return self.log.read_text("utf-8", "replace")[-1500:]

    def terminate(self, seconds: float) -> None:
        """Send SIGINT and wait, then kill what remains."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def kill(self) -> None:
        """Kill the process and all its descendants, if it is running."""
        if self._process.poll() is not None:
            return
        for pid in [self._process.pid, *descendants(self._process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._process.wait()


def descendants(pid: int) -> list[int]:
    """Return the children of a process, their children, and so on."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in path.read_text("ascii").split()]
        except OSError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def cpu_seconds() -> float:
    """Return the CPU time that all descendants of this process have used.

    Includes their children that have ended. This process is the client and is not included.
    """
    ticks = 0
    for pid in descendants(os.getpid()):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
        except OSError:
            continue
        ticks += sum(map(int, stat.rpartition(")")[2].split()[11:15]))
    return ticks / TICKS


def free_port() -> int:
    """Return a free port of 127.0.0.1."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
