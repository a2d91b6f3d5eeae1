"""Who makes the present request: what the app's identity loader says, else Flask-Login's user, as a `Caller`.

`dispatcher` asks, in the request. Whatever the app gives, only ids and names that can be stored and compared come out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import CannotStart
from .names import can_be_stored, is_name, name_of
from .permissions import Caller
from .typing import IdentityLoader

if TYPE_CHECKING:
    from flask import Flask


def identify(app: Flask, loader: IdentityLoader | None, id_field: str) -> Caller | None:
    """Return who makes the present request: what the app's identity loader says, else Flask-Login's user.

    :raises CannotStart: for an identity without a usable id.
    """
    if loader is not None:
        identity = loader()
    elif hasattr(app, "login_manager"):
        from flask_login import current_user

        identity = current_user._get_current_object() if current_user.is_authenticated else None
        if identity is not None and id_field == "id":
            return Caller(
                _user_id(identity.get_id()), *(_names(identity, kind) for kind in ("groups", "roles", "scopes"))
            )
    else:
        return None
    if identity is None:
        return None
    return Caller(
        _user_id(_field(identity, id_field)), *(_names(identity, kind) for kind in ("groups", "roles", "scopes"))
    )


def _field(identity: Any, name: str) -> Any:
    return identity.get(name) if isinstance(identity, Mapping) else getattr(identity, name, None)


def _user_id(value: Any) -> str:
    try:
        user = name_of(value)
    except ValueError:
        user = ""
    if not is_name(user):
        raise CannotStart(
            "The identity loader returned an identity whose id is missing, not 1 to 255 characters long, or holds a NUL or "
            "invalid Unicode; see ASYNCROUTE_USER_ID_FIELD."
        )
    return user


def _names(identity: Any, kind: str) -> frozenset[str]:
    held = _field(identity, kind)
    if held is None:
        return frozenset()
    if isinstance(held, (str, bytes)):
        raise CannotStart(f"The identity's {kind} must be a list of names, not one text.")
    try:
        names = frozenset(map(name_of, held))
        is_fit = can_be_stored("".join(names))
    except (TypeError, ValueError):
        is_fit = False
    if not is_fit:
        raise CannotStart(
            f"The identity's {kind} must be a list of names, without NUL and in valid Unicode, not {held!r:.80}."
        )
    return names
