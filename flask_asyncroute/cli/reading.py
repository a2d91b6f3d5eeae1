"""The commands that only read: ``routes``, ``list``, ``show`` and ``workers``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import click
from flask import current_app

from ..encoding import encode_json
from ..executors.registry import kind_of
from ..query import Query, position_of
from ..routes import Route
from ..runtime import current_runtime
from ..stores.base import SharedTaskStore, TaskStore
from ..task import AsyncRouteTask, moment, now_us
from ..workers import process_lock
from .base import find, open_runner
from .params import complete_filter, parse_filters
from .text import cut, echo_json, preview, print_fields, print_table

PAGE = 200
MOST_IN_LIST = 500
MOST_IN_FIELD = 2000  # characters
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, with one object per line in lists."
)


@click.command()
@json_option
def routes(as_json: bool) -> None:
    """List the async routes of the app. Needs no store.

    \b
    Example:
      flask asyncroute routes
    """
    runtime = current_runtime()
    runtime.prepare()
    found = [_route_object(route) for route in runtime.routes.values()]
    if as_json:
        for each in found:
            echo_json(each)
        return
    if not found:
        click.echo("The app has no async routes.", err=True)
        return
    rows = [
        [
            each["Endpoint"], " ".join(each["Methods"]), " ".join(each["Rules"]), each["Executor"],
            str(each["MaxWorkers"]), _seconds(each["Timeout"]),
        ]
        for each in found
    ]  # fmt: skip
    header = ("Endpoint", "Methods", "Rule", "Executor", "Workers", "Timeout")
    print_table(header, rows, whole=("Endpoint",))


@click.command("list")
@click.argument("filters", metavar="[FILTER]...", nargs=-1, shell_complete=complete_filter)
@click.option(
    "--limit", type=click.IntRange(1), default=50, show_default=True, help="Show at most this many."
)
@click.option("--all", "is_all", is_flag=True, help="Show all tasks that match.")
@click.option(
    "--sort", metavar="FIELD", help="CreationTime, StartingTime or CompletedTime; with a leading "
    "'-' the newest first. Default: -CreationTime.",
)  # fmt: skip
@json_option
def list_tasks(
    filters: tuple[str, ...], limit: int, is_all: bool, sort: str | None, as_json: bool
) -> None:
    """List tasks that match all filters, the newest first.

    A filter is a condition as in a query of the HTTP API, such as State=Failed. For another
    comparison, write filter[FIELD][OPERATOR]=VALUE. Results over 64 KiB are left out; see 'show'.

    \b
    Examples:
      flask asyncroute list
      flask asyncroute list State=Failed --limit 10
      flask asyncroute list 'filter[Error][LIKE]=timeout*' 'filter[State][EQ]=Failed'
      flask asyncroute list User=ann --all --json | jq .Error
    """
    query = parse_filters(filters, sort)
    most = None if is_all else limit
    found = islice(matching(open_runner().store, query, most), most)
    if as_json:
        for task in found:
            echo_json(task.to_wire())
        return
    now = now_us()
    rows = [
        [
            task.id, task.state.value, percent(task), duration(task, now), task.async_route_id,
            cut(detail(task), MOST_IN_LIST), task.user or "", short_time(task.created_us),
        ]
        for task in found
    ]  # fmt: skip
    if not rows:
        click.echo("No task matches." if filters else "There are no tasks.", err=True)
        return
    header = ("Id", "State", "%", "Took", "Route", "Detail", "User", "Created (UTC)")
    print_table(header, rows, whole=("Id", "State", "%", "Took", "Created (UTC)"))


@click.command()
@click.argument("task_id", metavar="ID")
@json_option
def show(task_id: str, as_json: bool) -> None:
    """Show all fields of a task. Text over 2000 characters is cut, but not with --json.

    \b
    Examples:
      flask asyncroute show 6f1c1c5e-90c1-4e3b-a1b1-9b8f7d2c3e4a
      flask asyncroute show 6f1c1c5e-90c1-4e3b-a1b1-9b8f7d2c3e4a --json | jq .Result
    """
    task = find(open_runner(), task_id)
    if as_json:
        echo_json(task.to_wire())
        return
    fields = task.to_wire()
    if task.result_json is not None:
        fields["Result"] = preview(task.result_json, MOST_IN_FIELD)
    print_fields((name, _value(name, value)) for name, value in fields.items())


@click.command(short_help="List the processes that run tasks.")
@json_option
def workers(as_json: bool) -> None:
    """List the processes that run tasks, with the number of tasks that each holds.

    Whether a process is running can be detected only on its own host.

    \b
    Example:
      flask asyncroute workers
    """
    store = open_runner().store
    assert isinstance(store, SharedTaskStore)
    found: list[dict[str, Any]] = [
        {
            "Name": worker.name,
            "IsRunning": process_lock.is_running(worker.process),
            "Tasks": len(store.workers.held(worker.name)),
            "Endpoints": sorted(worker.endpoints),
        }
        for worker in store.workers.listed()
    ]
    if as_json:
        for each in found:
            echo_json(each)
        return
    if not found:
        click.echo("No process runs tasks of this app at the moment.", err=True)
        return
    states = {True: "running", False: "dead", None: "on another host"}
    rows = [
        [each["Name"], states[each["IsRunning"]], str(each["Tasks"]), ", ".join(each["Endpoints"])]
        for each in found
    ]
    print_table(("Name", "Process", "Tasks", "Endpoints"), rows, whole=("Name",))


def matching(store: TaskStore, query: Query, most: int | None = None) -> Iterator[AsyncRouteTask]:
    """Yield the tasks that match, page by page.

    :param most: how many of them the caller uses; None: all.
    """
    position = None
    size = PAGE if most is None else min(most, PAGE)
    while True:
        page = store.query(query.conditions, query.sort, size, position, None)
        yield from page
        if len(page) < size:
            return
        position = position_of(page[-1], query.sort)


def percent(task: AsyncRouteTask) -> str:
    return "" if task.progress is None else f"{task.progress:g}"


def duration(task: AsyncRouteTask, now: int) -> str:
    """Return how long a task has run; for a task without a start, how long it has waited."""
    if task.started_us is None:
        waited = (task.completed_us or now) - task.created_us
        return f"waited {_seconds(waited / 1_000_000)}"
    return _seconds(((task.completed_us or now) - task.started_us) / 1_000_000)


def detail(task: AsyncRouteTask) -> str:
    return task.error or task.progress_message or task.last_error or ""


def short_time(microseconds: int) -> str:
    return moment(microseconds).strftime("%Y-%m-%d %H:%M:%S")


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "none"
    seconds = max(seconds, 0.0)  # the clocks of two hosts can differ
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _value(name: str, value: Any) -> str:
    text = value if isinstance(value, str) else encode_json(value).decode()
    return text if name == "Result" else cut(text, MOST_IN_FIELD)


def _route_object(route: Route) -> dict[str, Any]:
    rules = list(current_app.url_map.iter_rules(route.endpoint))
    methods = set().union(*(rule.methods or () for rule in rules)) - {"HEAD", "OPTIONS", "TRACE"}
    options = route.options
    return {
        "Endpoint": route.endpoint,
        "Methods": sorted(methods),
        "Rules": [rule.rule for rule in rules],
        "Executor": kind_of(options.executor).name,
        "MaxWorkers": options.max_workers,
        "Timeout": None if options.timeout is None else options.timeout / 1_000_000,
        "Cancellable": options.cancellable,
    }
