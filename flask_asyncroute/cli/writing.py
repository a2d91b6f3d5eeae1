"""The commands that change tasks: ``submit``, ``stop``, ``purge``, ``redeliver``, ``init-db``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import IO, Any

import click
from flask import Request, current_app

from ..encoding import decode_json
from ..engine.lifecycle import purge as purge_task
from ..errors import ConfigurationError, InvalidQuery
from ..executors.registry import kind_of
from ..query import FIELDS, Condition, Operator
from ..request import from_code
from ..request.identity import caller_of
from ..runtime import current_runtime
from ..stores import registry as stores
from ..task import AsyncRouteTask
from ..workers.runner import Runner, new_store
from .base import USAGE, errors_printed_once, fail, find, for_each, not_found, open_runner
from .params import complete_endpoint, complete_filter, parse_filters, parse_values
from .reading import matching
from .watching import follow, interruptible

IS_COMPLETED = Condition(FIELDS["IsCompleted"], Operator.EQ, True)


@click.command()
@click.argument("endpoint", shell_complete=complete_endpoint)
@click.option(
    "--value", "given", multiple=True, metavar="NAME=VALUE",
    help="A variable of the URL. Can be repeated.",
)  # fmt: skip
@click.option(
    "--json", "body", type=click.File("rb"), metavar="FILE",
    help="Send the JSON in this file as the body; '-' reads stdin.",
)  # fmt: skip
@click.option("--method", help="Needed only if the route has several methods.")
@click.option("--user", help="The id of the user who owns the task.")
@click.option("--wait", "waits", is_flag=True, help="Wait until the task has ended.")
def submit(
    endpoint: str, given: tuple[str, ...], body: IO[bytes] | None, method: str | None,
    user: str | None, waits: bool,
) -> None:  # fmt: skip
    """Start a task of an async route, and print its id.

    A process that runs tasks of the app runs it. If there is no such process, the task waits.
    Without --wait, the exit code is 0 when the task is stored. With --wait, it is 0 if the task is
    Completed, and 1 if it is Failed or Aborted. Ctrl-C ends the wait, but not the task.

    \b
    Examples:
      flask asyncroute submit report --value year=2026
      flask asyncroute submit import_films --json films.json --user ann --wait
      echo '{"limit": 10}' | flask asyncroute submit import_films --json -
    """
    values = parse_values(given)
    runner = open_runner()
    task = _submit(runner, endpoint, values, body, method, user)
    if not waits:
        click.echo(task.id)
        return
    with interruptible(task.id):  # from the moment at which a program can read the id
        click.echo(task.id)
        follow(runner, task, prints_changes=False)


def _submit(
    runner: Runner, endpoint: str, values: Mapping[str, str], body: IO[bytes] | None,
    method: str | None, user: str | None,
) -> AsyncRouteTask:  # fmt: skip
    route = from_code.route_of(runner.routes, endpoint)
    kind = kind_of(route.options.executor)
    if kind.is_bound and not kind.runs_inline:
        raise ConfigurationError(
            f"submit({endpoint!r}): tasks of this route run only in the process that starts them, "
            'and this command ends before they do. Use executor="thread" or "process" for the '
            "route."
        )
    data, headers = None, None
    if body is not None:
        data, headers = _read(body, runner.config.max_body), {"Content-Type": "application/json"}
    try:
        caller = None if user is None else caller_of(user, None, runner.config.user_id_field)
        environ = from_code.environ_of(
            runner.app, endpoint, values, method, None, None, data, headers
        )
    except ValueError as error:
        raise fail(str(error), USAGE) from error

    def start(current: Request, arguments: Mapping[str, Any]) -> AsyncRouteTask:
        return runner.dispatcher.submit(route, current, arguments, caller, None, None)

    return from_code.call(runner.app, endpoint, environ, start)


def _read(body: IO[bytes], most: int) -> bytes:
    data = body.read(most + 1)
    if len(data) > most:
        raise fail(
            f"--json: the body has over {most} bytes, the limit of ASYNCROUTE_MAX_BODY.",
            USAGE,
        )
    try:
        decode_json(data, "--json: the body")
    except InvalidQuery as error:
        raise fail(str(error), USAGE) from error
    return data


@click.command()
@click.argument("task_ids", metavar="ID...", nargs=-1, required=True)
def stop(task_ids: tuple[str, ...]) -> None:
    """Stop tasks that have not ended. They become Aborted.

    \b
    Example:
      flask asyncroute stop 6f1c1c5e-90c1-4e3b-a1b1-9b8f7d2c3e4a
    """
    runner = open_runner()

    def stop_one(task_id: str) -> None:
        task = runner.dispatcher.stop(find(runner, task_id))
        more = " Its code has been asked to end." if task.stopping else ""
        click.echo(f"Task {task.id} is {task.state}.{more}")

    for_each(task_ids, stop_one)


@click.command(short_help="Remove finished tasks.")
@click.argument(
    "which", metavar="ID... | FILTER...", nargs=-1, required=True, shell_complete=complete_filter
)
@click.option("--yes", is_flag=True, help="Do not ask before several tasks are removed.")
def purge(which: tuple[str, ...], yes: bool) -> None:
    """Remove finished tasks with their results, events and callbacks.

    Name the tasks by their ids, or by filters as for 'list'. Filters select only finished tasks.

    \b
    Examples:
      flask asyncroute purge 6f1c1c5e-90c1-4e3b-a1b1-9b8f7d2c3e4a
      flask asyncroute purge State=Failed 'filter[CompletedTime][LT]=2026-01-01'
    """
    filters = [each for each in which if "=" in each]
    if filters and len(filters) < len(which):
        raise fail("Give either ids or filters, not both.", USAGE)
    runner = open_runner()
    task_ids = list(dict.fromkeys(which))
    if filters:
        # Only the tasks that the question counts are removed.
        query = parse_filters(filters)
        query = replace(query, conditions=(*query.conditions, IS_COMPLETED))
        task_ids = [task.id for task in matching(runner.store, query)]
    if not task_ids:
        click.echo("No task matches.", err=True)
        return
    if len(task_ids) > 1 and not yes:
        _ask(f"Remove {len(task_ids):,} tasks?")
    removed = 0

    def purge_one(task_id: str) -> None:
        nonlocal removed
        if not purge_task(runner.store, runner.lifecycle, find(runner, task_id)):
            raise not_found(runner, task_id)
        removed += 1

    try:
        for_each(task_ids, purge_one)
    finally:
        click.echo(f"Removed {removed:,} of {len(task_ids):,} tasks.")


def _ask(question: str) -> None:
    try:
        click.confirm(question, abort=True, err=True)
    except click.Abort:
        raise fail(
            "Nothing was removed. To remove the tasks without a question, add --yes."
        ) from None


@click.command(short_help="Send the callbacks of finished tasks again.")
@click.argument("task_ids", metavar="ID...", nargs=-1, required=True)
def redeliver(task_ids: tuple[str, ...]) -> None:
    """Send the callbacks of finished tasks again, with the same webhook-id.

    A process that serves the app sends them.

    \b
    Example:
      flask asyncroute redeliver 6f1c1c5e-90c1-4e3b-a1b1-9b8f7d2c3e4a
    """
    runner = open_runner()

    def redeliver_one(task_id: str) -> None:
        task = find(runner, task_id)
        route = runner.routes.get(task.endpoint)
        callback = None if route is None else route.options.callback
        if runner.sender.redeliver(task, callback) is None:
            raise not_found(runner, task_id)
        click.echo(f"The callback of task {task.id} will be sent again.")

    for_each(task_ids, redeliver_one)


@click.command("init-db")
def init_db() -> None:
    """Create missing tables in the database of ASYNCROUTE_STORE.

    Also creates them if ASYNCROUTE_CREATE_TABLES is False, so that only the deployment needs the
    right to create tables. Existing tables stay as they are.

    \b
    Example:
      flask asyncroute init-db
    """
    config = current_runtime().prepare()
    if not stores.kind_of(config.store).is_shared:
        raise ConfigurationError("ASYNCROUTE_STORE is memory://, which has no tables.")
    store = new_store(current_app, replace(config, create_tables=True))
    try:
        with errors_printed_once():
            store.open()
        click.echo(f"{store.label} has the tables of flask_asyncroute.")
    finally:
        store.close()
