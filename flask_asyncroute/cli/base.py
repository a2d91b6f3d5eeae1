"""The group of the commands: opens the store, and prints each error on one line."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click
from flask import current_app
from flask.cli import AppGroup, FlaskGroup, with_appcontext
from werkzeug.exceptions import HTTPException

from ..errors import (
    AsyncRouteError,
    ConfigurationError,
    InvalidQuery,
    StoreUnavailable,
    TaskNotFound,
)
from ..request.submission import ID_PATTERN
from ..runtime import current_runtime
from ..stores.registry import kind_of
from ..task import AsyncRouteTask
from ..workers.runner import Runner, new_store
from .text import cut, escape

logger = logging.getLogger("flask_asyncroute")

FAILED, USAGE, NOT_FOUND = 1, 2, 3
"""Exit codes: the task or the command failed; a parameter or setting is wrong; unknown task."""
INTERRUPTED = 130  # after Ctrl-C, as in shells
MOST_OF_CAUSE = 300


class CommandGroup(AppGroup):
    """Runs its commands in an app context. Errors of this package become one line in stderr."""

    def invoke(self, context: click.Context) -> Any:
        with suppress(AttributeError):  # an app's test can have replaced stdout
            # A terminal can have an encoding that lacks a character of a task's text.
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        try:
            # The test runner of Flask pushes no app context.
            return with_appcontext(super().invoke)(context)
        except (AsyncRouteError, HTTPException) as error:
            raise failure_of(error) from error


class Failure(click.ClickException):
    """Ends the command with a message and an exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc]


def is_loading() -> bool:
    """Return whether ``flask`` is loading the app because the app defines the command to run, or to
    complete a command.

    ``flask run`` and ``flask shell`` are commands of Flask, which load the app later.
    """
    # click can list the names of commands without a context. Its scripts set this for all shells.
    if "COMP_WORDS" in os.environ:
        return True
    context = click.get_current_context(silent=True)
    return context is not None and isinstance(context.command, FlaskGroup)


def fail(message: str, code: int = FAILED) -> click.ClickException:
    """Return the error that ends the command with a message and an exit code."""
    return Failure(escape(message), code)


def failure_of(error: AsyncRouteError | HTTPException) -> click.ClickException:
    code = FAILED
    if isinstance(error, (ConfigurationError, InvalidQuery)):
        code = USAGE
    elif isinstance(error, TaskNotFound):
        code = NOT_FOUND
    elif not isinstance(error, AsyncRouteError) and (error.code or 500) < 500:
        code = USAGE  # the route's `validate` has refused the values
    if isinstance(error, StoreUnavailable):
        return fail(_outage(error))
    return fail(str(error), code)


def _outage(error: StoreUnavailable) -> str:
    label = new_store(current_app, current_runtime().config).label  # without its password
    cause = " ".join(str(error.__cause__ or "").split())
    reason = f": {cut(cause, MOST_OF_CAUSE)}" if cause else "."
    return (
        f"The store {label} (ASYNCROUTE_STORE) cannot be used{reason} Check that the database can "
        "be reached, and that this user may use it."
    )


def open_runner() -> Runner:
    """Return the app's runner in this process, with an open store, until the command ends.

    It runs no tasks and no maintenance.

    :raises ConfigurationError: if other processes cannot share the store.
    """
    runtime = current_runtime()
    config = runtime.prepare()
    if not kind_of(config.store).is_shared:
        raise ConfigurationError(
            "The command line cannot see the tasks in ASYNCROUTE_STORE memory://, which are in the "
            "memory of the server process. Use the default store or PostgreSQL."
        )
    if not runtime.has_runner:  # a process that serves requests can call a command, as in a test
        click.get_current_context().call_on_close(runtime.close)
    with errors_printed_once():
        return runtime.runner


@contextmanager
def errors_printed_once() -> Iterator[None]:
    """Do not print log messages in the block, unless the app has configured logging.

    The store logs each error that it raises, and the command prints it.
    """
    handler = logging.NullHandler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def find(runner: Runner, task_id: str) -> AsyncRouteTask:
    """Return a task, or end the command because no task has this id."""
    task = runner.store.get(task_id) if ID_PATTERN.match(task_id) else None
    if task is None:
        raise not_found(runner, task_id)
    return task


def not_found(runner: Runner, task_id: str) -> click.ClickException:
    where = f"namespace {runner.config.namespace} of {runner.store.label}"
    return fail(
        f"There is no task {cut(task_id, 130)} in {where}. To list the tasks, run: flask "
        "asyncroute list",
        NOT_FOUND,
    )


def for_each(task_ids: Iterable[str], act: Callable[[str], None]) -> None:
    """Call ``act`` for each task. After an error, continue with the next task.

    :raises click.exceptions.Exit: with the highest exit code of the errors.
    """
    code = 0
    for task_id in task_ids:
        try:
            act(task_id)
        except StoreUnavailable:
            raise
        except (AsyncRouteError, click.ClickException) as error:
            failure = failure_of(error) if isinstance(error, AsyncRouteError) else error
            failure.show()
            code = max(code, failure.exit_code)
    if code:
        raise click.exceptions.Exit(code)
