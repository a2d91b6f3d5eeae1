"""Raise `TaskAborted` in the thread of a view that does not stop by itself.

CPython can raise such an asynchronous exception at any point. This module raises it only in the
task's view, and not inside modules that could leave a lock held.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import CodeType, FrameType
from typing import Any

from ..errors import TaskAborted
from .arrival import may_skip_a_block
from .execution import Execution

FORBIDDEN = (
    "logging.", "threading.", "queue.", "importlib.", "_frozen_importlib.",
    "_frozen_importlib_external.", "sqlalchemy.pool.", "psycopg_pool.", "flask_asyncroute.",
)  # fmt: skip
_transparent: set[CodeType] = set()

SHORT_SWITCH_SECONDS = 1e-6
ATTEMPTS = 100
PAUSE_SECONDS = 2e-5

_set_in = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)(
    ("PyThreadState_SetAsyncExc", ctypes.pythonapi)
)
"""Sets the exception that CPython will raise in another thread.

Takes the thread id and the address (in CPython, the ``id``) of an exception class. None as the
address withdraws the exception.
"""

_interrupting = threading.Lock()


def allow_within(function: Any) -> None:
    """Allow interruptions inside a function of this package.

    Views call other async routes through such a function. It must hold no lock.
    """
    _transparent.add(function.__code__)


def call(view: Callable[..., Any], arguments: dict[str, Any], execution: Execution) -> Any:
    """Call a view on this thread. Until the view returns, :func:`interrupt` can interrupt it."""
    with execution.thread_lock:
        execution.thread_id = threading.get_ident()
    try:
        return view(**arguments)
    finally:
        leave(execution)


def leave(execution: Execution) -> None:
    """Prevent further interruptions of this thread for ``execution``. Can be called repeatedly."""
    while True:
        try:
            with execution.thread_lock:
                if execution.thread_id == threading.get_ident():
                    execution.thread_id = None
            if execution.is_interrupted:
                # Have a pending exception raised in this loop, not in later code of the thread.
                # Withdrawing it would make CPython threads hang under a tracer.
                for _ in range(100):
                    pass
            return
        except TaskAborted:
            # Python 3.14 can raise the exception after `with` has acquired the lock, before its
            # block.
            with suppress(RuntimeError):  # raised if the thread does not hold the lock
                execution.thread_lock.release()


def interrupt(execution: Execution) -> bool:
    """Raise `TaskAborted` in the thread that runs the view of ``execution``.

    :return: False if no moment within a few milliseconds was safe. Then call this again soon. True
        if the exception was set or the view has ended.
    """
    with _interrupting:
        if _try(execution):
            return True
        # A thread that logs a lot can release the GIL only inside logging, where interruption is
        # never safe. A short switch interval makes it release the GIL elsewhere too.
        interval = sys.getswitchinterval()
        try:
            for _ in range(ATTEMPTS):
                sys.setswitchinterval(SHORT_SWITCH_SECONDS)
                time.sleep(PAUSE_SECONDS)
                sys.setswitchinterval(interval)
                if _try(execution):
                    return True
        finally:
            sys.setswitchinterval(interval)
    return False


def _try(execution: Execution) -> bool:
    # Turn garbage collection off: finalizers would let the thread continue during the check, and
    # Python 3.11 could free the checked frames.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with execution.thread_lock:
            thread_id = execution.thread_id
            if thread_id is None:
                return True
            frame = sys._current_frames().get(thread_id)
            if frame is None:
                return False
            instruction = frame.f_lasti
            if not _is_safe(frame, execution):
                return False
            execution.is_interrupted = True
            _set_in(thread_id, id(TaskAborted))
            now = sys._current_frames().get(thread_id)
            has_moved = now is not frame or now.f_lasti != instruction
            if has_moved and not _is_safe(now, execution):
                # The thread has moved to a point where the exception would do harm.
                _withdraw_exception(thread_id)
                return False
        return True
    finally:
        if was_enabled:
            gc.enable()


def _withdraw_exception(thread_id: int) -> None:
    # The exception was set for the thread and is not raised yet. A withdrawal alone would leave
    # CPython searching for a pending exception at every instruction, in all threads, and a tracer
    # would hang. Raising another exception ends the search. So this function also sets an exception
    # for the calling thread, within the same C call, in which the interpreter does not search.
    try:
        list(map(_set_in, (threading.get_ident(), thread_id), (id(_Nothing), None)))
        for _ in range(100):
            pass
    except _Nothing:
        pass


class _Nothing(BaseException):
    """An exception that `_withdraw_exception` raises in its own thread and catches."""


def _is_safe(frame: FrameType | None, execution: Execution) -> bool:
    is_inside = False
    innermost = frame
    while frame is not None:
        if frame.f_code is call.__code__:
            runs_its_view = is_inside and frame.f_locals.get("execution") is execution
            return runs_its_view and not may_skip_a_block(innermost)
        module = f"{frame.f_globals.get('__name__')}."
        if module.startswith(FORBIDDEN) and frame.f_code not in _transparent:
            return False
        is_inside = True
        frame = frame.f_back
    return False
