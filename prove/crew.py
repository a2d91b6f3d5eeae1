"""Threads that work as long as a block lasts: the clients of a proof."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Self


class Crew(ABC):
    """Works while it is entered.

    :param size: how many threads.
    """

    def __init__(self, size: int) -> None:
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(size)]

    @abstractmethod
    def _run(self, number: int) -> None:
        """Work until ``_end`` is set; ``number`` counts the threads from 0."""

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
