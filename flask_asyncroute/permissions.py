"""Permissions to read and write tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from .validators import instance_of, names

KINDS = ("users", "groups", "roles", "scopes")


class Access(msgspec.Struct, frozen=True, rename="pascal"):
    """The callers that have one of the listed user ids, groups, roles or scopes.

    Names are case-sensitive and have at most 255 characters. A string Enum member is replaced by
    its value.

    :raises ConfigurationError: if a parameter is not a list, tuple or set of such names.
    """

    users: Sequence[str] = ()
    groups: Sequence[str] = ()
    roles: Sequence[str] = ()
    scopes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for kind in KINDS:
            given = getattr(self, kind)
            is_set = isinstance(given, (set, frozenset))
            texts = names(f"Access({kind}=…)", list(given) if is_set else given)
            if is_set:
                texts = tuple(sorted(texts))
            msgspec.structs.force_setattr(self, kind, texts)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return ((kind, name) for kind in KINDS for name in getattr(self, kind))


class Permission(msgspec.Struct, frozen=True, rename="pascal"):
    """The callers that may read or stop a task, besides the user who started it.

    :param read: the callers that may read the task.
    :param write: the callers that may read and stop the task.
    """

    read: Access = Access()
    write: Access = Access()

    def __post_init__(self) -> None:
        check = instance_of(Access, "an Access")
        check("Permission(read=…)", self.read)
        check("Permission(write=…)", self.write)

    def to_dict(self) -> dict[str, dict[str, list[str]]]:
        """Return the ``Permission`` field of the task object."""
        return {
            side: {kind.capitalize(): list(getattr(access, kind)) for kind in KINDS}
            for side, access in (("Read", self.read), ("Write", self.write))
        }

    def with_owner(self, user: str) -> Permission:
        """Return a copy in which the user who started the task may read and write."""

        def add(access: Access) -> Access:
            if user in access.users:
                return access
            return msgspec.structs.replace(access, users=(user, *access.users))

        return Permission(add(self.read), add(self.write))


class Caller(msgspec.Struct, frozen=True):
    """The user or service that sent a request, as found by the identity loader or Flask-Login."""

    id: str
    groups: frozenset[str] = frozenset()
    roles: frozenset[str] = frozenset()
    scopes: frozenset[str] = frozenset()

    def is_in(self, access: Access) -> bool:
        return (
            self.id in access.users
            or not self.groups.isdisjoint(access.groups)
            or not self.roles.isdisjoint(access.roles)
            or not self.scopes.isdisjoint(access.scopes)
        )

    def names(self) -> Iterator[tuple[str, str]]:
        """Yield pairs of kind and name, such as ``("groups", "staff")``, for the caller.

        The kinds are users, groups, roles and scopes. The caller's id comes first, as ``("users",
        id)``.
        """
        yield "users", self.id
        for kind in KINDS[1:]:
            for name in sorted(getattr(self, kind)):
                yield kind, name


def is_anonymous(owner: str | None, permission: Permission | None) -> bool:
    """Return whether a task has neither an owner nor a permission."""
    return owner is None and permission is None


def may_write(
    caller: Caller | None, owner: str | None, permission: Permission | None, admins: Access
) -> bool:
    """Check whether ``caller`` may stop or remove a task.

    Everyone who knows the id of an anonymous task may do both; see :func:`is_anonymous`.

    :param owner: the user who started the task; None: unknown.
    """
    if is_anonymous(owner, permission):
        return True
    if caller is None:
        return False
    if caller.id == owner or caller.is_in(admins):
        return True
    return permission is not None and caller.is_in(permission.write)


def may_read(
    caller: Caller | None, owner: str | None, permission: Permission | None, admins: Access
) -> bool:
    if may_write(caller, owner, permission, admins):
        return True
    return caller is not None and permission is not None and caller.is_in(permission.read)


def may_list(
    caller: Caller | None,
    owner: str | None,
    permission: Permission | None,
    admins: Access,
    with_anonymous: bool,
) -> bool:
    """Check whether ``caller`` sees a task in lists.

    :param owner: the user who started the task; None: unknown.
    :param with_anonymous: whether lists contain anonymous tasks. ``admins`` always see these tasks.
    """
    if is_anonymous(owner, permission):
        return with_anonymous or (caller is not None and caller.is_in(admins))
    return may_read(caller, owner, permission, admins)
