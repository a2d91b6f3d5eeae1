"""Information about other processes from /proc on Linux."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tests.support.waiting import eventually_true


def children(pid: int) -> list[int]:
    """Return the children of a process; none if it has ended."""
    try:
        listed = [one.read_text("ascii") for one in Path(f"/proc/{pid}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(child) for one in listed for child in one.split()]


def descendants(pid: int) -> list[int]:
    """Return the children of a process, their children, and so on."""
    return [other for child in children(pid) for other in (child, *descendants(child))]


def parent(pid: int) -> int:
    """Return the parent of a process."""
    return int(_stat(pid)[1])


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return _stat(pid)[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: Iterable[int], seconds: float) -> None:
    """Wait until none of the processes is running."""
    pids = list(pids)
    eventually_true(
        lambda: not any(map(is_running, pids)), seconds, 0.0005, f"not all of {pids} have ended"
    )


def memory(pid: int, name: str = "VmRSS") -> int:
    """Return a memory figure of a process in bytes, as in proc(5)."""
    status = Path(f"/proc/{pid}/status").read_text("ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None, f"/proc/{pid}/status has no {name}"
    return int(found[1]) * 1024


def private_memory(pid: int) -> int:
    """Return the memory in bytes that a process shares with no other."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii")
    found = re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.MULTILINE)
    return sum(map(int, found)) * 1024


def _stat(pid: int) -> list[str]:
    """Return the fields after the command name."""
    return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
