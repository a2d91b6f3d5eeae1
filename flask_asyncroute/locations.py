"""Where the operations of a task are found: paths, absolute on their host. Ids need no escaping."""

from __future__ import annotations

from .config import Config


def task_path(config: Config, root_path: str, task_id: str) -> str:
    """Return the path under which a task can be got.

    :param root_path: what the server has mounted the app under (SCRIPT_NAME).
    """
    return _path(config, root_path, task_id, "")


def events_path(config: Config, root_path: str, task_id: str) -> str:
    """Return the path of a task's events."""
    return _path(config, root_path, task_id, "/events")


def _path(config: Config, root_path: str, task_id: str, end: str) -> str:
    base = f"{root_path}{config.url_prefix}{config.task_path}"
    if "path" in config.task_id_in:
        return f"{base}/{task_id}{end}"
    if "query" in config.task_id_in:
        return f"{base}{end}?{config.task_id_name}={task_id}"
    return base + end
