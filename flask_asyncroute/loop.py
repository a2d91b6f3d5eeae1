"""A thread that does what is due and sleeps until something is: what `timekeeping`, `housekeeping`, `presence` and
`notifier` have in common."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod

from .finalizers import when_gone


class Loop(ABC):
    """One daemon thread, which starts with the first :meth:`start`. Thread-safe.

    :param name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @abstractmethod
    def _step(self) -> float:
        """Do what is due; return in how many seconds to look again."""

    @property
    def is_running(self) -> bool:
        """Whether the thread is there and goes on."""
        return self._thread is not None and not self._is_closed

    def start(self) -> None:
        """Start the thread, if it does not run yet."""
        if self._thread is None:
            with self._lock:
                if self._thread is None and not self._is_closed:
                    arguments = (weakref.ref(self), self._wake)
                    thread = threading.Thread(target=_run, args=arguments, name=self._name, daemon=True)
                    thread.start()  # where there is no room for it, the next call tries again
                    self._thread = thread
                    when_gone(self, self._wake.set)

    def wake(self) -> None:
        """Look at once for what is due: something has changed."""
        self._wake.set()

    def close(self) -> None:
        """End the thread and wait for it, five seconds at most."""
        with self._lock:
            self._is_closed = True
            thread = self._thread
        self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(5)


def _run(reference: weakref.ref[Loop], wake: threading.Event) -> None:
    """Run the thread. It holds its loop weakly, so that an app that is dropped ends it."""
    while True:
        # Before the look whether it is closed: what is set from here on is not taken back.
        wake.clear()
        loop = reference()
        if loop is None or loop._is_closed:
            return
        seconds = loop._step()
        del loop
        wake.wait(seconds)
