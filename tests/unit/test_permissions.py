"""`Access`, `Permission` and `Caller`, and the checks `may_read` and `may_write`."""

from __future__ import annotations

from enum import Enum
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute.errors import ConfigurationError
from flask_asyncroute.permissions import (
    KINDS,
    Access,
    Caller,
    Permission,
    is_anonymous,
    may_read,
    may_write,
)

NOBODY = Access()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "value",
    [
        "anna",
        b"anna",
        5,
        None,
        {"anna": 1},
        iter(["anna"]),
        [5],
        [None],
        [""],
        ["x" * 256],
        [["a"]],
        ["a\0"],
        ["\ud800"],
    ],
)
def test_invalid_names_are_refused(kind: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"Access\({kind}="):
        Access(**{kind: value})


@pytest.mark.parametrize("value", [["b", "a"], ("b", "a"), {"a", "b"}, frozenset({"a", "b"})])
def test_names_become_a_tuple(value: Any) -> None:
    assert set(Access(users=value).users) == {"a", "b"}
    assert type(Access(users=value).users) is tuple
    unordered: Any = {"b", "a"}
    assert Access(users=unordered).users == ("a", "b"), "names of sets are sorted"
    assert hash(Access(users=value)) is not None


def test_subclasses_of_str_become_str() -> None:
    """Encoders do not accept subclasses of ``str``, and ``str()`` of an Enum member is not its
    value.
    """

    class Role(str, Enum):  # noqa: UP042 - StrEnum behaves differently
        ADMIN = "admin"

    class Kind(str):
        pass

    found = Access(roles=(Role.ADMIN, Kind("editor")), groups={Role.ADMIN})
    assert [type(name) for _, name in found] == [str] * 3
    assert (found.roles, found.groups) == (("admin", "editor"), ("admin",))
    assert (
        msgspec.json.decode(msgspec.json.encode(Permission(found)), type=Permission).read == found
    )


def test_a_name_of_255_characters_is_accepted() -> None:
    assert Access(roles=["x" * 255, "\U0001f600" * 255]).roles[0] == "x" * 255


def test_iterating_an_access_yields_kinds_and_names() -> None:
    access = Access(["u"], ["g", "h"], ["r"], ["s"])
    assert list(access) == [
        ("users", "u"),
        ("groups", "g"),
        ("groups", "h"),
        ("roles", "r"),
        ("scopes", "s"),
    ]
    assert list(NOBODY) == []


@pytest.mark.parametrize("side", ["read", "write"])
@pytest.mark.parametrize("value", [None, "anna", ["anna"], {}, Permission()])
def test_read_and_write_must_be_an_access(side: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"Permission\({side}="):
        Permission(**{side: value})


def test_a_permission_round_trips_through_json() -> None:
    permission = Permission(Access(["anna", "é"], ["g"]), Access(roles=["r"], scopes=["s"]))
    encoded = msgspec.json.encode(permission)
    assert msgspec.json.decode(encoded) == {
        "Read": {"Users": ["anna", "é"], "Groups": ["g"], "Roles": [], "Scopes": []},
        "Write": {"Users": [], "Groups": [], "Roles": ["r"], "Scopes": ["s"]},
    }
    assert msgspec.json.decode(encoded, type=Permission) == permission


def test_values_are_frozen() -> None:
    for value, name in ((Access(), "users"), (Permission(), "read"), (Caller("a"), "id")):
        with pytest.raises(AttributeError):
            setattr(value, name, None)


def test_an_owner_is_added_once() -> None:
    assert Permission().with_owner("anna") == Permission(Access(("anna",)), Access(("anna",)))
    both = Permission(Access(("ben", "anna")), Access(("ben",))).with_owner("anna")
    assert both == Permission(Access(("ben", "anna")), Access(("anna", "ben")))


@pytest.mark.parametrize(
    ("access", "is_in"),
    [
        (Access(users=["anna"]), True),
        (Access(users=["Anna"]), False),
        (Access(users=["anna "]), False),
        (Access(users=["g"]), False),
        (Access(groups=["g"]), True),
        (Access(groups=["G"]), False),
        (Access(roles=["g"]), False),
        (Access(scopes=["g"]), False),
        (Access(groups=["anna"]), False),
        (Access(roles=["r"]), True),
        (Access(scopes=["s", "t"]), True),
        (Access(["x"], ["x"], ["x"], ["t"]), True),
        (NOBODY, False),
    ],
)
def test_names_match_exactly_and_only_within_their_kind(access: Access, is_in: bool) -> None:
    caller = Caller("anna", frozenset({"g", "h"}), frozenset({"r"}), frozenset({"t"}))
    assert caller.is_in(access) is is_in
    assert bool(set(caller.names()) & set(access)) is is_in


def test_the_names_of_a_caller_are_sorted() -> None:
    caller = Caller("anna", frozenset("hgf"), frozenset("r"), frozenset())
    assert list(caller.names()) == [
        ("users", "anna"),
        ("groups", "f"),
        ("groups", "g"),
        ("groups", "h"),
        ("roles", "r"),
    ]


ANNA, BEN = Caller("anna"), Caller("ben", frozenset({"g"}), frozenset({"admin"}))
BEN_READS, BEN_WRITES = Permission(read=Access(["ben"])), Permission(write=Access(groups=["g"]))


@pytest.mark.parametrize(
    ("caller", "owner", "permission", "admins", "reads", "writes"),
    [
        # Anyone who knows the id may access a task with neither an owner nor a permission.
        (None, None, None, NOBODY, True, True),
        (ANNA, None, None, NOBODY, True, True),
        # A permission applies without an owner too.
        (None, None, BEN_READS, NOBODY, False, False),
        (ANNA, None, BEN_READS, NOBODY, False, False),
        (BEN, None, BEN_READS, NOBODY, True, False),
        (BEN, None, BEN_WRITES, NOBODY, True, True),
        (BEN, None, Permission(), Access(roles=["admin"]), True, True),
        # The owner may access a task; others and anonymous callers may not.
        (ANNA, "anna", None, NOBODY, True, True),
        (None, "anna", None, NOBODY, False, False),
        (BEN, "anna", None, NOBODY, False, False),
        (Caller("Anna"), "anna", None, NOBODY, False, False),
        # The permission grants access. Write implies read, but not the reverse.
        (BEN, "anna", BEN_READS, NOBODY, True, False),
        (BEN, "anna", BEN_WRITES, NOBODY, True, True),
        (ANNA, "anna", BEN_READS, NOBODY, True, True),
        (Caller("carl"), "anna", BEN_WRITES, NOBODY, False, False),
        (None, "anna", BEN_WRITES, NOBODY, False, False),
        # Admins.
        (BEN, "anna", None, Access(roles=["admin"]), True, True),
        (BEN, "anna", None, Access(roles=["other"]), False, False),
        (None, "anna", None, Access(roles=["admin"]), False, False),
    ],
)
def test_may_read_and_may_write(
    caller: Caller | None,
    owner: str | None,
    permission: Permission | None,
    admins: Access,
    reads: bool,
    writes: bool,
) -> None:
    assert may_read(caller, owner, permission, admins) is reads
    assert may_write(caller, owner, permission, admins) is writes


few = st.frozensets(st.sampled_from("abc"), max_size=2)
accesses = st.builds(Access, few, few, few, few)
callers = st.none() | st.builds(Caller, st.sampled_from("abc"), few, few, few)


@given(
    callers,
    st.none() | st.sampled_from("abc"),
    st.none() | st.builds(Permission, accesses, accesses),
    accesses,
)
def test_callers_who_may_write_may_read(
    caller: Caller | None, owner: str | None, permission: Permission | None, admins: Access
) -> None:
    if may_write(caller, owner, permission, admins):
        assert may_read(caller, owner, permission, admins)
    if may_read(caller, owner, permission, admins) and not is_anonymous(owner, permission):
        assert caller is not None
