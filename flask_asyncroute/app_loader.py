"""Find and load the app by its import path, for child processes (``executor="process"``)."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigurationError
from .validators import refuse

if TYPE_CHECKING:
    from flask import Flask

_EXAMPLES = "'package.module:app' or 'package:create_app()'"
_REMEDY = f"Set ASYNCROUTE_APP to the import path of the app, such as {_EXAMPLES}."


def checked(label: str, value: Any) -> str:
    """Check the syntax of an import path, such as ``package.module:app``, and return it.

    :param label: the configuration key, for error messages.
    :raises ConfigurationError: if the syntax is invalid.
    """
    pattern = r"[^\W\d]\w*(\.[^\W\d]\w*)*(:[^\W\d]\w*(\(.*\))?)?"
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise refuse(label, _EXAMPLES, value)
    return value


def found(app: Flask, given: str | None) -> str:
    """Return the import path from which a child process can load ``app``.

    The module is not imported, and no factory is called. The first child process reports such
    errors.

    :param given: the configured path; None: ``app.import_name``.
    :raises ConfigurationError: if the module or the app is not found.
    """
    path = given or app.import_name
    module, _, name = path.partition(":")
    if module == "__main__":
        _check_names(module, name, path)
        script = _name_of_script()
        if script is None:
            raise ConfigurationError(
                f"The app {app.name!r} is in __main__, and a child process cannot import the "
                f"script that was started. {_REMEDY}"
            )
        return f"{script}:{name}" if name else script
    if module in sys.modules:
        _check_names(module, name, path)
    elif not _exists(module):
        raise ConfigurationError(f"ASYNCROUTE_APP: the module {module!r} was not found. {_REMEDY}")
    return path


def load(path: str) -> Flask:
    """Import and return the app at an import path.

    :raises ConfigurationError: if the import fails. The message names ``ASYNCROUTE_APP`` and the
        cause.
    """
    from flask.cli import locate_app

    module, _, name = path.partition(":")
    try:
        with without_servers():
            return locate_app(module, name or None)
    except (Exception, SystemExit) as error:
        raise ConfigurationError(
            f"ASYNCROUTE_APP: loading {path!r} failed: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def without_servers() -> Iterator[None]:
    """Within the block, make ``app.run()`` return at once, as under ``flask run``."""
    before = os.environ.get("FLASK_RUN_FROM_CLI")
    os.environ["FLASK_RUN_FROM_CLI"] = "true"
    try:
        yield
    finally:
        os.environ.pop("FLASK_RUN_FROM_CLI", None)
        if before is not None:
            os.environ["FLASK_RUN_FROM_CLI"] = before


def _name_of_script() -> str | None:
    """Return the module name with which a child process can import the script that was started.

    :return: None if the script cannot be imported by a name.
    """
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:  # started with python -m package.module
        return str(spec.name)
    file = getattr(main, "__file__", None)
    if file is None:  # in the interactive shell
        return None
    name = Path(file).stem
    try:
        spec = find_spec(name) if name.isidentifier() else None
    except ValueError:  # the module of this name was not imported from a file
        return None
    return name if spec is not None and spec.origin == str(Path(file).absolute()) else None


def _check_names(module: str, name: str, path: str) -> None:
    """Raise ConfigurationError if `flask.cli.locate_app` would find no app in an imported module.

    :param name: the app or the factory call in the import path; empty: a usual name.
    """
    from flask import Flask

    names = vars(sys.modules[module])
    wanted = name.partition("(")[0]
    if wanted:
        if not hasattr(sys.modules[module], wanted):
            raise ConfigurationError(
                f"ASYNCROUTE_APP: the module {module!r} has no {wanted!r}. {_REMEDY}"
            )
        return
    has_app = (
        any(isinstance(names.get(usual), Flask) for usual in ("app", "application"))
        or any(callable(names.get(usual)) for usual in ("create_app", "make_app"))
        or sum(isinstance(value, Flask) for value in names.values()) == 1
    )
    if not has_app:
        raise ConfigurationError(
            f"The module {path!r} contains neither an app nor create_app(). {_REMEDY}"
        )


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
