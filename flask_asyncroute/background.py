"""End a background thread, or run a cleanup function, when an object is garbage-collected."""

from __future__ import annotations

import _thread
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any


def when_gone(
    owner: object, function: Callable[..., Any], /, *arguments: Any
) -> weakref.finalize[..., Any]:
    """Call ``function`` on a new thread after ``owner`` has been garbage-collected.

    :param function: must not reference ``owner``.
    :return: a finalizer. Calling it runs ``function`` now, unless it has already run.
    """
    # Use a new thread: the garbage collector can run on a thread that holds a lock that `function`
    # needs. Use `_thread`: starting a threading.Thread also takes locks.
    finalizer = weakref.finalize(owner, _thread.start_new_thread, function, arguments)
    finalizer.atexit = False
    return finalizer


class Loop(ABC):
    """Calls :meth:`_step` repeatedly on a daemon thread. Thread-safe."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @abstractmethod
    def _step(self) -> float:
        """Do the work that is due; return the seconds until the next step."""

    @property
    def is_running(self) -> bool:
        return self._thread is not None and not self._is_closed

    def start(self) -> None:
        """Start the thread unless it is running. After a RuntimeError, a later call retries."""
        if self._thread is not None:
            return
        with self._lock:
            if self._thread is None and not self._is_closed:
                arguments = (weakref.ref(self), self._wake)
                thread = threading.Thread(target=_run, args=arguments, name=self._name, daemon=True)
                thread.start()
                self._thread = thread
                when_gone(self, self._wake.set)

    def wake(self) -> None:
        """Make the thread run the next step now."""
        self._wake.set()

    def close(self) -> None:
        """End the thread; wait at most five seconds for it."""
        with self._lock:
            self._is_closed = True
            thread = self._thread
        self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(5)


def _run(reference: weakref.ref[Loop], wake: threading.Event) -> None:
    while True:
        wake.clear()  # clear before the checks, so that no wake-up is lost
        loop = reference()
        if loop is None or loop._is_closed:
            return
        seconds = loop._step()
        del loop
        wake.wait(seconds)
