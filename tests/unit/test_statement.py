"""Statements are compiled when they are first used, whichever thread and process that is."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
from sqlalchemy import literal, select
from sqlalchemy.dialects import sqlite

from flask_asyncroute.stores.sql.statement import Statement


def test_it_is_compiled_once() -> None:
    compiled: list[int] = []

    class Counted:
        def compile(self, dialect: Any) -> Any:
            compiled.append(1)
            return select(literal(1)).compile(dialect=dialect)

    statement = Statement(Counted(), sqlite.dialect())  # type: ignore[arg-type]
    assert not compiled
    assert statement.sql.startswith("SELECT") and statement.values() == statement.values()
    assert len(compiled) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is none")
def test_f36_a_fork_while_one_is_compiled_locks_nobody_out() -> None:
    """The copy has none of the other threads: a lock that one of them holds would be held in it for ever."""
    begun, go = threading.Event(), threading.Event()

    class Slow:
        def compile(self, dialect: Any) -> Any:
            begun.set()
            assert go.wait(20)
            return select(literal(1)).compile(dialect=dialect)

    slow = Statement(Slow(), sqlite.dialect())  # type: ignore[arg-type]
    thread = threading.Thread(target=lambda: slow.sql)
    thread.start()
    assert begun.wait(5)
    copy = os.fork()
    if copy == 0:
        watch = threading.Timer(10, os._exit, (1,))
        watch.daemon = True
        watch.start()
        os._exit(0 if Statement(select(literal(2)), sqlite.dialect()).sql else 2)
    _, status = os.waitpid(copy, 0)
    go.set()
    thread.join(5)
    assert os.waitstatus_to_exitcode(status) == 0
