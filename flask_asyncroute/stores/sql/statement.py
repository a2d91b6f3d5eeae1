"""A statement of SQLAlchemy Core for plain driver cursors.

Running a Core statement the usual way costs several times what the database takes. Here it is compiled to SQL text once,
and only its values change; columns hold plain types, so nothing has to be converted on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, Generic, TypeVar

from sqlalchemy.engine import Dialect
from sqlalchemy.sql.elements import CompilerElement

T = TypeVar("T")


class made_once(Generic[T]):  # noqa: N801 - it is used as a decorator
    """A property that keeps what it gave first. `functools.cached_property` does so under a lock of the whole class before
    Python 3.12: a process that is forked while another thread holds it would wait for ever. Made twice it does no harm.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        made = instance.__dict__[self._name] = self._make(instance)
        return made


class Statement:
    """SQL text and the order of its parameters. Every value is named with `bindparam` or fixed in the statement.

    Compiled when it is first used: a process that runs a single task needs few of them, and none to begin with.
    """

    def __init__(self, clause: CompilerElement, dialect: Dialect) -> None:
        self._clause = clause
        self._dialect = dialect

    @made_once
    def _compiled(self) -> tuple[str, itemgetter[Any], dict[str, Any]]:
        """The text, what puts named values in its order, and the values that are fixed."""
        compiled: Any = self._clause.compile(dialect=self._dialect)
        names: list[str] = list(compiled.positiontup or ())
        fixed = {name: value for name, value in compiled.params.items() if value is not None}
        # One more name, so that it gives a tuple for a single one too.
        return str(compiled), itemgetter(*names, ""), fixed

    @property
    def sql(self) -> str:
        """The text."""
        return self._compiled[0]

    def values(self, **given: Any) -> tuple[Any, ...]:
        """Return the parameters in the order that :attr:`sql` has them."""
        _, in_order, fixed = self._compiled
        given[""] = None
        return in_order({**fixed, **given} if fixed else given)[:-1]  # type: ignore[no-any-return]
