"""Who may read and who may write a task, as values. `dispatcher` and `http.operations` ask; nothing here knows Flask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from .errors import ConfigurationError
from .names import is_name, plain

KINDS = ("users", "groups", "roles", "scopes")


class Access(msgspec.Struct, frozen=True, rename="pascal"):
    """A set of people: all whose id, or one of whose groups, roles or scopes, is named.

    Names match exactly. At most 255 characters each; a member of an Enum that is a text counts by its value.

    :param users: ids of users.
    :raises ConfigurationError: for anything that is not a sequence of such names.
    """

    users: Sequence[str] = ()
    groups: Sequence[str] = ()
    roles: Sequence[str] = ()
    scopes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for kind in KINDS:
            names = getattr(self, kind)
            if isinstance(names, str) or not isinstance(names, (list, tuple, set, frozenset)):
                raise ConfigurationError(f"Access({kind}=…) takes a sequence of names, not {names!r}.")
            for name in names:
                if not is_name(name):
                    raise ConfigurationError(
                        f"Access({kind}=…): {name!r} is not a name of 1 to 255 characters, without NUL and in valid Unicode."
                    )
            texts = tuple(map(plain, names))
            msgspec.structs.force_setattr(
                self, kind, tuple(sorted(set(texts))) if isinstance(names, (set, frozenset)) else texts
            )

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for kind in KINDS:
            for name in getattr(self, kind):
                yield kind, name


class Permission(msgspec.Struct, frozen=True, rename="pascal"):
    """Who, beside its owner, may read a task and who may stop it. Write implies read."""

    read: Access = Access()
    write: Access = Access()

    def __post_init__(self) -> None:
        for side in ("read", "write"):
            if not isinstance(getattr(self, side), Access):
                raise ConfigurationError(f"Permission({side}=…) takes an Access, not {getattr(self, side)!r}.")

    def to_dict(self) -> dict[str, dict[str, list[str]]]:
        """Return both sides as the task object has them."""
        sides = (("Read", self.read), ("Write", self.write))
        return {side: {kind.capitalize(): list(getattr(access, kind)) for kind in KINDS} for side, access in sides}

    def with_owner(self, user: str) -> Permission:
        """Return this permission with the owner among the users of both sides."""

        def add(access: Access) -> Access:
            users = access.users if user in access.users else (user, *access.users)
            return Access(users, access.groups, access.roles, access.scopes)

        return Permission(add(self.read), add(self.write))


class Caller(msgspec.Struct, frozen=True):
    """Who makes a request, as the identity loader told it."""

    id: str
    groups: frozenset[str] = frozenset()
    roles: frozenset[str] = frozenset()
    scopes: frozenset[str] = frozenset()

    def is_in(self, access: Access) -> bool:
        """Return whether this caller is one of those whom ``access`` names."""
        return (
            self.id in access.users
            or not self.groups.isdisjoint(access.groups)
            or not self.roles.isdisjoint(access.roles)
            or not self.scopes.isdisjoint(access.scopes)
        )

    def names(self) -> Iterator[tuple[str, str]]:
        """Yield each (kind, name) under which this caller may have been granted something."""
        yield "users", self.id
        for kind in KINDS[1:]:
            for name in sorted(getattr(self, kind)):
                yield kind, name


def may_read(caller: Caller | None, owner: str | None, permission: Permission | None, admins: Access) -> bool:
    """Return whether ``caller`` may see a task of ``owner``. What nobody owns, everybody who knows its id may see."""
    if owner is None:
        return True
    if caller is None:
        return False
    if caller.id == owner or caller.is_in(admins):
        return True
    return permission is not None and (caller.is_in(permission.read) or caller.is_in(permission.write))


def may_list(
    caller: Caller | None, owner: str | None, permission: Permission | None, admins: Access, with_anonymous: bool
) -> bool:
    """Return whether a list of ``caller`` has a task of ``owner``.

    :param with_anonymous: whether lists have tasks that nobody owns; those of admins always do.
    """
    if owner is None:
        return with_anonymous or (caller is not None and caller.is_in(admins))
    return may_read(caller, owner, permission, admins)


def may_write(caller: Caller | None, owner: str | None, permission: Permission | None, admins: Access) -> bool:
    """Return whether ``caller`` may stop or purge a task of ``owner``."""
    if owner is None:
        return True
    if caller is None:
        return False
    if caller.id == owner or caller.is_in(admins):
        return True
    return permission is not None and caller.is_in(permission.write)
