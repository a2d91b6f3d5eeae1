"""Reads that streams share: one read for all streams that need it, never older than a change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from flask_asyncroute.engine.shared_reads import SharedReads
from flask_asyncroute.errors import StoreUnavailable

Eventually = Callable[..., Any]
MANY = 50


class Source:
    """A source whose reads can be delayed after they have taken the value."""

    def __init__(self) -> None:
        self.value = "old"
        self.may_return = threading.Event()
        self.may_return.set()
        self.threads: list[str] = []

    def read(self) -> str:
        value = self.value
        self.threads.append(threading.current_thread().name)
        assert self.may_return.wait(20)
        return value

    def fail(self) -> str:
        self.read()
        raise StoreUnavailable("A test wants it so.")


@pytest.fixture
def reads() -> Iterator[SharedReads]:
    made = SharedReads()
    yield made
    made.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def source() -> Iterator[Source]:
    made = Source()
    yield made
    made.may_return.set()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(MANY) as made:
        yield made


def test_threads_that_need_the_same_key_share_one_read(
    reads: SharedReads, source: Source, pool: ThreadPoolExecutor, eventually: Eventually
) -> None:
    """Threads that ask during the read, and threads that ask after it."""
    source.may_return.clear()
    during = [pool.submit(reads.get, "key", source.read) for _ in range(MANY // 2)]
    eventually(lambda: source.threads)
    source.may_return.set()
    assert {each.result(20) for each in during} == {"old"}
    after = [pool.submit(reads.get, "key", source.read) for _ in range(MANY)]
    assert {each.result(20) for each in after} == {"old"}
    assert source.threads == ["asyncroute-reader"]


def test_reads_of_different_keys_run_one_at_a_time(
    reads: SharedReads, pool: ThreadPoolExecutor
) -> None:
    inside: list[int] = []
    peaks: list[int] = []

    def read(number: int) -> int:
        inside.append(number)
        peaks.append(len(inside))
        inside.remove(number)
        return number

    def get(number: int) -> int:
        return reads.get(number, lambda: read(number))

    assert list(pool.map(get, range(MANY))) == list(range(MANY))
    assert peaks == [1] * MANY


def test_a_read_that_began_before_a_change_is_not_shared_after_it(
    reads: SharedReads, source: Source, pool: ThreadPoolExecutor, eventually: Eventually
) -> None:
    source.may_return.clear()
    before = pool.submit(reads.get, "key", source.read)
    eventually(lambda: source.threads)
    source.value = "new"
    reads.forget()
    after = pool.submit(reads.get, "key", source.read)
    source.may_return.set()
    assert (before.result(20), after.result(20)) == ("old", "new")
    assert len(source.threads) == 2


def test_a_result_is_shared_until_it_is_dropped_or_a_change_occurs(
    reads: SharedReads, source: Source
) -> None:
    for end in (reads.forget, lambda: reads.drop("key")):
        source.value = "old"
        assert reads.get("key", source.read) == "old"
        source.value = "new"
        assert reads.get("key", source.read) == "old"
        end()
        assert reads.get("key", source.read) == "new"
        reads.forget()


def test_an_error_is_raised_in_all_waiting_threads_and_not_kept(
    reads: SharedReads, source: Source, pool: ThreadPoolExecutor, eventually: Eventually
) -> None:
    source.may_return.clear()
    waiting = [pool.submit(reads.get, "key", source.fail) for _ in range(MANY)]
    eventually(lambda: pool._work_queue.empty() and source.threads)
    source.may_return.set()
    assert {type(each.exception(20)) for each in waiting} == {StoreUnavailable}
    assert reads.get("key", source.read) == "old"


def test_all_queued_reads_fail_if_the_store_is_unavailable(
    reads: SharedReads, source: Source, pool: ThreadPoolExecutor, eventually: Eventually
) -> None:
    """Each attempt may take seconds, and attempts run one at a time."""
    source.may_return.clear()
    waiting = [pool.submit(reads.get, number, source.fail) for number in range(MANY)]
    eventually(lambda: source.threads and len(reads._queue) == MANY - 1)
    source.may_return.set()
    assert {type(each.exception(20)) for each in waiting} == {StoreUnavailable}
    assert len(source.threads) == 1
    assert reads.get("key", source.read) == "old"


def test_reads_work_after_close(
    reads: SharedReads, source: Source, pool: ThreadPoolExecutor, eventually: Eventually
) -> None:
    """A stream that has not noticed the end of the runner must not wait forever."""
    source.may_return.clear()
    first = pool.submit(reads.get, "first", source.read)
    eventually(lambda: source.threads)
    queued = pool.submit(reads.get, "queued", source.read)
    eventually(lambda: reads._queue)
    closing = pool.submit(reads.close)
    source.may_return.set()
    closing.result(20)
    assert first.result(20) == queued.result(20) == "old"
    assert reads.get("later", source.read) == "old"
    assert source.threads[-1] == threading.current_thread().name


@dataclass(frozen=True)
class Read:
    change: int


def test_a_page_that_was_read_ahead_is_not_read_again(reads: SharedReads, stack: ExitStack) -> None:
    calls: list[tuple[str, int]] = []

    def reader(name: str) -> Callable[[int], Read]:
        def read(since: int) -> Read:
            calls.append((name, since))
            return Read(since + 1)

        return read

    of_task, of_other, of_all = ("task", None), ("other", None), (None, "group")
    for feed in (of_task, of_other, of_all):
        stack.enter_context(reads.reading(feed))
    for feed in (of_task, of_other, of_all):
        assert reads.page(feed, 5, reader(str(feed[0]))).change == 6
    calls.clear()
    reads.forget()
    reads.read_ahead({"task"})
    assert sorted(calls) == [("None", 6), ("task", 6)]
    assert reads.page(of_task, 6, reader("task")).change == 7
    assert reads.page(of_all, 6, reader("None")).change == 7
    assert len(calls) == 2
    assert reads.page(of_other, 6, reader("other")).change == 7
    assert calls[2:] == [("other", 6)]
    reads.forget()
    reads.read_ahead({"task"})
    assert ("task", 7) in calls


def test_streams_read_for_themselves_if_the_read_ahead_fails(
    reads: SharedReads, stack: ExitStack
) -> None:
    calls: list[int] = []

    def read(since: int) -> Read:
        calls.append(since)
        if len(calls) == 2:
            raise StoreUnavailable("not now")
        return Read(since + 1)

    for name in ("one", "two"):
        stack.enter_context(reads.reading((name, None)))
        reads.page((name, None), 0, read if name == "one" else lambda since: Read(since + 1))
    reads.forget()
    reads.read_ahead({"one", "two"})
    assert calls == [0, 1]
    assert reads.page(("one", None), 1, read).change == 2
    assert calls == [0, 1, 1]


def test_a_feed_is_read_ahead_while_it_has_streams(reads: SharedReads) -> None:
    calls: list[int] = []

    def read(since: int) -> Read:
        calls.append(since)
        if since == 2:
            second.close()
        return Read(since + 1)

    feed = ("task", None)
    reads.page(feed, 0, read)
    assert not reads._heads, "no stream follows it"
    first, second = ExitStack(), ExitStack()
    for stack in (first, second):
        stack.enter_context(reads.reading(feed))
    reads.page(feed, 1, read)
    first.close()
    reads.read_ahead({"task"})
    assert calls == [0, 1, 2], "the last stream leaves during the read"
    assert not reads._heads and not reads._feeds
    reads.forget()
    reads.read_ahead({"task"})
    assert calls == [0, 1, 2]


def test_functions_are_called_on_the_thread(reads: SharedReads, eventually: Eventually) -> None:
    names: list[str] = []
    reads.call(lambda: names.append(threading.current_thread().name))
    eventually(lambda: names)
    assert names == ["asyncroute-reader"]
    reads.close()
    reads.call(lambda: names.append(threading.current_thread().name))
    assert names[1:] == [threading.current_thread().name]


def test_functions_are_called_after_reads_that_failed(
    reads: SharedReads, source: Source, pool: ThreadPoolExecutor, eventually: Eventually
) -> None:
    """An outage is not passed on to them: nobody would wake the streams."""
    source.may_return.clear()
    failed = pool.submit(reads.get, "key", source.fail)
    eventually(lambda: source.threads)
    called: list[str] = []
    other = pool.submit(reads.get, "other", source.fail)
    eventually(lambda: len(reads._queue) == 1)
    reads.call(lambda: called.append("streams"))
    source.may_return.set()
    eventually(lambda: called)
    for future in (failed, other):
        with pytest.raises(StoreUnavailable):
            future.result(5)
