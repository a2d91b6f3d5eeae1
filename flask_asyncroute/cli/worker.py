"""``flask asyncroute worker``: a process that runs tasks and serves no requests."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from types import FrameType

import click

from ..config import Config
from ..errors import ConfigurationError
from ..executors.registry import kind_of
from ..routes import Route
from ..runtime import current_runtime
from ..stores import registry as stores
from ..workers import shutdown
from ..workers.role import Role, runs_in_any_worker
from ..workers.runner import Runner

logger = logging.getLogger("flask_asyncroute")

CUT_OFF = 1  # the exit code if tasks did not end in the drain time
END_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LONGEST_DRAIN = 366 * 86400  # infinity would overflow the timeouts of waits


def _checked(
    context: click.Context, parameter: click.Parameter, seconds: float | None
) -> float | None:
    # FloatRange would accept nan.
    if seconds is not None and not 0 <= seconds <= LONGEST_DRAIN:
        raise click.BadParameter(f"{seconds:g} is invalid; use seconds from 0 to {LONGEST_DRAIN}.")
    return seconds


@click.command()
@click.option(
    "--route", "patterns", multiple=True, metavar="PATTERN",
    help="Run only tasks of these endpoints, such as 'report' or 'films.*'. Can be repeated. "
    "Default: all.",
)  # fmt: skip
@click.option(
    "--slots", type=click.IntRange(1), metavar="NUMBER",
    help="Run at most this many tasks of each pool at once. Default: max_workers of the route.",
)  # fmt: skip
@click.option(
    "--drain", type=float, callback=_checked, metavar="SECONDS",
    help="How long running tasks may continue after the signal to exit. Default: ASYNCROUTE_DRAIN.",
)  # fmt: skip
@click.pass_context
def worker(
    context: click.Context, patterns: tuple[str, ...], slots: int | None, drain: float | None
) -> None:
    """Run waiting tasks until SIGTERM or Ctrl-C.

    Start as many workers as you like, with PostgreSQL on several machines. After the first signal,
    the worker takes no more tasks and lets the running ones end. A second signal ends it at once.
    The exit code is 0 if all running tasks have ended in time, else 1.

    \b
    Examples:
      flask --app reports asyncroute worker
      flask --app reports asyncroute worker --route 'films.*' --slots 1 --drain 3600
    """
    runtime = current_runtime()
    # A socket, because the handler can interrupt code that holds any lock.
    received, ended = socket.socketpair()
    with received, ended:
        config = runtime.prepare()
        _refuse_memory(config)
        role = Role(_selected(runtime.routes, patterns), slots, is_worker=True)
        _show_log()
        try:
            _send_on_signal(ended)
            runner = runtime.become_worker(role)
            _log_start(runner)
            name = _wait_for_signal(received)
        finally:
            signal.set_wakeup_fd(-1)
    logger.info(
        "The worker received %s and takes no more tasks. Send the signal again to end it at once.",
        name,
    )
    cut = shutdown.shut_down({runner: config.drain if drain is None else drain})
    runtime.close()
    context.exit(CUT_OFF if cut else 0)


def _refuse_memory(config: Config) -> None:
    if not stores.kind_of(config.store).is_shared:
        raise ConfigurationError(
            "A worker cannot read the tasks of other processes in ASYNCROUTE_STORE memory://. Use "
            "the default store or PostgreSQL."
        )


def _selected(routes: Mapping[str, Route], patterns: Collection[str]) -> frozenset[str]:
    """Return the endpoints that match any of the patterns, and whose tasks a worker can run.

    :raises click.UsageError: if a pattern selects no such endpoint.
    """
    usable = sorted(name for name, route in routes.items() if runs_in_any_worker(route))
    if not usable:
        raise click.UsageError(
            'The app has no async route with executor="thread" or "process", so a worker has '
            "nothing to do."
        )
    selected: set[str] = set()
    for pattern in patterns or ("*",):
        found = {name for name in usable if fnmatchcase(name, pattern)}
        if not found:
            reason = "matches no async route."
            if pattern in routes:
                kind = kind_of(routes[pattern].options.executor).name
                reason = f"has the executor {kind}, so its tasks do not run in a worker."
            raise click.BadParameter(
                f"{pattern!r} {reason} Use one of these endpoints: {', '.join(usable)}.",
                param_hint="--route",
            )
        selected |= found
    return frozenset(selected)


def _show_log() -> None:
    """Write the log to stderr, unless the app has configured logging."""
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def _send_on_signal(receiver: socket.socket) -> None:
    """Send the number of each signal to a socket. After the first SIGTERM or SIGINT, another one
    ends this process.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        for each in END_SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    # Another thread can receive the signal. Then only the socket wakes the main thread, and Python
    # calls handlers in no other thread.
    receiver.setblocking(False)
    signal.set_wakeup_fd(receiver.fileno(), warn_on_full_buffer=False)
    for number in END_SIGNALS:
        signal.signal(number, handle)


def _wait_for_signal(received: socket.socket) -> str:
    """Wait for SIGTERM or SIGINT; return its name."""
    while (number := received.recv(1)[0]) not in END_SIGNALS:
        pass  # the app handles other signals
    return signal.Signals(number).name


def _log_start(runner: Runner) -> None:
    slots = {
        name: runner.role.slots or runner.routes[name].options.max_workers
        for name in sorted(runner.role.endpoints)
    }
    others = [
        f"{name} ({kind_of(route.options.executor).name})"
        for name, route in runner.routes.items()
        if not runs_in_any_worker(route)
    ]
    logger.info(
        "The worker %s runs tasks from %s, namespace %s. Slots: %s.%s",
        runner.lifecycle.owner, runner.store.label, runner.config.namespace,
        ", ".join(f"{name} {count}" for name, count in slots.items()),
        f" Not run by workers: {', '.join(others)}." if others else "",
    )  # fmt: skip
