"""Process locks, as seen by the process that holds them and by others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flask_asyncroute.workers import process_lock
from flask_asyncroute.workers.process_lock import LockFile, lock_file, new_number

Eventually = Callable[..., Any]
HOLDER = """
import sys, pathlib
from flask_asyncroute.workers.process_lock import lock_file
lock_file(pathlib.Path(sys.argv[1])).hold(int(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "workers"
    for found in (tmp_path / "workers", tmp_path / "link"):
        known = process_lock._files.pop(found, None)
        if known is not None:
            os.close(known.descriptor)


@pytest.fixture
def other(path: Path) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    """Return ``other(number)``, which starts a process that holds the lock of this number."""
    made: list[subprocess.Popen[str]] = []

    def start(number: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(path), str(number)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        made.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in made:
        process.kill()
        process.communicate()


def opened(path: Path) -> LockFile:
    found = lock_file(path)
    assert found is not None
    return found


def test_a_process_opens_a_path_once(path: Path) -> None:
    assert opened(path) is opened(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(opened(path).name) <= 64


def test_a_copy_of_the_file_has_another_name(path: Path, tmp_path: Path) -> None:
    """Such as in a container or machine created from an image that contains the file."""
    name = opened(path).name
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    found = process_lock._open(copy)
    assert found.name != name
    os.close(found.descriptor)


def test_hold_and_release(path: Path) -> None:
    file = opened(path)
    number = new_number()
    assert not file.is_held(number)
    file.hold(number)
    file.hold(number)
    assert file.is_held(number)
    assert file.is_held(number), "checking does not release it"
    file.release(number)
    assert not file.is_held(number)


def test_a_killed_process_releases_its_locks(
    path: Path, other: Any, eventually: Eventually
) -> None:
    number = new_number()
    process = other(number)
    file = opened(path)
    assert file.is_held(number)
    assert not file.is_held(number + 1)
    process.send_signal(signal.SIGSTOP)
    assert file.is_held(number), "a suspended process is alive"
    process.kill()
    eventually(lambda: not file.is_held(number), 1)


def test_checking_other_locks_releases_none(path: Path, other: Any) -> None:
    """If this process closed any descriptor of the file, it would lose all its locks on it."""
    mine = new_number()
    opened(path).hold(mine)
    theirs = new_number()
    other(theirs)
    for _ in range(3):
        assert opened(path).is_held(theirs)
    command = [sys.executable, "-c", HOLDER, str(path), str(mine)]
    refused = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    assert "BlockingIOError" in refused.stderr


def test_a_forked_child_does_not_hold_the_locks_of_its_parent(
    path: Path, eventually: Eventually
) -> None:
    file = opened(path)
    number = new_number()
    file.hold(number)
    child = os.fork()
    if child == 0:
        os._exit(0 if not process_lock._files and opened(path).is_held(number) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert file.is_held(number)


def test_processes_that_share_a_file_read_the_same_name(path: Path) -> None:
    script = "import sys, pathlib; from flask_asyncroute.workers.process_lock import lock_file; print(lock_file(pathlib.Path(sys.argv[1])).name)"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    names = {process.communicate()[0].strip() for process in processes}
    assert names == {opened(path).name}


def test_a_file_of_another_user_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(PermissionError, match="not a regular file of this user"):
        lock_file(path)


def test_a_link_or_folder_is_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "target").touch()
    path.symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic link"):
        lock_file(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=r"directory"):
        lock_file(path)
    path.rmdir()


def test_a_reused_pid_is_not_the_same_process(
    path: Path, other: Any, eventually: Eventually
) -> None:
    mine = process_lock.this_process()
    assert len(mine) <= 64
    assert process_lock.is_running(mine) is True
    namespace, pid, began = mine.split("/")
    assert process_lock.is_running(f"{namespace}/{pid}/{int(began) - 1}") is False, (
        "another process had this pid before"
    )
    assert process_lock.is_running(f"pid:[1]/{pid}/{began}") is None
    assert process_lock.is_running("") is None
    process = other(1)
    theirs = f"{namespace}/{process.pid}/{process_lock._state_of(process.pid)[1]}"
    assert process_lock.is_running(theirs) is True
    process.kill()
    eventually(lambda: process_lock.is_running(theirs) is False, 2)
    process.wait()
    assert process_lock.is_running(theirs) is False
