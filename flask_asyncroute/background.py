"""Background threads and cleanup functions that end with the object that owns them."""

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
    """A daemon thread that calls :meth:`_step` repeatedly. Thread-safe.

    The thread also ends when this object is garbage-collected.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @abstractmethod
    def _step(self) -> float:
        """Do the work that is due. Return the number of seconds until the next call."""

    @property
    def is_running(self) -> bool:
        return self._thread is not None and not self._is_closed

    def start(self) -> None:
        """Start the thread unless it is running.

        :raises RuntimeError: if the system cannot start a thread. Call this again to retry.
        """
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
        """Make the thread call :meth:`_step` now instead of waiting."""
        self._wake.set()

    def close(self) -> None:
        """End the thread. Wait at most five seconds for its end."""
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
