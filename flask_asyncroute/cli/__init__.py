"""The commands of ``flask asyncroute``."""

from __future__ import annotations

from flask.cli import AppGroup

from .worker import worker

group = AppGroup("asyncroute", help="Operate the async routes of this app.")
group.add_command(worker)
