"""The users of the example: three people, two of them in the group "analysts".

A real app would store users in its database. The passwords are for demonstration: each is the
same as the name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from werkzeug.security import check_password_hash


@dataclass(frozen=True, slots=True)
class Person:
    """A user with a password. flask_asyncroute reads ``id`` and ``groups``."""

    id: str
    groups: frozenset[str]
    password_hash: str


_EVERYBODY = (
    Person(
        "alice",
        frozenset({"analysts"}),
        "scrypt:32768:8:1$CKAlf7SBXBeFW0SQ$"
        "6ab2a63831417bc12d7f8a83d58bd8407ce81f934ed241d0ec1d90cbcf9106f4"
        "7ef0f28b2235403f2e0c313e00e4b75cdd4aba0d4c25bbfe5f9a64f0bf48e2ad",
    ),
    Person(
        "bob",
        frozenset({"analysts"}),
        "scrypt:32768:8:1$n7qUL32z4Cy4Dwxb$"
        "65b8133414cea7255496d3b161b6a42c38ed88a7726a2798fef694a0fa058fa4"
        "3f658c9a2c385209c562b05b5607ac004d223d56059259f3d1085b25f3a25a10",
    ),
    Person(
        "carol",
        frozenset(),
        "scrypt:32768:8:1$BR3wVJNGU3oDzd99$"
        "1d5ccb1017ed0084a3d2d0a7cc2d2f3976391c6e3d5205892e1f91f9279baee3"
        "6f1d1b72bc5cbc44821318181e183b96633d1aa90d78157080de4ef723586771",
    ),
)

PEOPLE: Mapping[str, Person] = {person.id: person for person in _EVERYBODY}


def authenticate(name: str, password: str) -> Person | None:
    """Return the person with this name and password, or None.

    Unknown names take as long as wrong passwords, so that the time does not reveal which names
    exist.
    """
    person = PEOPLE.get(name)
    is_right = check_password_hash((person or _EVERYBODY[0]).password_hash, password)
    return person if is_right else None
