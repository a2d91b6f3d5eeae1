"""The exit under other servers than gunicorn: what ran has its time, is settled, and the process goes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prove.client import send
from prove.server import gunicorn

from .test_gunicorn import crowd, lines, state
from .test_loss import gone

pytestmark = pytest.mark.live

Eventually = Callable[..., Any]
ROOT = Path(__file__).parent.parent.parent
UWSGI = "import sys, pyuwsgi; pyuwsgi.run(sys.argv[1:])"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as made:
        return int(made.getsockname()[1])


def answers(port: int) -> bool:
    try:
        return send(port, "GET", "/pid").status == 200
    except OSError:
        return False


@pytest.fixture
def serve(tmp_path: Path, eventually: Eventually) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], int]]]:
    """Give ``serve(*arguments)``: Python with these arguments, ``{port}`` filled in, serving ``served:app``."""
    (tmp_path / "served.py").write_text(
        f"from prove.apps.crowd import create_app\napp = create_app({str(tmp_path)!r}, drain=1)\n"
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path), os.environ.get("PYTHONPATH", "")])
    made: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> tuple[subprocess.Popen[bytes], int]:
        port = free_port()
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *(argument.format(port=port) for argument in arguments)], cwd=tmp_path, stdout=log,
                stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
            )  # fmt: skip
        made.append(process)
        eventually(lambda: answers(port), 20)
        return process, port

    yield start
    for process in made:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def end_well(process: subprocess.Popen[bytes], port: int, number: int, folder: Path, eventually: Eventually) -> None:
    """Start tasks, end the process with a signal, and look at what has become of them in the next one."""
    quick, slow, again = (send(port, "PUT", path).json()["Id"] for path in ("/work/600", "/work/60000", "/again/3000"))
    eventually(lambda: all(lines(folder, "begin")[task_id] for task_id in (quick, slow, again)))
    (pid,) = {lines(folder, "begin")[task_id][0]["pid"] for task_id in (quick, slow, again)}
    began = time.monotonic()
    process.send_signal(number)
    eventually(lambda: gone(pid), 3)
    assert time.monotonic() - began <= 3.0
    process.wait(5)
    assert b"Traceback" not in (folder / "log").read_bytes()
    with gunicorn(folder / "log2", crowd(folder), "--workers", "1", "--threads", "4") as server:
        assert state(server.port, quick) == "Completed"
        found = send(server.port, "GET", f"/task/{slow}").json()
        assert (found["State"], found["Error"]) == ("Aborted", "Server shutdown")
        assert "Stopping" not in found
        eventually(lambda: state(server.port, again) == "Completed", 10)


def test_f04_gevent(tmp_path: Path, serve: Any, eventually: Eventually) -> None:
    pytest.importorskip("gevent")
    options = ("-k", "gevent", "-w", "1", "-b", "127.0.0.1:{port}", "--no-control-socket")
    process, port = serve("-m", "gunicorn", *options, "served:app")
    end_well(process, port, signal.SIGTERM, tmp_path, eventually)


@pytest.mark.parametrize("options", [(), ("--lazy-apps",)], ids=["forked", "lazy-apps"])
def test_f04_uwsgi(tmp_path: Path, serve: Any, eventually: Eventually, options: tuple[str, ...]) -> None:
    pytest.importorskip("pyuwsgi")
    process, port = serve(
        "-c", UWSGI, "--http-socket", "127.0.0.1:{port}", "--master", "--die-on-term", "--enable-threads",
        "--threads", "2", "--processes", "1", "--virtualenv", sys.prefix, "--module", "served:app", *options,
    )  # fmt: skip
    end_well(process, port, signal.SIGTERM, tmp_path, eventually)


def test_f04_waitress(tmp_path: Path, serve: Any, eventually: Eventually) -> None:
    """It leaves by itself at an interrupt only."""
    pytest.importorskip("waitress")
    process, port = serve("-m", "waitress", "--listen=127.0.0.1:{port}", "served:app")
    end_well(process, port, signal.SIGINT, tmp_path, eventually)


def test_f04_the_development_server(tmp_path: Path, serve: Any, eventually: Eventually) -> None:
    process, port = serve("-m", "flask", "--app", "served:app", "run", "--port", "{port}", "--no-reload")
    end_well(process, port, signal.SIGINT, tmp_path, eventually)


def test_f01_a_server_that_leaves_without_a_word(tmp_path: Path, serve: Any, eventually: Eventually) -> None:
    """As waitress does at TERM: the next process finds what was lost."""
    pytest.importorskip("waitress")
    process, port = serve("-m", "waitress", "--listen=127.0.0.1:{port}", "served:app")
    task_id = send(port, "PUT", "/work/60000").json()["Id"]
    eventually(lambda: lines(tmp_path, "begin")[task_id])
    process.terminate()
    process.wait(5)
    with gunicorn(tmp_path / "log2", crowd(tmp_path), "--workers", "1", "--threads", "4") as server:
        eventually(lambda: state(server.port, task_id) == "Aborted", 2)
        assert send(server.port, "GET", f"/task/{task_id}").json()["Error"] == "Worker lost"
