"""Raising `TaskAborted` inside a thread that does not stop by itself, where that can do no harm.

CPython raises an asynchronous exception in a thread wherever it happens to be. So it is raised only while the thread
still runs this very task, and only while nothing between the view and the innermost frame holds a lock of a module that
must not lose it.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from functools import lru_cache
from types import FrameType
from typing import Any

from ..errors import TaskAborted
from ..execution import Execution
from ..typing import View

FORBIDDEN = ("logging", "threading", "queue", "importlib", "_frozen_importlib", "_frozen_importlib_external",
             "sqlalchemy.pool", "psycopg_pool", "flask_asyncroute")  # fmt: skip

SHORT_SWITCH_SECONDS = 1e-6
LOOKS = 100
LOOK_SECONDS = 2e-5

_set_in = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)(
    ("PyThreadState_SetAsyncExc", ctypes.pythonapi)
)
"""Takes a thread and the address of an exception class, or None for none. (``id`` gives an address in CPython.)"""

_looking = threading.Lock()


def call(view: View, arguments: dict[str, Any], execution: Execution) -> Any:
    """Call a view such that :func:`interrupt` can find it on this thread. Returns when no interruption can come any more."""
    with execution.thread_lock:
        execution.thread_id = threading.get_ident()
    try:
        return _call(view, arguments, execution)
    finally:
        leave(execution)


def leave(execution: Execution) -> None:
    """Make sure that this thread is not interrupted for ``execution`` from here on. Called again it does no harm."""
    while True:
        try:
            with execution.thread_lock:
                if execution.thread_id == threading.get_ident():
                    execution.thread_id = None
            if execution.is_interrupted:
                # What was raised and has not arrived yet must not hit what this thread does next: a few turns let it come.
                # (CPython can take it back, but then has its threads look for it for ever, and hangs under a tracer.)
                for _ in range(100):
                    pass
            return
        except TaskAborted:
            continue


def interrupt(execution: Execution) -> bool:
    """Raise `TaskAborted` in the thread that runs ``execution``, if a moment comes soon at which that is safe.

    Takes a few milliseconds at most.

    :return: whether it was raised or the view is not on a thread any more; False: try again a little later.
    """
    with _looking:
        return _interrupt(execution)


def _interrupt(execution: Execution) -> bool:
    if _try(execution):
        return True
    # A thread that writes a lot lets others run only while it writes, which may be in logging each time. Having it give
    # way at once, for a moment, lets it be seen elsewhere too.
    interval = sys.getswitchinterval()
    try:
        for _ in range(LOOKS):
            sys.setswitchinterval(SHORT_SWITCH_SECONDS)
            time.sleep(LOOK_SECONDS)
            sys.setswitchinterval(interval)
            if _try(execution):
                return True
    finally:
        sys.setswitchinterval(interval)
    return False


def _try(execution: Execution) -> bool:
    """Look and raise. No garbage is collected meanwhile: its finalisers would let the thread go on, and in 3.11 the frames
    that are looked at could be freed.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return _look_and_raise(execution)
    finally:
        if was_enabled:
            gc.enable()


def _look_and_raise(execution: Execution) -> bool:
    with execution.thread_lock:
        thread_id = execution.thread_id
        if thread_id is None:
            return True
        frame = sys._current_frames().get(thread_id)
        if frame is None or not _is_safe(frame, execution):
            return False
        place = frame.f_lasti
        execution.is_interrupted = True
        _set_in(thread_id, id(TaskAborted))
        now = sys._current_frames().get(thread_id)
        if (now is not frame or now.f_lasti != place) and not _is_safe(now, execution):
            # The thread went on in between, to where it would be harmed: take back what has not arrived.
            _withdraw_from(thread_id)
            return False
    return True


def _withdraw_from(thread_id: int) -> None:
    """Take back an exception that was raised in a thread and has not arrived there.

    CPython then goes on looking for it at every turn, and under a tracer never comes further, until some thread gets an
    exception that way. So this one gets one, and both are done in one call, with no turn of the interpreter in between.
    """
    try:
        list(map(_set_in, (threading.get_ident(), thread_id), (id(_Nothing), None)))
        for _ in range(100):
            pass
    except _Nothing:
        pass


class _Nothing(BaseException):
    """Raised by a thread in itself; see `_withdraw_from`."""


def _call(view: View, arguments: dict[str, Any], execution: Execution) -> Any:
    return view(**arguments)


def _is_safe(frame: FrameType | None, execution: Execution) -> bool:
    """Return whether all frames from ``frame`` out to the view's call may be cut short."""
    is_inside = False
    while frame is not None:
        if frame.f_code is _call.__code__:
            return is_inside and frame.f_locals.get("execution") is execution
        if _is_forbidden(str(frame.f_globals.get("__name__"))):
            return False
        is_inside = True
        frame = frame.f_back
    return False


@lru_cache(4096)
def _is_forbidden(name: str) -> bool:
    """Return whether a module is one that must not be cut short; remembered, since no time may pass around the look."""
    return any(name == module or name.startswith(module + ".") for module in FORBIDDEN)
