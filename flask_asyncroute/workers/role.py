"""Which waiting tasks a process takes from the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..executors.registry import kind_of
from ..routes import Route
from ..stores.base import TaskStore
from ..task import now_us


@dataclass(frozen=True, slots=True)
class Role:
    endpoints: frozenset[str]  # the endpoints whose tasks this process takes
    slots: int | None = None  # tasks of each pool to run at once; None: ``max_workers``
    is_worker: bool = False  # whether this process only runs tasks; see `cli.worker`

    def takes(self, route: Route) -> bool:
        """Return whether this process takes the tasks of a route, or is the only one that can."""
        kind = kind_of(route.options.executor)
        return route.endpoint in self.endpoints or (kind.is_bound and not kind.runs_inline)


def endpoints_of(role: Role, routes: Mapping[str, Route], is_celery_worker: bool) -> frozenset[str]:
    """Return the endpoints whose tasks a process runs, for the list of workers."""

    def runs(route: Route) -> bool:
        kind = kind_of(route.options.executor)
        if is_celery_worker:
            return kind.runs_elsewhere
        return route.endpoint in role.endpoints or (kind.is_bound and not role.is_worker)

    return frozenset(name for name, route in routes.items() if runs(route))


def runs_in_any_worker(route: Route) -> bool:
    """Return whether any process of the app can run the tasks of a route."""
    kind = kind_of(route.options.executor)
    return not kind.is_bound and not kind.runs_elsewhere


def role_of_server(routes: Mapping[str, Route], run_tasks: bool) -> Role:
    """Return the role of a process that serves requests.

    :param run_tasks: the value of ``ASYNCROUTE_RUN_TASKS``.
    """
    taken = [name for name, route in routes.items() if run_tasks and runs_in_any_worker(route)]
    return Role(frozenset(taken))


def count_waiting(store: TaskStore, endpoints: list[str], most: int) -> int:
    """Return how many tasks of these endpoints wait and are due; at most ``most``."""
    limits = dict.fromkeys(endpoints, most)
    return min(len(store.waiting(limits, now_us(), store.now_us())), most)
