"""What is done when an object of ours has been collected, so that nothing of an app that was dropped stays behind.

Threads hold the object that they work for weakly. What they wait on is set from here; it must not lead back to the app.
"""

from __future__ import annotations

import _thread
import weakref
from collections.abc import Callable
from typing import Any


def when_gone(owner: object, function: Callable[..., Any], /, *arguments: Any) -> None:
    """Call ``function`` on a thread of its own once ``owner`` has been collected; not at the interpreter's exit.

    :param function: must lead to ``owner`` no more than the arguments do: it is held until then.
    """
    finalizer = weakref.finalize(owner, _call_apart, function, arguments)
    finalizer.atexit = False


def _call_apart(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # The collector runs on whichever thread happens to allocate, which may hold the very lock that is needed here, or one of
    # `threading`'s own: those of a Thread object included.
    _thread.start_new_thread(function, arguments)
