"""A large upload is received, stored, run and finished without ever being whole in memory (Linux: reads /proc)."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from . import check
from .client import send
from .server import gunicorn

SIZE = 50 * 1024 * 1024
GROWTH = 20 * 1024 * 1024
LINE = b"2024-03-01,Z\xc3\xbcrich,4711,12.50,some more text to fill the line\n"
BOUNDARY = "prove-5f0c"
PATIENCE = 60.0
CASES = {
    "memory": ("store='memory://'", False),
    "SQLite": ("", False),
    "SQLite, form parsed before": ("parses_first=True", False),
    "SQLite, chunked": ("", True),
}


def prove(share: float) -> str:
    """Upload 50 MB to a worker in each way; return by how much its resident memory grew. The size is what is claimed."""
    return "50 MB uploaded, resident memory at most " + ", ".join(
        f"+{run(*case) / 1024 / 1024:.1f} MB ({name})" for name, case in CASES.items()
    )


def run(arguments: str, is_chunked: bool, size: int = SIZE) -> int:
    """Upload one file and have it read; return by how many bytes the worker's resident memory grew at most."""
    with tempfile.TemporaryDirectory(prefix="asyncroute-prove-") as name:
        folder = Path(name)
        app = f"prove.apps.csv:create_app({name!r}, {arguments})"
        with gunicorn(folder / "log", app, "--workers", "1", "--threads", "4") as server:
            pid = send(server.port, "GET", "/pid").json()["pid"]
            upload(server.port, 100_000, is_chunked)
            before = memory(pid, "VmRSS")
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the high-water mark begins anew: proc(5)
            upload(server.port, size, is_chunked)
            growth = memory(pid, "VmHWM") - before
            check(
                growth <= GROWTH, f"resident memory grew by {growth / 1024 / 1024:.1f} MB ({arguments or 'defaults'})"
            )
            check("Traceback" not in server.output(), f"the server wrote of an error:\n{server.output()[-3000:]}")
    return growth


def upload(port: int, size: int, is_chunked: bool) -> None:
    """Send a form with a file; wait until its task has read the whole of it."""
    lines = size // len(LINE)
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="field"\r\n\r\nvalue\r\n'
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="data.csv"\r\n'
        "Content-Type: text/csv\r\n\r\n"
    ).encode()
    tail = f"\r\n--{BOUNDARY}--\r\n".encode()

    def pieces() -> Iterator[bytes]:
        yield head
        for start in range(0, lines, 1000):
            yield LINE * min(1000, lines - start)
        yield tail

    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    if not is_chunked:
        headers["Content-Length"] = str(len(head) + lines * len(LINE) + len(tail))
    reply = send(port, "POST", "/csv", body=pieces(), headers=headers)
    check(reply.status == 202, f"the upload was answered {reply.status}: {reply.body[:300]!r}")
    task = reply.json()
    deadline = time.monotonic() + PATIENCE
    while not task["IsCompleted"]:
        check(time.monotonic() < deadline, f"the upload's task does not end: {task}")
        time.sleep(0.05)
        task = send(port, "GET", reply.headers["location"]).json()
    expected = {"Lines": lines, "Size": lines * len(LINE), "Name": "data.csv", "Field": "value"}
    check(task.get("Result") == expected, f"the task read something else: {task}")


def memory(pid: int, name: str) -> int:
    """Return a figure of a process's memory in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text("ascii"), re.MULTILINE)
    assert found is not None, f"/proc/{pid}/status has no {name}"
    return int(found[1]) * 1024
