"""Processes of ``flask asyncroute worker``, which are replaced when they have been killed."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from tests.support.programs import Program, module

STARTED = " runs tasks from "
"""In the line that a worker logs when it takes tasks."""


class WorkerProcess(Program):
    """Runs ``flask asyncroute worker`` while the context lasts.

    :param log: the file for its output.
    :param app: the import string of the app.
    """

    def __init__(self, log: Path, app: str, *options: str) -> None:
        super().__init__(log, module("flask", "--app", app, "asyncroute", "worker", *options))

    @property
    def takes_tasks(self) -> bool:
        return STARTED in self.output()[self._printed :]

    def _is_ready(self) -> bool:
        return self.takes_tasks


class WorkerProcesses:
    """Runs several workers of an app while the context lasts.

    :param folder: for their logs.
    """

    def __init__(self, folder: Path, app: str, count: int, *options: str) -> None:
        self._folder = folder
        self._app = app
        self._count = count
        self._options = options
        self._started: list[WorkerProcess] = []

    def __enter__(self) -> WorkerProcesses:
        try:
            self.pids()
            for worker in self.running:
                worker.wait_until_ready()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def running(self) -> list[WorkerProcess]:
        return [worker for worker in self._started if not worker.has_ended]

    def pids(self) -> list[int]:
        """Replace the workers that have ended; return the pids of those that take tasks."""
        for _ in range(self._count - len(self.running)):
            log = self._folder / f"worker-{len(self._started)}.log"
            worker = WorkerProcess(log, self._app, *self._options)
            worker.launch()
            self._started.append(worker)
        return [worker.pid for worker in self.running if worker.takes_tasks]

    def assert_no_traceback(self) -> None:
        """Fail if any worker has logged a traceback."""
        for worker in self._started:
            log = worker.output()
            assert "Traceback" not in log, f"a worker logged an error:\n{log[-3000:]}"

    def _end(self) -> None:
        for worker in self._started:
            worker.stop()
