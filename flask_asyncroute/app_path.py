"""``ASYNCROUTE_APP``: from where another process can load the app. Checked at first use, used by children."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .checks import refuse
from .errors import ConfigurationError

if TYPE_CHECKING:
    from flask import Flask

_EXAMPLES = "'package.module:app' or 'package:create_app()'"
_REMEDY = f"Set ASYNCROUTE_APP to where other processes find the app, such as {_EXAMPLES}."


def checked(label: str, value: Any) -> str:
    """Accept a module, with or without the name of an app or the call of a factory in it."""
    if not isinstance(value, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*(:[^\W\d]\w*(\(.*\))?)?", value):
        raise refuse(label, _EXAMPLES, value)
    return value


def found(app: Flask, given: str | None) -> str:
    """Return from where to load ``app``: as the key says, else its import name.

    Nothing is imported or called. What cannot be seen without that is told by the first child.

    :raises ConfigurationError: where it can be seen that the app is not there.
    """
    path = given or app.import_name
    module, _, name = path.partition(":")
    if module == "__main__":
        raise ConfigurationError(
            f"The app {app.name!r} is in __main__, the script that was started, which a child process cannot load. {_REMEDY}"
        )
    if module in sys.modules:
        _check_names(module, name, path)
    elif not _is_there(module):
        raise ConfigurationError(f"ASYNCROUTE_APP: there is no module {module!r} to load the app from. {_REMEDY}")
    return path


def load(path: str) -> Flask:
    """Import and return the app.

    :raises ConfigurationError: naming the key and what went wrong.
    """
    from flask.cli import locate_app

    module, _, name = path.partition(":")
    try:
        return locate_app(module, name or None)
    except (Exception, SystemExit) as error:
        raise ConfigurationError(
            f"ASYNCROUTE_APP: {path!r} does not give an app: {type(error).__name__}: {error}"
        ) from error


def _check_names(module: str, name: str, path: str) -> None:
    """Refuse a module that is imported and has no such app."""
    from flask import Flask

    held = vars(sys.modules[module])
    wanted = name.partition("(")[0]
    if wanted:
        if wanted not in held and not hasattr(sys.modules[module], wanted):
            raise ConfigurationError(f"ASYNCROUTE_APP: the module {module!r} has no {wanted!r}. {_REMEDY}")
    elif not any(isinstance(held.get(usual), Flask) for usual in ("app", "application")) and not any(
        callable(held.get(usual)) for usual in ("create_app", "make_app")
    ):
        if sum(isinstance(value, Flask) for value in held.values()) != 1:
            raise ConfigurationError(f"In {path!r} neither an app nor create_app() is found. {_REMEDY}")


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
