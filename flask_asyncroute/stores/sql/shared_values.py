"""The shared mapping of one namespace in SQL: values, each with the version that a compare-and-set needs."""

from __future__ import annotations

import secrets
from typing import Any

from sqlalchemy import bindparam, delete, insert, select, update

from .cursors import one, run
from .database import Cursor
from .statements import Statements
from .tables import shared_values


class SharedValues:
    """The statements for shared values, for one dialect. `store` calls it inside its transactions."""

    def __init__(self, statements: Statements) -> None:
        self._lock = statements.lock_namespace
        is_in = shared_values.c.namespace == bindparam("ns")
        is_value = is_in & (shared_values.c.key == bindparam("value_key"))
        given: dict[str, Any] = {"value": bindparam("new_value"), "version": bindparam("new_version")}
        self.read = statements.compiled(select(shared_values.c.value, shared_values.c.version).where(is_value))
        self.keys = statements.compiled(select(shared_values.c.key).where(is_in).order_by(shared_values.c.key))
        self._add = statements.compiled(
            insert(shared_values).values(namespace=bindparam("ns"), key=bindparam("value_key"), **given)
        )
        self._set = statements.compiled(update(shared_values).where(is_value).values(given))
        self._drop = statements.compiled(delete(shared_values).where(is_value))

    @staticmethod
    def new_version() -> int:
        """Return a version; not a count: a value that was removed and set again must not have one that somebody holds."""
        return secrets.randbits(62) + 1

    def write(
        self, cursor: Cursor, ns: int, key: str, value: bytes | None, version: int | None, new_version: int
    ) -> bool:
        """See `TaskStore.write_value`."""
        run(cursor, self._lock, ns=ns)
        present = one(cursor, self.read, ns=ns, value_key=key)
        if version is not None and version != (0 if present is None else present[1]):
            return False
        if value is None:
            if present is not None:
                run(cursor, self._drop, ns=ns, value_key=key)
            return present is not None
        statement = self._add if present is None else self._set
        run(cursor, statement, ns=ns, value_key=key, new_value=value, new_version=new_version)
        return True
