"""The SQLite file itself: made once, for its owner alone, of one version; and what happens when it cannot be used."""

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
from typing import Any

import pytest

from flask_asyncroute import metadata
from flask_asyncroute.errors import ConfigurationError, IdTaken, StoreUnavailable
from flask_asyncroute.query import NEWEST_FIRST
from flask_asyncroute.snapshot import Body
from flask_asyncroute.start_key import StartKey
from flask_asyncroute.states import State
from flask_asyncroute.stores.base import Expect, TaskStore
from flask_asyncroute.stores.sql import file, sqlite
from flask_asyncroute.stores.sql.database import Cursor
from flask_asyncroute.stores.sql.sqlite import SQLiteDatabase
from flask_asyncroute.stores.sql.store import SQLTaskStore
from flask_asyncroute.stores.sql.upgrades import VERSION
from flask_asyncroute.task import AsyncRouteTask
from tests.conftest import new_sqlite_store
from tests.older_schema import OLDER

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
                told = store.secret().hex()
            except BaseException as error:
                told = repr(error)
            os.write(1, f"{number} {told}\\n".encode())
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
from flask_asyncroute.stores.sql import file
from tests.conftest import new_sqlite_store, new_task

file.LOOK_SECONDS = 0.0
store = new_sqlite_store(Path(sys.argv[1]))
is_over = threading.Event()

def work(number):
    done = 0
    while not is_over.is_set():
        done += 1
        name = f"{sys.argv[2]}-{number}-{done}"
        try:
            store.open()
            store.add(new_task(name), b"", None, ())
            store.claim(name, "me", 1_700_000_000_000_000)
            store.query((), NEWEST_FIRST, 5, None, None)
        except StoreUnavailable:
            pass

threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
for thread in threads:
    thread.start()
sys.stdin.read()
is_over.set()
for thread in threads:
    thread.join()
print("over")
"""


READ_ONLY = """
import sys
from pathlib import Path
sys.path.insert(0, ".")
from flask_asyncroute.errors import StoreUnavailable
from flask_asyncroute.stores.sql.sqlite import SQLiteDatabase
from flask_asyncroute.stores.sql.store import SQLTaskStore
from tests.conftest import new_task
import os, logging
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


@pytest.fixture
def store(make_sqlite_store: NewStore) -> TaskStore:
    made = make_sqlite_store()
    made.open()
    return made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for other processes for a moment only."""
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.1)


@pytest.fixture
def locked(sqlite_path: Path) -> Iterator[Callable[[], sqlite3.Connection]]:
    """Give a function that takes the file's write lock as another process does, until the connection is closed."""
    taken = []

    def take() -> sqlite3.Connection:
        connection = sqlite3.connect(sqlite_path, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        taken.append(connection)
        return connection

    yield take
    for connection in taken:
        connection.close()


def test_the_file_is_made_at_first_use(make_sqlite_store: NewStore, sqlite_path: Path) -> None:
    store = make_sqlite_store()
    assert not sqlite_path.parent.exists()
    store.open()
    assert sqlite_path.exists()


def test_the_file_is_for_its_owner_alone(store: TaskStore, sqlite_path: Path, make_task: NewTask) -> None:
    """The log beside it too: it holds the same requests."""
    store.add(make_task(), b"", None, ())
    files = sorted(sqlite_path.parent.iterdir())
    assert [file.name for file in files] == ["asyncroute.db", "asyncroute.db-shm", "asyncroute.db-wal"]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600] * 3


def test_the_file_is_for_its_owner_alone_whatever_the_umask(make_sqlite_store: NewStore, sqlite_path: Path) -> None:
    before = os.umask(0)
    try:
        make_sqlite_store().open()
    finally:
        os.umask(before)
    assert stat.S_IMODE(sqlite_path.stat().st_mode) == 0o600


def test_a_file_that_is_there_keeps_its_mode(make_sqlite_store: NewStore, sqlite_path: Path) -> None:
    sqlite_path.parent.mkdir()
    sqlite_path.touch(0o640)
    make_sqlite_store().open()
    assert stat.S_IMODE(sqlite_path.stat().st_mode) == 0o640


def test_the_tables_are_those_of_the_metadata(store: TaskStore, sqlite_path: Path) -> None:
    with_names = sqlite3.connect(sqlite_path)
    try:
        rows = with_names.execute("SELECT type, name FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        version = with_names.execute("SELECT version FROM asyncroute_schema").fetchall()
        mode = with_names.execute("PRAGMA journal_mode").fetchone()
    finally:
        with_names.close()
    assert {name for kind, name in rows if kind == "table"} == set(metadata.tables)
    indexes = {str(index.name) for table in metadata.tables.values() for index in table.indexes}
    assert {name for kind, name in rows if kind == "index"} == indexes
    assert version == [(VERSION,)]
    assert mode == ("wal",)


def test_tables_of_a_migration_will_do(make_sqlite_store: NewStore, sqlite_path: Path, make_task: NewTask) -> None:
    """As Alembic makes them from the metadata, with the version as the page on migrations says."""
    from sqlalchemy import create_engine, insert

    sqlite_path.parent.mkdir()
    engine = create_engine(f"sqlite:///{sqlite_path}")
    with engine.begin() as connection:
        metadata.create_all(connection)
        connection.execute(insert(metadata.tables["asyncroute_schema"]).values(version=VERSION))
    engine.dispose()
    store = make_sqlite_store(create_tables=False)
    store.open()
    store.add(make_task(), b"", None, ())
    assert store.get("task") is not None


def test_without_create_tables_nothing_is_made(make_sqlite_store: NewStore, sqlite_path: Path) -> None:
    store = make_sqlite_store(create_tables=False)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="ASYNCROUTE_CREATE_TABLES"):
            store.open()
    with_names = sqlite3.connect(sqlite_path)
    assert with_names.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    with_names.close()
    # Once somebody has made them, the same store object will do.
    make_sqlite_store().open()
    store.open()
    assert store.get("task") is None


def set_version(path: Path, version: int | None, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for statement in ("DELETE FROM asyncroute_schema", *statements):
        connection.execute(statement)
    if version is not None:
        connection.execute("INSERT INTO asyncroute_schema VALUES (?)", (version,))
    connection.commit()
    connection.close()


@pytest.mark.parametrize("version", [VERSION + 1, 99])
def test_f43_tables_of_a_newer_version_are_refused(
    store: TaskStore, make_sqlite_store: NewStore, sqlite_path: Path, version: int
) -> None:
    set_version(sqlite_path, version)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=f"ASYNCROUTE_STORE.* version {version}, .* version {VERSION}"):
            make_sqlite_store().open()


def test_f43_tables_of_an_older_version_are_upgraded(
    store: TaskStore, make_sqlite_store: NewStore, make_task: Callable[..., AsyncRouteTask], sqlite_path: Path
) -> None:
    store.add(make_task(), b"", None, ())
    before = store.get("task")
    set_version(
        sqlite_path,
        1,
        *OLDER,
    )
    with pytest.raises(ConfigurationError, match="ASYNCROUTE_CREATE_TABLES"):
        make_sqlite_store(create_tables=False).open()
    upgraded = make_sqlite_store()
    upgraded.open()
    assert upgraded.get("task") == before
    upgraded.add(make_task("another"), b"", None, (), StartKey("k", "f"))
    assert upgraded.delete("another", Expect(tuple(State)))
    connection = sqlite3.connect(sqlite_path)
    assert connection.execute("SELECT version FROM asyncroute_schema").fetchall() == [(VERSION,)]
    connection.close()


def test_tables_that_a_migration_made_get_their_version(
    store: TaskStore, make_sqlite_store: NewStore, sqlite_path: Path
) -> None:
    set_version(sqlite_path, None)
    make_sqlite_store(create_tables=False).open()
    connection = sqlite3.connect(sqlite_path)
    assert connection.execute("SELECT version FROM asyncroute_schema").fetchall() == [(VERSION,)]
    connection.close()


def test_other_tables_in_the_file_are_left_alone(make_sqlite_store: NewStore, sqlite_path: Path) -> None:
    sqlite_path.parent.mkdir()
    connection = sqlite3.connect(sqlite_path)
    connection.execute("CREATE TABLE mine (x)")
    connection.execute("INSERT INTO mine VALUES (1)")
    connection.commit()
    make_sqlite_store().open()
    assert connection.execute("SELECT x FROM mine").fetchall() == [(1,)]
    connection.close()


def test_sixteen_threads_make_the_tables_once(make_sqlite_store: NewStore) -> None:
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
def test_sixteen_processes_make_the_tables_once(tmp_path: Path) -> None:
    """As workers do that boot together on a new machine: none of them may answer 503 for it."""
    rounds, count = 12, 16
    ended = subprocess.run(
        [sys.executable, "-c", CREATORS, str(tmp_path), str(rounds), str(count)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    told: dict[str, list[str]] = {}
    for line in ended.stdout.splitlines():
        number, secret = line.split(" ", 1)
        told.setdefault(number, []).append(secret)
    assert {number: len(secrets) for number, secrets in told.items()} == {str(n): count for n in range(rounds)}
    assert {number: len(set(secrets)) for number, secrets in told.items()} == {str(n): 1 for n in range(rounds)}, told
    assert ended.stderr == ""


@pytest.mark.parametrize("place", ["folder", "under a file", "no such file system"])
def test_f21_a_place_that_cannot_be_written_is_unavailable(
    tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = {
        "folder": tmp_path,
        "under a file": tmp_path / "file" / "asyncroute.db",
        "no such file system": Path("/proc/asyncroute/asyncroute.db"),
    }[place]
    (tmp_path / "file").write_text("")
    store = SQLTaskStore(SQLiteDatabase(path), "test", True)
    with pytest.raises(StoreUnavailable) as refused:
        store.open()
    assert refused.value.status == 503
    assert refused.value.retry_after is not None
    assert "ASYNCROUTE_STORE" in caplog.text
    assert str(path) in caplog.text
    assert str(path) not in refused.value.detail, "paths are for the log"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everything")
def test_f21_a_file_without_write_permission_is_unavailable(
    store: TaskStore, make_sqlite_store: NewStore, sqlite_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.close()
    sqlite_path.chmod(0o400)
    with pytest.raises(StoreUnavailable):
        make_sqlite_store("another").open()
    assert "ASYNCROUTE_STORE" in caplog.text


def test_f21_a_file_that_became_read_only_is_unavailable(
    store: TaskStore, make_task: NewTask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every write says so, reads go on, and once it can be written again it is written."""
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


@pytest.mark.parametrize("content", [b"this is no database, but it is long enough to be one" * 100, b"\x00" * 4096])
def test_f21_a_corrupt_file_is_unavailable(
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
    assert sqlite_path.read_bytes() == content, "what is no store of ours is not touched"


def test_f21_a_file_that_becomes_corrupt_is_unavailable(
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
        lambda: store.news(0),
        lambda: store.waiting({"work": 9}, 2 * T0),
    ]
    for call in calls:
        caplog.clear()
        with pytest.raises(StoreUnavailable):
            call()
        assert "ASYNCROUTE_STORE" in caplog.text


def test_f21_trouble_with_the_watchers_connection_is_unavailable(
    store: TaskStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It asks on a connection of its own, which can fail as any other; the next look has one that works."""

    class Broken:
        def execute(self, statement: str, values: object) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        def close(self) -> None:
            pass

    assert isinstance(store, SQLTaskStore)
    store.news(-1)
    store.close()
    monkeypatch.setattr(store._database._observer, "_connection", Broken())
    with pytest.raises(StoreUnavailable):
        store.news(0)
    assert "disk I/O error" in caplog.text and "ASYNCROUTE_STORE" in caplog.text
    assert store.news(-1).change == 0


# --- another file in its place ----------------------------------------------------------------------------------------


def remove_file(path: Path, beside: bool = True) -> None:
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm")[: 3 if beside else 1]:
        path.with_name(name).unlink(missing_ok=True)  # who makes the file anew may have been quicker


@pytest.mark.parametrize("beside", [True, False])
def test_f21_a_deleted_file_is_noticed_and_made_anew(
    store: TaskStore,
    make_task: NewTask,
    sqlite_path: Path,
    eventually: Callable[..., object],
    caplog: pytest.LogCaptureFixture,
    beside: bool,
) -> None:
    """Also where the files beside it were left, which belong to the one that is gone."""
    caplog.set_level(logging.INFO)
    secret = store.secret()
    for number in range(20):
        store.add(make_task(f"t{number}"), b"", None, [("groups", "g")])
    store.news(0)
    remove_file(sqlite_path, beside)

    def is_noticed() -> bool:
        store.open()
        return store.get("t1") is None

    eventually(is_noticed, 1.0)
    assert sqlite_path.exists()
    assert stat.S_IMODE(sqlite_path.stat().st_mode) == 0o600
    assert f"{sqlite_path}, was deleted or replaced" in caplog.text
    assert f"Made the tables of flask_asyncroute in {sqlite_path}" in caplog.text
    assert store.secret() != secret
    assert store.query((), NEWEST_FIRST, 9, None, None) == []
    store.add(make_task("new"), b"", None, ())
    assert store.claim("new", "me", T0) is not None
    assert [task.id for task in store.news(20).tasks] == ["new"]
    store.tend()
    connection = sqlite3.connect(sqlite_path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert connection.execute("SELECT id FROM asyncroute_tasks").fetchall() == [("new",)]
    connection.close()


def test_f21_a_replaced_file_is_noticed(
    store: TaskStore,
    make_task: NewTask,
    sqlite_path: Path,
    tmp_path: Path,
    eventually: Callable[..., object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As a backup that is restored, here one in which the namespace has another key."""
    store.add(make_task("old"), b"", None, ())
    backup = tmp_path / "backup.db"
    for namespace in ("another", "test"):
        other = SQLTaskStore(SQLiteDatabase(backup), namespace, True)
        other.open()
        other.add(make_task(f"of {namespace}"), b"", None, ())
        other.close()
    remove_file(sqlite_path)
    backup.rename(sqlite_path)

    def is_noticed() -> bool:
        store.tend()
        return store.get("old") is None

    eventually(is_noticed, 1.0)
    assert [task.id for task in store.query((), NEWEST_FIRST, 9, None, None)] == ["of test"]
    assert store.claim("of test", "me", T0) is not None
    assert "was deleted or replaced" in caplog.text


def test_f21_only_one_look_in_half_a_second(store: TaskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(file.StoreFile, "identity", lambda self: looks.append(1) or self.opened)
    for _ in range(1000):
        store.open()
    assert len(looks) <= 1


def test_f21_threads_that_work_while_the_file_is_deleted(
    store: TaskStore, make_task: NewTask, sqlite_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call is served by the old file or the new one, whole, or refused."""
    monkeypatch.setattr(file, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(file.StoreFile, "_look_at", 0.0, raising=False)
    failures: list[BaseException] = []
    refusals: list[BaseException | None] = []
    is_over = threading.Event()

    def work(name: str) -> None:
        number = 0
        while not is_over.is_set():
            number += 1
            try:
                store.open()
                store.add(make_task(f"{name}-{number}"), b"", None, ())
                store.claim(f"{name}-{number}", "me", T0)
                store.query((), NEWEST_FIRST, 5, None, None)
                store.get(f"{name}-{number}")
            except StoreUnavailable as error:
                refusals.append(error.__cause__)
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(f"t{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    seen = set()
    for _ in range(10):
        before = sqlite_path.stat().st_ino
        seen.add(before)
        remove_file(sqlite_path, beside=False)
        pause = threading.Event()
        while not (sqlite_path.exists() and sqlite_path.stat().st_size > 0):
            pause.wait(0.005)
        pause.wait(0.02)
    is_over.set()
    for thread in threads:
        thread.join(20)
    assert failures == []
    assert {type(cause) for cause in refusals} <= {FileNotFoundError, sqlite3.OperationalError}, refusals
    connection = sqlite3.connect(sqlite_path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_f21_processes_that_work_while_the_file_is_deleted_and_replaced(
    sqlite_path: Path, tmp_path: Path, eventually: Callable[..., object]
) -> None:
    """However that is done, no process ends by it, and the last file is whole."""
    command = [sys.executable, "-c", WORKERS, str(sqlite_path)]
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    workers = [subprocess.Popen([*command, str(number)], **pipes) for number in range(3)]

    def is_used() -> bool:
        try:
            with closing(sqlite3.connect(f"file:{sqlite_path}?mode=ro", uri=True)) as connection:
                return connection.execute("SELECT count(*) FROM asyncroute_tasks").fetchone()[0] >= 20
        except sqlite3.OperationalError:
            return False

    try:
        for number in range(40):
            eventually(is_used, 20)
            if number % 3 == 2:
                backup = tmp_path / "backup.db"
                store = new_sqlite_store(backup)
                store.open()
                store.close()
                backup.replace(sqlite_path)
            else:
                remove_file(sqlite_path, beside=number % 3 == 1)
        eventually(is_used, 20)
    finally:
        told = [worker.communicate() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 3
    assert [output for output, _ in told] == ["over\n"] * 3, told
    with closing(sqlite3.connect(sqlite_path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_f21_a_file_deleted_while_a_connection_is_opened_is_not_made_beside_what_is_left_of_it(
    store: TaskStore, make_task: NewTask, sqlite_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite would make one of its own, and take the log of the deleted one for its."""
    store.add(make_task("old"), b"", None, ())
    database = store._database
    identity = file.StoreFile.identity

    def deleted_after(self: file.StoreFile) -> file.Identity:
        found = identity(self)
        remove_file(sqlite_path, beside=False)
        return found

    monkeypatch.setattr(file.StoreFile, "identity", deleted_after)
    with pytest.raises(StoreUnavailable):
        database.connect()
    assert not sqlite_path.exists()
    monkeypatch.undo()
    database._file._look_at = 0.0
    store.open()
    assert store.get("old") is None


def test_f21_nobody_makes_the_file_while_a_connection_to_the_deleted_one_is_opened(
    store: TaskStore, sqlite_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That connection would take the log of the new file for its own. It is given up at once, since all wait for it."""
    monkeypatch.setattr(file, "LOCK_SECONDS", 0.05)
    use_log = sqlite._use_log
    tried = []

    def deleted_meanwhile(connection: sqlite3.Connection) -> None:
        remove_file(sqlite_path, beside=False)
        with pytest.raises(TimeoutError, match="the folder"):
            file.StoreFile(sqlite_path).make()
        tried.append(sqlite_path.exists())
        use_log(connection)

    monkeypatch.setattr(sqlite, "_use_log", deleted_meanwhile)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        store._database.connect()
    assert time.monotonic() - began < sqlite.BUSY_SECONDS / 2
    assert tried == [False]


def test_f21_a_file_put_in_place_while_its_forerunner_is_read(
    store: TaskStore, make_task: NewTask, sqlite_path: Path, tmp_path: Path
) -> None:
    """What the forerunner left beside it goes, since SQLite would cut it short under the reader's hands."""
    backup = tmp_path / "backup.db"
    other = new_sqlite_store(backup)
    other.open()
    other.add(make_task("kept"), b"", None, ())
    other.close()
    for number in range(50):
        store.add(make_task(f"t{number}"), b"", None, ())

    def read(cursor: Cursor) -> list[Any]:
        first = cursor.execute("SELECT id FROM asyncroute_tasks LIMIT 1").fetchall()
        backup.replace(sqlite_path)
        store._database._file._look_at = 0.0
        store.open()
        assert store.get("kept") is not None
        return first + cursor.execute("SELECT id FROM asyncroute_tasks").fetchall()

    assert len(store._database.read(read)) == 51
    store.add(make_task("new"), b"", None, ())
    assert {task.id for task in store.query((), NEWEST_FIRST, 9, None, None)} == {"kept", "new"}
    connection = sqlite3.connect(sqlite_path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_f21_a_file_that_may_not_be_made_anew_is_unavailable(
    make_sqlite_store: NewStore, sqlite_path: Path, caplog: pytest.LogCaptureFixture, eventually: Callable[..., object]
) -> None:
    """Without ASYNCROUTE_CREATE_TABLES a start is an error of the app's setup; what has worked once is out of order."""
    make_sqlite_store().open()
    store = make_sqlite_store(create_tables=False)
    store.open()
    remove_file(sqlite_path)

    def is_refused() -> bool:
        try:
            store.open()
        except StoreUnavailable:
            return True
        return False

    eventually(is_refused, 1.0)
    assert "ASYNCROUTE_CREATE_TABLES" in caplog.text


@pytest.mark.skipif(not hasattr(os, "setuid") or os.geteuid() != 0, reason="changes the user")
def test_f21_a_file_that_may_only_be_read_is_read(
    store: TaskStore, make_task: NewTask, sqlite_path: Path, tmp_path: Path
) -> None:
    """Gets are answered, starts are not: by a process that begins now too."""
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
    assert "readable and writable" in ended.stderr


@pytest.mark.usefixtures("impatient")
def test_f19_a_locked_file_is_unavailable_for_writes_alone(
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
    store.tend()
    holder.execute("ROLLBACK")
    store.add(make_task("after"), b"", None, ())
    assert store.get("after") is not None


def test_f19_a_write_waits_for_another_process(
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


def test_f21_a_full_disk_is_unavailable_and_harms_nothing_else(
    store: TaskStore, make_task: NewTask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It fails starts, ends and removals alike; reads go on, and with room again so does everything."""
    store.add(make_task("before", created_us=T0), b"", None, ())
    connect = SQLiteDatabase.connect
    connection = sqlite3.connect(f"file:{store._database.path}?mode=ro", uri=True)  # type: ignore[attr-defined]
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.close()

    def nearly_full(database: SQLiteDatabase) -> sqlite3.Connection:
        connection = connect(database)
        connection.execute(f"PRAGMA max_page_count={pages + 10}")
        return connection

    change = store.news(-1).change
    big = Body([b"x" * 200_000])
    with monkeypatch.context() as patched:
        patched.setattr(SQLiteDatabase, "connect", nearly_full)
        store.close()
        with pytest.raises(StoreUnavailable):
            store.add(make_task("big", body_size=200_000), b"", big, [("groups", "g")])
        assert "full" in caplog.text and "ASYNCROUTE_STORE" in caplog.text
        assert "Make room" in caplog.text
        assert store.get("big") is None
        assert store.news(-1).change == change, "all or nothing"
        store.add(make_task("small"), b"", None, ())
        assert store.claim("small", "me", T0) is not None
        ended = {"state": State.COMPLETED, "completed_us": T0, "result_json": b"x" * 200_000}
        with pytest.raises(StoreUnavailable):
            store.update("small", Expect((State.RUNNING,), "me", 1), ended)
        small = store.get("small")
        assert small is not None and small.state is State.RUNNING
        assert [task.id for task in store.query((), NEWEST_FIRST, 9, None, None)] == ["small", "before"]
        store.close()
    assert store.update("small", Expect((State.RUNNING,), "me", 1), ended) is not None
    store.add(make_task("big", body_size=200_000), b"", big, [("groups", "g")])
    body = store.body("big")
    assert body.size == 200_000
    body.close()


def test_an_error_in_the_middle_of_a_write_takes_all_of_it_back(store: TaskStore, make_task: NewTask) -> None:
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
    assert store.news(-1).change == 1


def test_connections_are_given_back(store: TaskStore, make_task: NewTask) -> None:
    """Thirty readers at once leave no more than a few connections open behind them."""
    assert isinstance(store, SQLTaskStore)
    store.add(make_task(), b"", None, ())
    inside = threading.Barrier(30)

    def read() -> None:
        assert isinstance(store, SQLTaskStore)

        def wait(cursor: Cursor) -> None:
            cursor.execute("SELECT 1").fetchone()
            inside.wait(10)

        store._database.read(wait)

    threads = [threading.Thread(target=read) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(store._database._readers) <= sqlite.READERS


def test_the_log_is_moved_into_the_file_off_the_way(
    store: TaskStore, make_task: NewTask, sqlite_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    before = sqlite_path.stat().st_size
    for number in range(100):
        store.add(make_task(f"t{number}", error="x" * 500), b"", None, ())
    assert sqlite_path.stat().st_size == before, "it is in the log"
    store.tend()
    assert sqlite_path.stat().st_size > before
    assert caplog.text == ""


@pytest.mark.parametrize("setting", ["OFF", "NORMAL", "FULL", "EXTRA"])
def test_synchronous_is_as_asked_on_every_connection(sqlite_path: Path, setting: str) -> None:
    database = SQLiteDatabase(sqlite_path, setting)
    level = {"OFF": 0, "NORMAL": 1, "FULL": 2, "EXTRA": 3}[setting]

    def asked(cursor: Cursor) -> object:
        return cursor.execute("PRAGMA synchronous").fetchone()

    assert database.write(asked) == (level,)
    assert database.read(asked) == (level,)
    database.close()


def test_a_connection_that_failed_in_a_read_is_not_lent_again(sqlite_path: Path) -> None:
    database = SQLiteDatabase(sqlite_path)
    used = []

    def fail(cursor: Cursor) -> None:
        used.append(cursor)
        cursor.execute("SELECT x FROM nothing")

    with pytest.raises(StoreUnavailable):
        database.read(fail)
    assert len(set(map(id, used))) == 2, "it was tried once more, on another"
    assert database.read(lambda cursor: used.append(cursor) or cursor.execute("SELECT 1").fetchone()) == (1,)
    assert used[2] is not used[1]
    database.close()


def test_an_old_sqlite_is_a_configuration_error(sqlite_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 7, 0))
    with pytest.raises(ConfigurationError, match="ASYNCROUTE_STORE"):
        SQLiteDatabase(sqlite_path)


def test_a70_a_quota_is_counted_in_the_index_of_the_user(store: TaskStore, sqlite_path: Path) -> None:
    assert isinstance(store, SQLTaskStore)
    statement = store._terms._unfinished
    connection = sqlite3.connect(sqlite_path)
    plan = connection.execute(f"EXPLAIN QUERY PLAN {statement.sql}", statement.values(ns=1, owner="anna", most=5))
    steps = " ".join(row[3] for row in plan.fetchall())
    connection.close()
    assert "INDEX asyncroute_task_user (namespace=? AND user=? AND state=?)" in steps


def log_of(path: Path) -> int:
    """Return which file the log is."""
    return path.with_name(f"{path.name}-wal").stat().st_ino


def test_f21_a_log_that_others_have_opened_is_left_alone(
    make_sqlite_store: NewStore, sqlite_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One looks at the new file while it is locked, and fails; then another is first, whose log must not be taken for an old one."""
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.1)
    first, second = make_sqlite_store(), make_sqlite_store()
    for store in (first, second):
        store.open()
    remove_file(sqlite_path)
    sqlite_path.touch(0o600)
    for store in (first, second):
        store._database._file._look_at = 0.0
    with closing(sqlite3.connect(sqlite_path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode=WAL")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable):
            second.open()
        other.execute("ROLLBACK")
        first.open()
        assert first.write_value("key", b"1", None)
        log = log_of(sqlite_path)
        second.open()
        assert log_of(sqlite_path) == log
    found = second.read_value("key")
    assert found is not None and found == first.read_value("key")


def test_f21_a_newer_file_is_refused_again_and_again(
    make_sqlite_store: NewStore, sqlite_path: Path, make_task: NewTask
) -> None:
    """An older release meets the file of a newer one, in which that works: it must not touch it."""
    ours = make_sqlite_store()
    ours.open()
    remove_file(sqlite_path)
    newer = new_sqlite_store(sqlite_path)
    newer.open()
    newer.add(make_task("theirs"), b"", None, ())
    with closing(sqlite3.connect(sqlite_path)) as connection, connection:
        connection.execute("UPDATE asyncroute_schema SET version = version + 1")
    log = log_of(sqlite_path)
    for _ in range(3):
        ours._database._file._look_at = 0.0
        with pytest.raises(StoreUnavailable):
            ours.open()
        assert log_of(sqlite_path) == log
    assert newer.get("theirs") is not None
    newer.close()
    with closing(sqlite3.connect(sqlite_path)) as connection:
        assert connection.execute("SELECT count(*) FROM asyncroute_tasks").fetchone() == (1,)


def test_f21_a_write_on_its_way_to_a_replaced_file_reaches_no_other_app(
    make_sqlite_store: NewStore, sqlite_path: Path, make_task: NewTask, eventually: Callable[..., object]
) -> None:
    """Whichever app is the first to make itself at home in the new one."""
    one, two = make_sqlite_store("one"), make_sqlite_store("two")
    for store in (one, two):
        store.open()
    outcome: list[str] = []

    def start() -> None:
        try:
            two.add(make_task("late"), b"", None, ())
            outcome.append("stored")
        except (IdTaken, StoreUnavailable) as error:
            outcome.append(type(error).__name__)

    with two._database._write_lock:
        starting = threading.Thread(target=start)
        starting.start()
        remove_file(sqlite_path)
        for store in (one, two):
            store._database._file._look_at = 0.0
        opening = threading.Thread(target=two.open)
        opening.start()
        eventually(sqlite_path.exists)
        one.open()
    starting.join(10)
    opening.join(10)
    assert one.get("late") is None
    assert outcome and (outcome != ["stored"] or two.get("late") is not None)


def test_f21_a_file_behind_a_link(tmp_path: Path, make_task: NewTask) -> None:
    """One that points to nothing yet, and one whose file is deleted later."""
    (tmp_path / "data").mkdir()
    (tmp_path / "app").mkdir()
    link, file = tmp_path / "app" / "there.db", tmp_path / "data" / "real.db"
    link.symlink_to(file)
    store = new_sqlite_store(link)
    for _ in range(2):
        store.open()
        store.add(make_task(), b"", None, ())
        assert file.exists() and link.is_symlink()
        assert [path.name for path in link.parent.iterdir()] == [link.name], "all else is beside the file"
        remove_file(file)
        store._database._file._look_at = 0.0
    store.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is none")
def test_f36_a_fork_while_a_connection_is_opened_locks_nobody_out(sqlite_path: Path) -> None:
    """The copy has the folder's lock as well, for as long as it lives."""
    sqlite_path.parent.mkdir()
    with file._locked(sqlite_path.parent, is_alone=False):
        stay, let = os.pipe()
        copy = os.fork()
        if copy == 0:
            os.close(let)
            os.read(stay, 1)
            os._exit(0)
    try:
        with file._locked(sqlite_path.parent, is_alone=True):
            pass
    finally:
        os.close(let)
        os.close(stay)
        os.waitpid(copy, 0)
