"""The app's Celery app: where it comes from, and whether its broker is on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import unquote, urlsplit

from celery import Celery
from flask import Flask
from werkzeug.utils import import_string

from ..errors import ConfigurationError

EXTENSION = "celery"
"""The key of the Celery app in ``app.extensions``, as in Flask's documentation."""


def create_celery(app: Flask, settings: Mapping[str, Any]) -> None:
    """Set ``app.extensions["celery"]`` to a Celery app with these settings.

    :raises ConfigurationError: if the app has another Celery app.
    """
    if EXTENSION in app.extensions:
        raise ConfigurationError(
            'ASYNCROUTE_CELERY contains settings, but app.extensions["celery"] is already set. '
            "Remove one of them."
        )
    celery = Celery(app.import_name, set_as_current=False)
    celery.config_from_object(dict(settings))
    celery.flask_app = app  # a worker's module may keep only the Celery app
    app.extensions[EXTENSION] = celery


def find_celery(app: Flask, setting: Celery | str | Mapping[str, Any] | None) -> Celery:
    """Return the Celery app that ``ASYNCROUTE_CELERY`` names, else ``app.extensions["celery"]``.

    :raises ConfigurationError: if the app has no usable Celery app.
    """
    found: Any = setting
    if isinstance(setting, str):
        try:
            found = import_string(setting)
        except ImportError as error:
            raise ConfigurationError(
                f"ASYNCROUTE_CELERY: {setting!r} cannot be imported: {error}. Use the import path "
                "of the Celery app, such as 'package.module:celery'."
            ) from error
    elif setting is None or isinstance(setting, Mapping):
        if isinstance(setting, Mapping) and EXTENSION not in app.extensions:
            create_celery(app, setting)
        found = app.extensions.get(EXTENSION)
        if found is None:
            raise ConfigurationError(
                'A route has executor="celery", but the app has no Celery app. Set '
                'ASYNCROUTE_CELERY, or app.extensions["celery"] as in Flask\'s documentation.'
            )
    if not isinstance(found, Celery):
        raise ConfigurationError(
            f"ASYNCROUTE_CELERY must be a Celery app, its import path or Celery settings, not "
            f"{type(found).__name__}."
        )
    if found.conf.task_always_eager:
        raise ConfigurationError(
            'The Celery setting task_always_eager does not work with executor="celery". In tests, '
            "use flask_asyncroute.testing.inline()."
        )
    return found


def is_local(celery: Celery) -> bool:
    """Return whether the broker is on this machine, or all brokers are if there are several."""
    connection = celery.connection_for_write()
    urls = [connection.as_uri(), *filter(None, connection.alt)]
    return all(_is_local(urlsplit(url).hostname) for url in urls)


def _is_local(host: str | None) -> bool:
    if host is None or host == "localhost":
        return True
    try:
        return ip_address(unquote(host)).is_loopback
    except ValueError:
        return False
