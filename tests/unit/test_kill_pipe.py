"""The kill pipe: writing to it, closing it, or the death of its holder kills the attached process
group, whatever the group is doing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from flask_asyncroute.executors.process.kill_pipe import KillPipe

Eventually = Callable[..., Any]

SCRIPT = """
import os, subprocess, sys, time
from flask_asyncroute.executors.process import kill_pipe
os.setsid()
kill_pipe.attach(int(sys.argv[1]), -os.getpid())
child = subprocess.Popen(["sleep", "60"])
print(child.pid, flush=True)
while True:
    {doing}
"""
DOING = [
    "time.sleep(60)",
    "pass",
    "child.wait()",
    "re = __import__('re'); re.match('(a+)+b', 'a' * 40)",
]


class Attached:
    """A process attached to a kill pipe, and a child that it has started."""

    def __init__(self, pipe: KillPipe, doing: str = "time.sleep(60)") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(doing=doing), str(pipe.read_end)],
            pass_fds=[pipe.read_end],
            stdout=subprocess.PIPE,
        )
        os.close(pipe.read_end)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.child = int(line) if line else 0

    def await_death(self, eventually: Eventually) -> None:
        assert self.process.wait(5) == -signal.SIGKILL
        assert self.process.stdout is not None
        self.process.stdout.close()
        if self.child:
            eventually(lambda: not is_alive(self.child), 1)


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("doing", DOING)
def test_kill_kills_the_whole_group(eventually: Eventually, doing: str) -> None:
    pipe = KillPipe()
    process = Attached(pipe, doing)
    assert process.process.poll() is None
    pipe.kill()
    process.await_death(eventually)
    pipe.kill()
    pipe.close()


def test_close_kills_the_whole_group(eventually: Eventually) -> None:
    pipe = KillPipe()
    process = Attached(pipe)
    pipe.close()
    process.await_death(eventually)
    pipe.close()
    pipe.kill()


def test_a_process_attached_after_the_kill_dies(eventually: Eventually) -> None:
    pipe = KillPipe()
    pipe.kill()
    process = Attached(pipe)
    process.await_death(eventually)
    pipe.close()


def test_a_process_that_closes_its_read_end_stays_attached(
    eventually: Eventually,
) -> None:
    """The fork server keeps the read end open."""
    pipe = KillPipe()
    copy = os.dup(pipe.read_end)
    process = Attached(pipe, f"os.closerange(3, 64) if {pipe.read_end} else None; time.sleep(60)")
    pipe.kill()
    process.await_death(eventually)
    os.close(copy)
    pipe.close()


HOLDER = """
import os, subprocess, sys, time
from tests.unit.test_kill_pipe import Attached
from flask_asyncroute.executors.process.kill_pipe import KillPipe
pipe = KillPipe()
process = Attached(pipe)
if os.fork() == 0:  # a forked copy of the holder must not keep the group alive
    time.sleep(60)
print(process.process.pid, process.child, flush=True)
time.sleep(60)
"""


def test_the_group_dies_with_the_holder(eventually: Eventually) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, start_new_session=True
    )
    assert holder.stdout is not None
    pids = [int(pid) for pid in holder.stdout.readline().split()]
    assert len(pids) == 2 and all(map(is_alive, pids))
    holder.kill()
    holder.wait()
    eventually(lambda: not any(map(is_alive, pids)), 1)
    os.killpg(holder.pid, signal.SIGKILL)
    holder.stdout.close()
