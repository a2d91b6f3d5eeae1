"""The leash: who is on it dies when it is pulled, let go, or its holder is gone; whatever it is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from flask_asyncroute.executors.leash import Leash

Eventually = Callable[..., Any]

ON_IT = """
import os, subprocess, sys, time
from flask_asyncroute.executors import leash
os.setsid()
leash.put_on(int(sys.argv[1]), -os.getpid())
child = subprocess.Popen(["sleep", "60"])
print(child.pid, flush=True)
while True:
    {doing}
"""
DOING = ["time.sleep(60)", "pass", "child.wait()", "re = __import__('re'); re.match('(a+)+b', 'a' * 40)"]


class Dog:
    """A process on a leash, with one that it has started."""

    def __init__(self, leash: Leash, doing: str = "time.sleep(60)") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_IT.format(doing=doing), str(leash.other_end)],
            pass_fds=[leash.other_end],
            stdout=subprocess.PIPE,
        )
        os.close(leash.other_end)
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
def test_pulling_kills_the_whole_group(eventually: Eventually, doing: str) -> None:
    leash = Leash()
    dog = Dog(leash, doing)
    assert dog.process.poll() is None
    leash.pull()
    dog.await_death(eventually)
    leash.pull()
    leash.close()


def test_letting_go_kills_too(eventually: Eventually) -> None:
    leash = Leash()
    dog = Dog(leash)
    leash.close()
    dog.await_death(eventually)
    leash.close()
    leash.pull()


def test_a_leash_that_was_pulled_before_holds(eventually: Eventually) -> None:
    leash = Leash()
    leash.pull()
    dog = Dog(leash)
    dog.await_death(eventually)
    leash.close()


def test_who_closes_its_end_is_still_on_it_while_somebody_has_it_open(eventually: Eventually) -> None:
    """The fork server has."""
    leash = Leash()
    kept = os.dup(leash.other_end)
    dog = Dog(leash, f"os.closerange(3, 64) if {leash.other_end} else None; time.sleep(60)")
    leash.pull()
    dog.await_death(eventually)
    os.close(kept)
    leash.close()


HOLDER = """
import os, subprocess, sys, time
from tests.unit.test_leash import Dog
from flask_asyncroute.executors.leash import Leash
leash = Leash()
dog = Dog(leash)
if os.fork() == 0:  # a copy of the holder does not hold it
    time.sleep(60)
print(dog.process.pid, dog.child, flush=True)
time.sleep(60)
"""


def test_it_dies_with_its_holder(eventually: Eventually) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, start_new_session=True)
    assert holder.stdout is not None
    pids = [int(pid) for pid in holder.stdout.readline().split()]
    assert len(pids) == 2 and all(map(is_alive, pids))
    holder.kill()
    holder.wait()
    eventually(lambda: not any(map(is_alive, pids)), 1)
    os.killpg(holder.pid, signal.SIGKILL)
    holder.stdout.close()
