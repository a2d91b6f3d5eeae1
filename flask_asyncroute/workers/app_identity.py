"""Detect different apps that use the same namespace of a store. They would run each other's tasks.

A runner holds the threads and the store of one app in one process. If two apps in one process
conflict, the older app raises an error. If the apps are in different processes, `recovery` only
logs a warning, because the apps can be two releases of one app.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from flask import Flask

from ..config import Config
from ..errors import ConfigurationError
from ..routes import Route
from ..stores.base import TaskStore

Views = Mapping[str, Sequence[str]]
"""Describes an app: maps each endpoint to import name, root path and full name of the view."""


class Runner(Protocol):
    """The attributes of `runner.Runner` that this module uses."""

    # Importing that class would be circular.

    app: Flask
    config: Config
    routes: Mapping[str, Route]
    store: TaskStore
    superseded_by: Callable[[], Runner | None]


_opened: weakref.WeakValueDictionary[int, Runner] = weakref.WeakValueDictionary()
"""The runners in this process whose store is open."""


def views_of(app: Flask, routes: Mapping[str, Route]) -> Views:
    """Describe an app, so that other processes can compare it with theirs."""
    return {
        endpoint: [
            app.import_name,
            app.root_path,
            f"{route.view.__module__}.{route.view.__qualname__}",
        ]
        for endpoint, route in routes.items()
    }


def difference(ours: Views, theirs: Views) -> str | None:
    """Describe the first difference between two apps. Return None if they seem to be the same app.

    Endpoints that only one of the apps has are ignored.
    """
    if not ours or not theirs:
        return None
    (name, path, _), (other_name, other_path, _) = (
        next(iter(views.values())) for views in (ours, theirs)
    )
    if name != other_name:
        return f"the import name is {name!r} and {other_name!r}"
    if path != other_path:
        return f"the root path is {path!r} and {other_path!r}"
    for endpoint in sorted(ours.keys() & theirs.keys()):
        view, other = ours[endpoint][2], theirs[endpoint][2]
        if view != other:
            return f"the view of the endpoint {endpoint!r} is {view} and {other}"
    return None


def supersede_others(runner: Runner) -> None:
    """Register a runner (the threads and the store of an app in this process) after opening its
    store.

    From now on, :func:`refuse_superseded` raises an error for older runners of other apps that use
    the same namespace of the same store. Call :func:`leave` to end this.
    """
    # Register first: if two runners register at once, both are then refused.
    _opened[id(runner)] = runner
    # The secret identifies the store and the namespace.
    secret = runner.store.secret()
    for other in list(_opened.values()):
        if other.app is not runner.app and other.store.secret() == secret:
            other.superseded_by = weakref.ref(runner)


def refuse_superseded(runner: Runner) -> None:
    """Raise ConfigurationError if another app in this process has since opened the same namespace.

    The message names both apps and the key to change.
    """
    # Only the older app is refused, so a test suite can use several apps in turn, even if older
    # ones stay alive.
    if _successor(runner) is not None:
        # Free a newer app that only a reference cycle keeps alive.
        gc.collect()
    newer = _successor(runner)
    if newer is not None:
        raise ConfigurationError(
            f"Two apps in this process, {runner.app.name!r} and {newer.app.name!r}, use the "
            f"namespace {runner.config.namespace!r} of the store {runner.store.label}. Each would "
            "run the other's tasks. Set another ASYNCROUTE_NAMESPACE for one of them."
        )


def leave(runner: Runner) -> None:
    """Unregister a runner. Call this when it is closed, and in a child process after a fork."""
    _opened.pop(id(runner), None)


def _successor(runner: Runner) -> Runner | None:
    newer = runner.superseded_by()
    return newer if newer is not None and id(newer) in _opened else None
