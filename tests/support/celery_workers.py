"""Celery workers in separate processes."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

from tests.support.apps.celery_crowd import MODULE
from tests.support.programs import Program, module


class CeleryWorker(Program):
    """Runs ``celery worker`` with the Celery app of `tests.support.apps.celery_crowd`.

    :param log: the file for its output.
    """

    patience, grace = 40.0, 10.0

    def __init__(
        self, log: Path, environ: dict[str, str], *options: str, pool: str = "prefork",
        concurrency: int = 2,
    ) -> None:  # fmt: skip
        command = module(
            "celery", "-A", MODULE, "worker", "--pool", pool, "--concurrency", str(concurrency), "--hostname",
            f"{uuid4().hex}@%h", "--loglevel", "INFO", "--without-gossip", "--without-mingle", *options,
        )  # fmt: skip
        super().__init__(log, command, environ)

    def _is_ready(self) -> bool:
        return " ready." in self.output()[self._printed :]
