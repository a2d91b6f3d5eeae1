"""Threads that work while a context lasts, such as the clients of a trial."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Self


class Crew(ABC):
    """Threads that work while the context lasts. At its end, an error in a thread is raised.

    :param size: how many threads.
    """

    def __init__(self, size: int) -> None:
        self._end = threading.Event()
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._guarded, args=(number,), daemon=True)
            for number in range(size)
        ]

    def _guarded(self, number: int) -> None:
        try:
            self._run(number)
        except BaseException as error:
            self._errors.append(error)

    @abstractmethod
    def _run(self, number: int) -> None:
        """Work until ``_end`` is set; ``number`` counts the threads from 0."""

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        if kind is None and self._errors:
            raise self._errors[0]
