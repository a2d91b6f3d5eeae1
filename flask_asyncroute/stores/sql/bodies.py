"""The bodies of requests in SQL, in rows of 256 KiB; small ones are in their task's own row."""

from __future__ import annotations

from sqlalchemy import bindparam, delete, insert, select

from ...snapshot import Body
from .cursors import one, run
from .database import Cursor
from .statements import Statements
from .tables import bodies


class Bodies:
    """The statements for bodies, for one dialect. `store` calls it inside its transactions."""

    def __init__(self, statements: Statements) -> None:
        is_of_task = (bodies.c.namespace == bindparam("ns")) & (bodies.c.task_id == bindparam("task_id"))
        self._add = statements.compiled(
            insert(bodies).values({column.name: bindparam(column.name) for column in bodies.columns})
        )
        self._part = statements.compiled(select(bodies.c.data).where(is_of_task, bodies.c.part == bindparam("number")))
        self.drop = statements.compiled(delete(bodies).where(is_of_task))

    def add(self, cursor: Cursor, ns: int, task_id: str, body: Body) -> None:
        """Add a body in parts."""
        for part, data in enumerate(body.pieces()):
            run(cursor, self._add, namespace=ns, task_id=task_id, part=part, data=data)

    def read(self, cursor: Cursor, ns: int, task_id: str) -> Body:
        """Return a body, for the caller to close."""
        body = Body()
        try:
            number = 0
            while row := one(cursor, self._part, ns=ns, task_id=task_id, number=number):
                body.write(row[0])
                number += 1
        except BaseException:
            body.close()
            raise
        return body
