"""Huey on SQLite. ``PEERS_STORE`` is the path of the database, with ``?fsync`` for fsync=True."""

from __future__ import annotations

from typing import Any

from flask import Flask
from huey import SqliteHuey

from .app import PATIENCE, Started, do_task, make_app, store

_path, _, _option = store().partition("?")
huey = SqliteHuey("peers", filename=_path, fsync=_option == "fsync")


@huey.task()
def run(body: dict[str, Any]) -> dict[str, Any]:
    """Run the task in a consumer."""
    return do_task(body)


class Queue:
    """Counts results in Huey's store."""

    def start(self, body: dict[str, Any]) -> Started:
        result = run(body)
        return result.id, lambda: result.get(blocking=True, timeout=PATIENCE, preserve=True)

    def have_ended(self, started: int) -> bool:
        return bool(huey.result_count() >= started)


def create_app() -> Flask:
    """Return the app."""
    return make_app(Queue())
