"""Identify callers with the app's identity loader or Flask-Login."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, TypeAlias

from flask import Flask

from ..errors import CannotStart
from ..permissions import KINDS, Caller
from ..validators import can_be_stored, is_name, name_of

IdentityLoader: TypeAlias = Callable[[], Any]


def identify(
    app: Flask, loader: IdentityLoader | None, id_field: str, is_start: bool = False
) -> Caller | None:
    """Return the caller of the current request, or None if the caller is unknown.

    The app's identity loader finds the caller. Without a loader, the caller is Flask-Login's user.

    :param is_start: whether the request starts a task. In other requests, a caller with an invalid
        id is unknown.
    :raises CannotStart: if the identity's groups, roles or scopes are invalid. If the request
        starts a task, also for an invalid id.
    """
    if loader is not None:
        identity = loader()
    elif hasattr(app, "login_manager"):
        from flask_login import current_user

        identity = current_user._get_current_object() if current_user.is_authenticated else None
    else:
        return None
    if identity is None:
        return None
    user_id = _user_id(_id_of(identity, loader, id_field))
    if user_id is None and not is_start:
        return None
    if user_id is None:
        raise CannotStart(
            "The identity loader returned an identity with a missing or invalid id; use 1 to 255 "
            "characters without NUL and in valid Unicode (see ASYNCROUTE_USER_ID_FIELD)."
        )
    return _caller(user_id, identity)


def caller_of(user: Any, loader: IdentityLoader | None, id_field: str) -> Caller:
    """Return the caller for a user that the app's own code names.

    :param user: an id, or an identity as the loader returns it.
    :raises ValueError: if the id is missing or invalid.
    :raises CannotStart: if the identity's groups, roles or scopes are invalid.
    """
    is_id = isinstance(user, (str, int, bytes)) or not (
        isinstance(user, Mapping)
        or hasattr(user, id_field)
        or (loader is None and hasattr(user, "get_id"))
    )
    user_id = _user_id(user if is_id else _id_of(user, loader, id_field))
    if user_id is None:
        raise ValueError(
            f"user={user!r:.80} is not a user id or an identity; use an id of 1 to 255 characters, "
            "or what the identity loader returns (see ASYNCROUTE_USER_ID_FIELD)."
        )
    return Caller(user_id) if is_id else _caller(user_id, user)


def _id_of(identity: Any, loader: IdentityLoader | None, id_field: str) -> Any:
    is_flask_login = loader is None and hasattr(identity, "get_id")
    return identity.get_id() if is_flask_login and id_field == "id" else _field(identity, id_field)


def _caller(user_id: str, identity: Any) -> Caller:
    return Caller(user_id, *(_names(identity, kind) for kind in KINDS[1:]))


def _field(identity: Any, name: str) -> Any:
    return identity.get(name) if isinstance(identity, Mapping) else getattr(identity, name, None)


def _user_id(value: Any) -> str | None:
    try:
        user = name_of(value)
    except ValueError:
        return None
    return user if is_name(user) else None


def _names(identity: Any, kind: str) -> frozenset[str]:
    found = _field(identity, kind)
    if found is None or found == "":
        return frozenset()
    try:
        is_one = isinstance(found, str) or hasattr(found, "name")
        names = frozenset(map(_name, [found] if is_one else found))
        if can_be_stored("".join(names)):
            return names
        problem = "a name contains NUL or invalid Unicode"
    except (TypeError, ValueError) as error:
        problem = str(error)
    raise CannotStart(
        f"The identity's {kind} must be names, or objects with a name."
    ) from TypeError(f"the identity's {kind} are invalid: {problem}")


def _name(value: Any) -> str:
    """Return the name of a group, role or scope.

    :param value: a string, an Enum member, or an object with an attribute ``name``.
    """
    writes_text: Any = type(value).__str__
    if not isinstance(value, Enum) and writes_text is object.__str__:
        name = getattr(value, "name", None)
        if name is None:
            raise TypeError(f"{type(value).__name__} has no attribute 'name'")
        value = name
    return name_of(value)
