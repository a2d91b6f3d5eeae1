"""The SQLite file: its creation, permissions and version, and errors when it cannot be used."""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from flask import Flask

from flask_asyncroute import AsyncRoute, metadata
from flask_asyncroute.errors import ConfigurationError, StoreUnavailable
from flask_asyncroute.query import NEWEST_FIRST
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.snapshot import Body
from flask_asyncroute.stores.base import Expect, TaskStore
from flask_asyncroute.stores.sql import database as database_module
from flask_asyncroute.stores.sql import sqlite
from flask_asyncroute.stores.sql.database import LOG_AGAIN_SECONDS, Cursor
from flask_asyncroute.stores.sql.migrations import VERSION
from flask_asyncroute.stores.sql.sqlite import SQLiteDatabase
from flask_asyncroute.stores.sql.store import SQLTaskStore
from flask_asyncroute.task import AsyncRouteTask, State
from tests.support.databases import new_sqlite_store

NewTask = Callable[..., AsyncRouteTask]
NewStore = Callable[..., TaskStore]
T0 = 1_700_000_000_000_000

CREATORS = """
import os, sys
from pathlib import Path
from flask_asyncroute.stores.sql.sqlite import SQLiteDatabase
from flask_asyncroute.stores.sql.store import SQLTaskStore

folder, rounds, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for number in range(rounds):
    start_reader, start_writer = os.pipe()
    for _ in range(count):
        if os.fork() == 0:
            os.close(start_writer)
            os.read(start_reader, 1)
            store = SQLTaskStore(SQLiteDatabase(folder / str(number) / "asyncroute.db"), "test", True)
            try:
                store.open()
                outcome = store.secret().hex()
            except BaseException as error:
                outcome = repr(error)
            os.write(1, f"{number} {outcome}\\n".encode())
            os._exit(0)
    os.close(start_reader)
    os.close(start_writer)
    for _ in range(count):
        os.wait()
"""


WORKERS = """
import sys, threading
from pathlib import Path
sys.path.insert(0, ".")
from flask_asyncroute.errors import StoreUnavailable
from flask_asyncroute.query import NEWEST_FIRST
from tests.support.databases import new_sqlite_store
from tests.support.tasks import new_task

store = new_sqlite_store(Path(sys.argv[1]))
store.open()
pause = threading.Event()

def work(number):
    done = 0
    while True:
        done += 1
        name = f"{sys.argv[2]}-{number}-{done}"
        try:
            store.add(new_task(name), b"", None, ())
            store.claim(name, "me", 1_700_000_000_000_000)
            store.query((), NEWEST_FIRST, 5, None, None)
        except StoreUnavailable:
            return
        pause.wait(0.005)

threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
store.close()
print("refused")
"""


READ_ONLY = """
import sys
from pathlib import Path
sys.path.insert(0, ".")
from flask_asyncroute.errors import StoreUnavailable
from flask_asyncroute.stores.sql.sqlite import SQLiteDatabase
from flask_asyncroute.stores.sql.store import SQLTaskStore
from tests.support.tasks import new_task
import os, logging, urllib.request  # pathlib imports it lazily
logging.basicConfig()
os.setuid(65534)

store = SQLTaskStore(SQLiteDatabase(Path(sys.argv[1])), "test", True)
store.open()
print(store.get("before").state)
try:
    store.add(new_task("after"), b"", None, ())
except StoreUnavailable as error:
    print(error.status)
"""


@pytest.fixture(autouse=True)
def every_error_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log an error each time, because tests check the message of each call."""
    monkeypatch.setattr(database_module, "LOG_AGAIN_SECONDS", 0.0)


@pytest.fixture
def store(make_sqlite_store: NewStore) -> TaskStore:
    made = make_sqlite_store()
    made.open()
    return made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the time to wait for other processes."""
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.1)


@pytest.fixture
def locked(sqlite_path: Path) -> Iterator[Callable[[], sqlite3.Connection]]:
    """Return a function that takes the write lock of the file, as another process does, until its
    connection is closed.
    """
    taken = []

    def take() -> sqlite3.Connection:
        connection = sqlite3.connect(sqlite_path, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        taken.append(connection)
        return connection

    yield take
    for connection in taken:
        connection.close()


def test_the_file_is_created_when_the_store_is_opened(
    make_sqlite_store: NewStore, sqlite_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = make_sqlite_store()
    assert not sqlite_path.parent.exists()
    store.open()
    assert sqlite_path.exists()
    make_sqlite_store().open()
    message = f"Created the store file {sqlite_path}."
    assert [record.message for record in caplog.records].count(message) == 1


def test_the_file_is_readable_only_by_its_owner(
    store: TaskStore, sqlite_path: Path, make_task: NewTask
) -> None:
    """Also its write-ahead log, which contains the same data."""
    store.add(make_task(), b"", None, ())
    files = sorted(sqlite_path.parent.iterdir())
    assert [file.name for file in files] == [
        "asyncroute.db",
        "asyncroute.db-shm",
        "asyncroute.db-wal",
    ]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600] * 3


def test_the_umask_does_not_affect_the_mode_of_the_file(
    make_sqlite_store: NewStore, sqlite_path: Path
) -> None:
    before = os.umask(0)
    try:
        make_sqlite_store().open()
    finally:
        os.umask(before)
    assert stat.S_IMODE(sqlite_path.stat().st_mode) == 0o600


def test_an_existing_file_keeps_its_mode(make_sqlite_store: NewStore, sqlite_path: Path) -> None:
    sqlite_path.parent.mkdir()
    sqlite_path.touch(0o640)
    make_sqlite_store().open()
    assert stat.S_IMODE(sqlite_path.stat().st_mode) == 0o640


def test_the_tables_and_indexes_match_the_metadata(store: TaskStore, sqlite_path: Path) -> None:
    connection = sqlite3.connect(sqlite_path)
    try:
        rows = connection.execute(
            "SELECT type, name FROM sqlite_master WHERE sql IS NOT NULL"
        ).fetchall()
        version = connection.execute("SELECT version FROM asyncroute_schema").fetchall()
        mode = connection.execute("PRAGMA journal_mode").fetchone()
    finally:
        connection.close()
    assert {name for kind, name in rows if kind == "table"} == set(metadata.tables)
    indexes = {str(index.name) for table in metadata.tables.values() for index in table.indexes}
    assert {name for kind, name in rows if kind == "index"} == indexes
    assert version == [(VERSION,)]
    assert mode == ("wal",)


def test_without_create_tables_no_table_is_created(
    make_sqlite_store: NewStore, sqlite_path: Path
) -> None:
    store = make_sqlite_store(create_tables=False)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="ASYNCROUTE_CREATE_TABLES"):
            store.open()
    connection = sqlite3.connect(sqlite_path)
    assert connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    connection.close()
    # Once the tables exist, the same store object works.
    make_sqlite_store().open()
    store.open()
    assert store.get("task") is None


def test_other_tables_in_the_file_are_not_changed(
    make_sqlite_store: NewStore, sqlite_path: Path
) -> None:
    sqlite_path.parent.mkdir()
    connection = sqlite3.connect(sqlite_path)
    connection.execute("CREATE TABLE mine (x)")
    connection.execute("INSERT INTO mine VALUES (1)")
    connection.commit()
    make_sqlite_store().open()
    assert connection.execute("SELECT x FROM mine").fetchall() == [(1,)]
    connection.close()


def test_sixteen_threads_create_the_tables_once(make_sqlite_store: NewStore) -> None:
    stores = [make_sqlite_store() for _ in range(16)]
    barrier = threading.Barrier(len(stores))
    errors: list[BaseException] = []

    def make(store: TaskStore) -> None:
        try:
            barrier.wait(10)
            store.open()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=make, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    assert len({store.secret() for store in stores}) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sixteen_processes_create_the_tables_once(tmp_path: Path) -> None:
    """As workers that start together on a new machine. None may fail with 503."""
    rounds, count = 12, 16
    ended = subprocess.run(
        [sys.executable, "-c", CREATORS, str(tmp_path), str(rounds), str(count)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    by_round: dict[str, list[str]] = {}
    for line in ended.stdout.splitlines():
        number, secret = line.split(" ", 1)
        by_round.setdefault(number, []).append(secret)
    assert {number: len(secrets) for number, secrets in by_round.items()} == {
        str(n): count for n in range(rounds)
    }
    assert {number: len(set(secrets)) for number, secrets in by_round.items()} == {
        str(n): 1 for n in range(rounds)
    }, by_round
    assert ended.stderr == ""


@pytest.mark.covers("F21")
@pytest.mark.parametrize("location", ["folder", "under a file", "no such file system"])
def test_a_path_that_cannot_be_written_is_unavailable(
    tmp_path: Path, location: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = {
        "folder": tmp_path,
        "under a file": tmp_path / "file" / "asyncroute.db",
        "no such file system": Path("/proc/asyncroute/asyncroute.db"),
    }[location]
    (tmp_path / "file").write_text("")
    store = SQLTaskStore(SQLiteDatabase(path), "test", True)
    with pytest.raises(StoreUnavailable) as refused:
        store.open()
    assert refused.value.status == 503
    assert refused.value.retry_after is not None
    assert "ASYNCROUTE_STORE" in caplog.text
    assert str(path) in caplog.text
    assert str(path) not in refused.value.detail, "paths belong in the log only"


@pytest.mark.covers("F21")
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everything"
)
def test_a_file_without_write_permission_is_unavailable(
    store: TaskStore,
    make_sqlite_store: NewStore,
    sqlite_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store.close()
    sqlite_path.chmod(0o400)
    with pytest.raises(StoreUnavailable):
        make_sqlite_store("another").open()
    assert "ASYNCROUTE_STORE" in caplog.text


@pytest.mark.covers("F21")
def test_a_file_that_becomes_read_only_is_unavailable_for_writes(
    store: TaskStore,
    make_task: NewTask,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every write fails and is logged. Reads work. Writes work again once the file is writable."""
    store.add(make_task("before"), b"", None, ())
    connect = SQLiteDatabase.connect

    def read_only(database: SQLiteDatabase) -> sqlite3.Connection:
        connection = connect(database)
        connection.execute("PRAGMA query_only=ON")
        return connection

    with monkeypatch.context() as patched:
        patched.setattr(SQLiteDatabase, "connect", read_only)
        store.close()
        writes: list[Callable[[], object]] = [
            lambda: store.add(make_task("after"), b"", None, ()),
            lambda: store.claim("before", "me", T0),
            lambda: store.update("before", Expect(tuple(State)), {"error": "x"}),
            lambda: store.delete("before", Expect(tuple(State))),
            lambda: store.write_value("k", b"1", None),
        ]
        for write in writes:
            caplog.clear()
            with pytest.raises(StoreUnavailable):
                write()
            assert "readonly" in caplog.text and "ASYNCROUTE_STORE" in caplog.text
        before = store.get("before")
        assert before is not None and before.state is State.NOT_STARTED and before.error is None
        store.close()
    store.add(make_task("after"), b"", None, ())
    assert {task.id for task in store.query((), NEWEST_FIRST, 9, None, None)} == {"before", "after"}


@pytest.mark.covers("F21")
@pytest.mark.parametrize(
    "content", [b"this is no database, but it is long enough to be one" * 100, b"\x00" * 4096]
)
def test_a_corrupt_file_is_unavailable(
    make_sqlite_store: NewStore, sqlite_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    sqlite_path.parent.mkdir()
    sqlite_path.write_bytes(content)
    store = make_sqlite_store()
    for _ in range(2):
        caplog.clear()
        with pytest.raises(StoreUnavailable):
            store.open()
        assert "ASYNCROUTE_STORE" in caplog.text
    assert sqlite_path.read_bytes() == content, "a file that is not a store is not changed"


@pytest.mark.covers("F21")
def test_a_file_that_becomes_corrupt_is_unavailable(
    store: TaskStore,
    make_task: NewTask,
    make_sqlite_store: NewStore,
    sqlite_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for number in range(50):
        store.add(make_task(f"t{number}", error="x" * 500), b"", None, ())
    store.close()
    size = sqlite_path.stat().st_size
    with open(sqlite_path, "r+b") as file:
        file.seek(4096)
        file.write(b"\xaa" * (size - 4096))
    other = make_sqlite_store()
    calls: list[Callable[[], object]] = [
        lambda: other.open(),
        lambda: store.get("t1"),
        lambda: store.query((), NEWEST_FIRST, 9, None, None),
        lambda: store.add(make_task("new"), b"", None, ()),
        lambda: store.changes_since(0),
        lambda: store.waiting({"work": 9}, 2 * T0),
    ]
    for call in calls:
        caplog.clear()
        with pytest.raises(StoreUnavailable):
            call()
        assert "ASYNCROUTE_STORE" in caplog.text


@pytest.mark.covers("F21")
def test_an_error_of_the_polling_connection_is_unavailable(
    store: TaskStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A poll retries once. The next poll opens another connection."""

    class Broken:
        def execute(self, statement: str, values: object = ()) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        def close(self) -> None:
            pass

    assert isinstance(store, SQLTaskStore)
    store.changes_since(-1)
    store.close()
    monkeypatch.setattr(store._database, "_readers", [Broken(), Broken()])
    with pytest.raises(StoreUnavailable):
        store.changes_since(0)
    assert "disk I/O error" in caplog.text and "ASYNCROUTE_STORE" in caplog.text
    assert store.newest() == 0


# A file that is deleted or replaced while it is used


def remove_file(path: Path, with_log: bool = True) -> None:
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm")[: 3 if with_log else 1]:
        path.with_name(name).unlink(missing_ok=True)


def put_backup(path: Path, make_task: NewTask) -> None:
    """Replace the file by another with one task, as an operator who forgets to stop the app."""
    backup = path.with_name("backup.db")
    other = new_sqlite_store(backup)
    other.open()
    other.add(make_task("kept"), b"", None, ())
    other.close()
    remove_file(path)
    backup.rename(path)


def is_refused(store: TaskStore) -> bool:
    try:
        store.get("any")
    except StoreUnavailable:
        return True
    return False


@pytest.mark.covers("F21")
@pytest.mark.parametrize("how", ["deleted", "deleted alone", "replaced"])
def test_a_deleted_or_replaced_file_is_refused_until_the_restart(
    make_sqlite_store: NewStore,
    make_task: NewTask,
    sqlite_path: Path,
    eventually: Callable[..., object],
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    store = make_sqlite_store()
    assert isinstance(store, SQLTaskStore)
    store.open()
    store.add(make_task(), b"", None, ())
    store.changes_since(0)
    store.workers.beat("me")
    if how == "replaced":
        put_backup(sqlite_path, make_task)
    else:
        remove_file(sqlite_path, with_log=how == "deleted")
    content = sqlite_path.read_bytes() if sqlite_path.exists() else None
    eventually(lambda: is_refused(store), 1.0)
    anything = Expect(tuple(State))
    calls: list[Callable[[], object]] = [
        lambda: store.get("task"),
        lambda: store.add(make_task("new"), b"", None, ()),
        lambda: store.claim("task", "me", T0),
        lambda: store.update("task", anything, {"error": "x"}),
        lambda: store.delete("task", anything),
        lambda: store.query((), NEWEST_FIRST, 9, None, None),
        lambda: store.changes_since(0),
        lambda: store.read_value("key"),
        lambda: store.write_value("key", b"1", None),
        lambda: store.outbox.claim("me", T0, 9),
        lambda: store.workers.beat("me"),
        lambda: store.maintain(),
    ]
    for call in calls * 2:
        with pytest.raises(StoreUnavailable) as refused:
            call()
        assert refused.value.retry_after is not None
    store.close()
    assert is_refused(store), "close() does not count as a restart"
    records = [record for record in caplog.records if "Restart the app" in record.message]
    assert [record.levelname for record in records] == ["ERROR"], "it is logged once"
    assert f"{sqlite_path} was deleted or replaced" in records[0].message
    now = sqlite_path.read_bytes() if sqlite_path.exists() else None
    assert now == content, "the new file is not changed"
    restarted = make_sqlite_store()
    restarted.open()
    assert (restarted.get("kept") is not None) is (how == "replaced")


@pytest.mark.covers("F21")
@pytest.mark.parametrize("with_log", [True, False])
def test_a_new_file_is_not_affected_by_a_process_with_the_deleted_file(
    make_sqlite_store: NewStore, make_task: NewTask, sqlite_path: Path, with_log: bool
) -> None:
    """Even if the old log, which that process has open, still exists."""
    old = make_sqlite_store()
    old.open()
    for number in range(50):
        old.add(make_task(f"old-{number}", error="x" * 500), b"", None, ())
    remove_file(sqlite_path, with_log)
    new = make_sqlite_store()
    new.open()
    for number in range(50):
        new.add(make_task(f"new-{number}"), b"", None, ())
    old.close()
    assert len(new.query((), NEWEST_FIRST, 99, None, None)) == 50
    new.close()
    with closing(sqlite3.connect(sqlite_path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("SELECT count(*) FROM asyncroute_tasks").fetchone() == (50,)


@pytest.mark.covers("F21")
def test_the_file_is_checked_twice_a_second_at_most(
    store: TaskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[Path] = []
    identity = sqlite._identity
    monkeypatch.setattr(sqlite, "_identity", lambda path: checks.append(path) or identity(path))
    began = time.monotonic()
    for _ in range(1000):
        store.get("any")
    assert len(checks) <= 1 + (time.monotonic() - began) / sqlite.CHECK_SECONDS


@pytest.mark.covers("F21")
def test_running_processes_refuse_a_deleted_or_replaced_file(
    sqlite_path: Path, make_task: NewTask, eventually: Callable[..., object]
) -> None:
    """Each process refuses requests. Processes that start later use a file that stays intact."""

    def start(number: int) -> list[subprocess.Popen[str]]:
        return [
            subprocess.Popen(
                [sys.executable, "-c", WORKERS, str(sqlite_path), f"{number}-{worker}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for worker in range(2)
        ]

    def are_working(number: int) -> bool:
        try:
            with closing(sqlite3.connect(f"file:{sqlite_path}?mode=ro", uri=True)) as connection:
                found = connection.execute(
                    "SELECT DISTINCT substr(id, 1, 4) FROM asyncroute_tasks WHERE id LIKE ?",
                    (f"{number}-%-9",),
                )
                return len(found.fetchall()) == 2
        except sqlite3.OperationalError:
            return False

    workers: list[subprocess.Popen[str]] = []
    try:
        for number in range(3):
            workers += start(number)
            eventually(lambda number=number: are_working(number), 30, 0.05)
            with closing(sqlite3.connect(f"file:{sqlite_path}?mode=ro", uri=True)) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            if number == 2:
                put_backup(sqlite_path, make_task)
            else:
                remove_file(sqlite_path, with_log=number == 1)
        results = [worker.communicate(timeout=30) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert [worker.returncode for worker in workers] == [0] * 6, results
    for output, log in results:
        assert output == "refused\n"
        assert log.count("Restart the app") == 1, log
    with closing(sqlite3.connect(sqlite_path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("SELECT id FROM asyncroute_tasks").fetchall() == [("kept",)]


@pytest.mark.covers("F21")
def test_a_file_replaced_while_a_connection_is_opened_is_refused(
    store: TaskStore,
    sqlite_path: Path,
    eventually: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That connection could use the log of the new file."""
    assert isinstance(store, SQLTaskStore)
    wait_until_free = sqlite._wait_until_free

    def replaced_meanwhile(attempt: Callable[[], object]) -> None:
        remove_file(sqlite_path)
        sqlite_path.touch(0o600)
        wait_until_free(attempt)

    monkeypatch.setattr(sqlite, "_wait_until_free", replaced_meanwhile)
    with pytest.raises(StoreUnavailable):
        store._database.connect()
    assert sqlite_path.read_bytes() == b""
    eventually(lambda: is_refused(store), 1.0)


@pytest.mark.covers("F21")
def test_a_symbolic_link_to_the_file(
    tmp_path: Path, make_task: NewTask, eventually: Callable[..., object]
) -> None:
    """The target need not exist yet. Deletion of the target is detected."""
    (tmp_path / "data").mkdir()
    (tmp_path / "app").mkdir()
    link, file = tmp_path / "app" / "there.db", tmp_path / "data" / "real.db"
    link.symlink_to(file)
    store = new_sqlite_store(link)
    store.open()
    store.add(make_task(), b"", None, ())
    assert file.exists() and link.is_symlink()
    assert [path.name for path in link.parent.iterdir()] == [link.name], (
        "the log is next to the target"
    )
    remove_file(file)
    eventually(lambda: is_refused(store), 1.0)
    store.close()


@pytest.mark.covers("F36")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_while_the_file_is_created_does_not_keep_the_lock(sqlite_path: Path) -> None:
    """The child inherits the descriptor of the folder lock."""
    sqlite_path.parent.mkdir()
    with sqlite._creation_lock(sqlite_path.parent):
        read_end, write_end = os.pipe()
        copy = os.fork()
        if copy == 0:
            os.close(write_end)
            os.read(read_end, 1)
            os._exit(0)
    try:
        with sqlite._creation_lock(sqlite_path.parent):
            pass
    finally:
        os.close(write_end)
        os.close(read_end)
        os.waitpid(copy, 0)


@pytest.mark.covers("F21")
@pytest.mark.usefixtures("impatient")
def test_a_folder_that_stays_locked_is_unavailable(
    make_sqlite_store: NewStore, sqlite_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sqlite_path.parent.mkdir()
    store = make_sqlite_store()
    with sqlite._creation_lock(sqlite_path.parent), pytest.raises(StoreUnavailable):
        store.open()
    assert "Find the program that locks the file" in caplog.text
    store.open()


@pytest.mark.covers("F21")
@pytest.mark.skipif(not hasattr(os, "setuid") or os.geteuid() != 0, reason="changes the user")
def test_a_read_only_file_serves_reads(
    store: TaskStore, make_task: NewTask, sqlite_path: Path, tmp_path: Path
) -> None:
    """In a new process of a user who may not write, reads succeed and writes fail."""
    store.add(make_task("before"), b"", None, ())
    for folder in (sqlite_path.parent, *sqlite_path.parent.parents):
        if folder.stat().st_mode & 0o055 != 0o055 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    for found in sqlite_path.parent.iterdir():
        found.chmod(0o644)
    ended = subprocess.run(
        [sys.executable, "-c", READ_ONLY, str(sqlite_path)],
        capture_output=True, text=True, timeout=60, check=True, cwd=Path(__file__).parent.parent.parent,
    )  # fmt: skip
    assert ended.stdout.splitlines() == ["NotStarted", "503"]
    assert "read and write access" in ended.stderr


@pytest.mark.covers("F19")
@pytest.mark.usefixtures("impatient")
def test_a_locked_file_is_unavailable_only_for_writes(
    make_sqlite_store: NewStore,
    make_task: NewTask,
    locked: Callable[[], sqlite3.Connection],
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = make_sqlite_store()
    store.open()
    store.add(make_task("before"), b"", None, ())
    holder = locked()
    for _ in range(2):
        with pytest.raises(StoreUnavailable) as refused:
            store.add(make_task("after"), b"", None, ())
        assert refused.value.retry_after is not None
    assert "locked" in caplog.text and "ASYNCROUTE_STORE" in caplog.text
    assert store.get("before") is not None
    assert store.get("after") is None
    assert len(store.query((), NEWEST_FIRST, 9, None, None)) == 1
    store.maintain()
    holder.execute("ROLLBACK")
    store.add(make_task("after"), b"", None, ())
    assert store.get("after") is not None


@pytest.mark.covers("F19")
def test_a_write_waits_for_the_lock_of_another_process(
    store: TaskStore, make_task: NewTask, locked: Callable[[], sqlite3.Connection]
) -> None:
    holder = locked()
    added = threading.Event()

    def add() -> None:
        store.add(make_task(), b"", None, ())
        added.set()

    thread = threading.Thread(target=add)
    thread.start()
    assert not added.wait(0.1)
    holder.execute("COMMIT")
    assert added.wait(5)
    thread.join(5)


@pytest.mark.covers("F21")
def test_a_full_disk_is_unavailable_and_loses_nothing(
    store: TaskStore,
    make_task: NewTask,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Large writes fail completely and reads work. Once there is space again, all writes work."""
    store.add(make_task("before", created_us=T0), b"", None, ())
    connect = SQLiteDatabase.connect
    connection = sqlite3.connect(f"file:{store._database.path}?mode=ro", uri=True)  # type: ignore[attr-defined]
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.close()

    def nearly_full(database: SQLiteDatabase) -> sqlite3.Connection:
        connection = connect(database)
        connection.execute(f"PRAGMA max_page_count={pages + 10}")
        return connection

    change = store.newest()
    big = Body([b"x" * 200_000])
    with monkeypatch.context() as patched:
        patched.setattr(SQLiteDatabase, "connect", nearly_full)
        store.close()
        with pytest.raises(StoreUnavailable):
            store.add(make_task("big", body_size=200_000), b"", big, [("groups", "g")])
        assert "full" in caplog.text and "ASYNCROUTE_STORE" in caplog.text
        assert "Free space on its disk" in caplog.text
        assert store.get("big") is None
        assert store.newest() == change, "the failed write was rolled back"
        store.add(make_task("small"), b"", None, ())
        assert store.claim("small", "me", T0) is not None
        ended = {"state": State.COMPLETED, "completed_us": T0, "result_json": b"x" * 200_000}
        with pytest.raises(StoreUnavailable):
            store.update("small", Expect((State.RUNNING,), "me", 1), ended)
        small = store.get("small")
        assert small is not None and small.state is State.RUNNING
        assert [task.id for task in store.query((), NEWEST_FIRST, 9, None, None)] == [
            "small",
            "before",
        ]
        store.close()
    assert store.update("small", Expect((State.RUNNING,), "me", 1), ended) is not None
    store.add(make_task("big", body_size=200_000), b"", big, [("groups", "g")])
    body = store.body("big")
    assert body.size == 200_000
    body.close()


def test_an_error_during_a_write_rolls_it_back(store: TaskStore, make_task: NewTask) -> None:
    class Broken(Body):
        def pieces(self) -> Iterator[bytes]:
            yield b"first"
            raise OSError("the temporary file is gone")

    broken = Broken([b"data"])
    with pytest.raises(OSError, match="temporary"):
        store.add(make_task(body_size=4), b"", broken, [("groups", "g")])
    broken.close()
    assert store.get("task") is None
    store.add(make_task(), b"", None, ())
    assert store.newest() == 1


class Holders:
    """Threads that each hold a read connection until ``release`` is set.

    :param count: how many threads; may exceed the number of connections.
    """

    def __init__(self, database: SQLiteDatabase, count: int) -> None:
        self.release = threading.Event()
        self.errors: list[Exception] = []
        self.inside: list[Cursor] = []
        self.peak = 0
        self._threads = [
            threading.Thread(target=self._hold, args=(database,)) for _ in range(count)
        ]

    def __enter__(self) -> Holders:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.release.set()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()

    def _hold(self, database: SQLiteDatabase) -> None:
        def work(cursor: Cursor) -> None:
            self.inside.append(cursor)
            self.peak = max(self.peak, len(self.inside))
            self.release.wait(20)
            self.inside.remove(cursor)

        try:
            database.read(work)
        except Exception as error:
            self.errors.append(error)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[sqlite3.Connection]:
    """Return the list of all connections opened during the test."""
    made: list[sqlite3.Connection] = []
    connect = SQLiteDatabase.connect

    def counted(database: SQLiteDatabase) -> sqlite3.Connection:
        made.append(connect(database))
        return made[-1]

    monkeypatch.setattr(SQLiteDatabase, "connect", counted)
    return made


@pytest.fixture
def database(sqlite_path: Path) -> Iterator[SQLiteDatabase]:
    made = SQLiteDatabase(sqlite_path)
    yield made
    made.close()


def read_one(database: SQLiteDatabase) -> object:
    return database.fetch_one("SELECT 1", {})[0]


def test_reads_wait_for_one_of_a_limited_number_of_connections(
    database: SQLiteDatabase,
    opened: list[sqlite3.Connection],
    eventually: Callable[..., object],
) -> None:
    with Holders(database, 5 * sqlite.READERS) as holders:
        eventually(lambda: len(holders.inside) == sqlite.READERS)
    assert holders.errors == []
    assert holders.peak == len(opened) == sqlite.READERS


def test_sequential_reads_share_a_connection(
    database: SQLiteDatabase, opened: list[sqlite3.Connection]
) -> None:
    for _ in range(2 * sqlite.READERS):
        assert read_one(database) == 1
    assert len(opened) == 1


@pytest.mark.covers("F19")
@pytest.mark.usefixtures("impatient")
def test_a_read_that_waits_too_long_for_a_connection_is_unavailable(
    database: SQLiteDatabase, eventually: Callable[..., object], caplog: pytest.LogCaptureFixture
) -> None:
    """Writes do not wait."""
    with Holders(database, sqlite.READERS) as holders:
        eventually(lambda: len(holders.inside) == sqlite.READERS)
        with pytest.raises(StoreUnavailable):
            read_one(database)
        assert "read connections of this process stayed in use" in caplog.text
        assert database.write_one("SELECT 2", {})[0] == 2
    assert read_one(database) == 1


def test_a_slot_goes_to_the_thread_that_has_waited_longest(
    eventually: Callable[..., object],
) -> None:
    """With an unfair semaphore, threads that read continuously starve others."""
    slots = sqlite._FairSemaphore(1)
    assert slots.acquire(0)
    taken: list[int] = []

    def wait(number: int) -> None:
        assert slots.acquire(20)
        taken.append(number)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(3)]
    for number, thread in enumerate(threads):
        thread.start()
        eventually(lambda number=number: len(slots._waiting) == number + 1)
    assert not slots.acquire(0.001), "a thread that gives up leaves the queue"
    for number in range(3):
        slots.release()
        assert not slots.acquire(0), "the released slot belongs to the next waiting thread"
        threads[number].join(20)
    slots.release()
    assert taken == [0, 1, 2] and slots.acquire(0)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("error", [sqlite3.OperationalError, ValueError, KeyboardInterrupt])
def test_a_failed_read_releases_its_slot(
    database: SQLiteDatabase, error: type[BaseException]
) -> None:
    def fail(cursor: Cursor) -> None:
        raise error

    for _ in range(2 * sqlite.READERS):
        with pytest.raises(StoreUnavailable if error is sqlite3.OperationalError else error):
            database.read(fail)
    assert read_one(database) == 1


@pytest.mark.usefixtures("impatient")
def test_a_failed_connection_attempt_releases_its_slot(
    database: SQLiteDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError

    with monkeypatch.context() as patched:
        patched.setattr(sqlite, "_identity", refuse)
        for _ in range(2 * sqlite.READERS):
            with pytest.raises(StoreUnavailable):
                read_one(database)
    assert read_one(database) == 1


def test_close_does_not_affect_reads_in_progress(
    database: SQLiteDatabase,
    opened: list[sqlite3.Connection],
    eventually: Callable[..., object],
) -> None:
    with Holders(database, 2 * sqlite.READERS) as holders:
        eventually(lambda: len(holders.inside) == sqlite.READERS)
        database.close()
    assert holders.errors == []
    assert len(opened) == sqlite.READERS
    database.close()
    assert read_one(database) == 1


@pytest.mark.covers("F36")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_while_all_connections_are_in_use_can_read(
    make_app: Callable[..., Flask], eventually: Callable[..., object]
) -> None:
    app = make_app(ASYNCROUTE_STORE="sqlite:///asyncroute.db")
    async_routes = AsyncRoute(app)
    with app.app_context():
        assert not async_routes.exists("any")
    store = runtime_of(app).runner.store
    assert isinstance(store, SQLTaskStore) and isinstance(store._database, SQLiteDatabase)
    with Holders(store._database, sqlite.READERS) as holders:
        eventually(lambda: len(holders.inside) == sqlite.READERS)
        child = os.fork()
        if child == 0:
            try:
                with app.app_context():
                    os._exit(42 if not async_routes.exists("any") else 1)
            finally:
                os._exit(2)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 42


GREENLETS = """
from gevent import monkey
monkey.patch_all()
import sys
from pathlib import Path
import gevent
from flask_asyncroute.stores.sql.sqlite import READERS, SQLiteDatabase

database, inside, peak = SQLiteDatabase(Path(sys.argv[1])), set(), []

def work(cursor):
    inside.add(cursor)
    peak.append(len(inside))
    gevent.sleep(0.01)
    inside.remove(cursor)
    return cursor.execute("SELECT 1").fetchone()[0]

jobs = [gevent.spawn(database.read, work) for _ in range(5 * READERS)]
gevent.joinall(jobs, timeout=20)
print(sum(job.value for job in jobs) == 5 * READERS, max(peak) == READERS)
"""


def test_greenlets_wait_for_a_connection_without_blocking_the_others(sqlite_path: Path) -> None:
    pytest.importorskip("gevent")
    ended = subprocess.run(
        [sys.executable, "-c", GREENLETS, str(sqlite_path)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert ended.stdout.split() == ["True", "True"], ended.stderr


def test_tend_checkpoints_the_write_ahead_log(
    store: TaskStore, make_task: NewTask, sqlite_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    before = sqlite_path.stat().st_size
    for number in range(100):
        store.add(make_task(f"t{number}", error="x" * 500), b"", None, ())
    assert sqlite_path.stat().st_size == before, "the data is in the log"
    store.maintain()
    assert sqlite_path.stat().st_size > before
    assert caplog.text == ""


@pytest.mark.parametrize("setting", ["OFF", "NORMAL", "FULL", "EXTRA"])
def test_synchronous_is_set_on_every_connection(sqlite_path: Path, setting: str) -> None:
    database = SQLiteDatabase(sqlite_path, setting)
    level = {"OFF": 0, "NORMAL": 1, "FULL": 2, "EXTRA": 3}[setting]

    def level_of(cursor: Cursor) -> object:
        return cursor.execute("PRAGMA synchronous").fetchone()[0]

    assert database.write(level_of) == level
    assert database.read(level_of) == level
    database.close()


def test_a_connection_is_not_reused_after_a_failed_read(sqlite_path: Path) -> None:
    database = SQLiteDatabase(sqlite_path)
    used = []

    def fail(cursor: Cursor) -> None:
        used.append(cursor)
        cursor.execute("SELECT x FROM nothing")

    with pytest.raises(StoreUnavailable):
        database.read(fail)
    assert len(set(map(id, used))) == 2, "the read was retried once, on another connection"
    assert database.read(
        lambda cursor: used.append(cursor) or cursor.execute("SELECT 1").fetchone()[0]
    )
    assert used[2] is not used[1]
    database.close()


def test_an_old_sqlite_is_a_configuration_error(
    sqlite_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 7, 0))
    with pytest.raises(ConfigurationError, match="ASYNCROUTE_STORE"):
        SQLiteDatabase(sqlite_path)


@pytest.mark.covers("A70")
def test_counting_for_a_quota_uses_the_index_of_the_user(
    store: TaskStore, sqlite_path: Path
) -> None:
    assert isinstance(store, SQLTaskStore)
    statement = store._sql.count_unfinished
    connection = sqlite3.connect(sqlite_path)
    plan = connection.execute(
        f"EXPLAIN QUERY PLAN {statement}", {"ns": 1, "user": "anna", "limit": 5}
    )
    steps = " ".join(row[3] for row in plan.fetchall())
    connection.close()
    assert "INDEX asyncroute_task_user (namespace=? AND user=? AND state=?)" in steps


def test_the_same_error_is_logged_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(database_module, "LOG_AGAIN_SECONDS", LOG_AGAIN_SECONDS)
    database = SQLiteDatabase(tmp_path / "store.db")
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    for error in (OSError("a"), OSError("a"), OSError("b"), OSError("b")):
        database.unavailable(error)
    assert caplog.text.count("OSError: a") == caplog.text.count("OSError: b") == 1
    now += LOG_AGAIN_SECONDS
    database.unknown(OSError("b"))
    assert caplog.text.count("OSError: b") == 2
