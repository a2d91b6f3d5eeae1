"""The house rules that a machine can check: which module may import which, and what may stand where.

Reads the source; imports nothing of the package. Imports under ``if TYPE_CHECKING:`` are not counted, and what is
reached by an import string or an entry point is not an import.
"""

from __future__ import annotations

import ast
import configparser
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "flask_asyncroute"
MAX_LINES = 320

ROOMS = """
    errors finalizers locks loop names signals termination typing
    states permissions expressions encoding web_address
    checks callback_terms
    options
    config delivery task query snapshot registry store_url app_path allowed_hosts
    execution followers outcome pace places locations
    current
    capture context identity start_key intake
    stores
    presence unwritten
    lifecycle state
    removal
    notifier scheduler
    executors
    callbacks
    dispatcher
    census housekeeping timekeeping
    drain
    runner
    runtime
    worker
    child
    http
    openapi dashboard
    route
    extension
    __init__ cli client testing
"""
"""From the ground up: a module imports from lines above its own and, without a cycle, from its own line.

A name stands for a module, or for a package and all in it. A new module is put here on the line where it belongs.
"""

ADAPTERS = {
    "MySQLdb": (),
    "celery": ("executors.celery",),
    "psycopg": ("stores.sql",),
    "psycopg_pool": ("stores.sql",),
    "pymysql": ("stores.sql",),
    "redis": (),
    "sqlite3": ("stores.sql",),
}
"""Each driver, and the only rooms that may import it."""

CONTEXT_CALLS = {"app_context", "request_context", "test_request_context", "copy_current_request_context"}
CONTEXT_ROOMS = ("context", "testing")
PICKLERS = {"cloudpickle", "dill", "jsonpickle", "marshal", "pickle", "shelve"}

DISTRIBUTIONS = {"yaml": "pyyaml"}
"""The distribution of an imported name, where the two differ."""
WITH_FLASK = {"click", "itsdangerous", "jinja2", "markupsafe"}
"""What Flask promises to bring."""
IF_THE_APP_HAS_IT = {"flask_login"}


def sources() -> dict[str, Path]:
    """Return the file of every module, keyed by its name within the package; a package by its own name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


SOURCES = sources()
LINES = {room: number for number, line in enumerate(ROOMS.split("\n")) for room in line.split()}

every_module = pytest.mark.parametrize("module", SOURCES)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text("utf-8"))


def is_within(module: str, room: str) -> bool:
    """Return whether ``module`` is that room, or a part of it."""
    return module == room or module.startswith(room + ".")


def line_of(module: str) -> int | None:
    """Return the line of the table on which ``module``, or the package that it is part of, stands."""
    return LINES.get(module.split(".")[0])


def counted(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all that runs below ``node``: everything but the bodies of ``if TYPE_CHECKING:``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from counted(other)
        else:
            yield child
            yield from counted(child)


def imported(source: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[str, int]]:
    """Yield each absolute name that is imported, as far as it may name a module, with its line number."""
    home = [PACKAGE, *(part for part in module.split(".") if part != "__init__")]
    if not is_package:
        home.pop()
    for node in counted(source):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{start}.{alias.name}", node.lineno


def modules_imported(
    source: ast.AST, module: str, *, is_package: bool, known: Mapping[str, object]
) -> Iterator[tuple[str, int]]:
    """Yield each module of the package that is imported; a name that is no module is its parent's."""
    for name, line in imported(source, module, is_package=is_package):
        if is_within(name, PACKAGE):
            inner = name.removeprefix(PACKAGE).lstrip(".")
            while inner and inner not in known:
                inner = inner.rpartition(".")[0]
            yield inner or "__init__", line


def is_package(module: str) -> bool:
    return SOURCES[module].name == "__init__.py"


@cache
def edges(module: str) -> tuple[tuple[str, int], ...]:
    found = modules_imported(tree(module), module, is_package=is_package(module), known=SOURCES)
    return tuple((target, line) for target, line in found if target != module)


def outside(module: str) -> Iterator[tuple[str, int]]:
    """Yield each top-level name from outside the package that ``module`` imports."""
    for name, line in imported(tree(module), module, is_package=is_package(module)):
        if not is_within(name, PACKAGE):
            yield name.split(".")[0], line


def place(module: str, line: int) -> str:
    return f"{SOURCES[module].relative_to(ROOT)}:{line}"


@every_module
def test_module_stands_in_the_table(module: str) -> None:
    assert line_of(module) is not None, f"{module} is new: put it into ROOMS, on the line where it belongs."


@every_module
def test_imports_come_from_above(module: str) -> None:
    own = line_of(module)
    assert own is not None
    for target, line in edges(module):
        other = line_of(target)
        assert other is not None and other <= own, (
            f"{place(module, line)}: {module} imports {target}, which ROOMS puts below it. "
            "Move what it needs up, or hand it in."
        )


def test_imports_go_round_nowhere() -> None:
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            pytest.fail("Imports in a circle: " + " → ".join([*path[path.index(module) :], module]))
        if module not in done:
            for target, _ in edges(module):
                follow(target, (*path, module))
            done.add(module)

    for module in SOURCES:
        follow(module, ())


@every_module
def test_drivers_stay_in_their_adapters(module: str) -> None:
    for name, line in outside(module):
        rooms = ADAPTERS.get(name)
        assert rooms is None or any(is_within(module, room) for room in rooms), (
            f"{place(module, line)} imports {name}, which only {' and '.join(rooms) or 'nobody'} may."
        )


@every_module
def test_nothing_is_pickled(module: str) -> None:
    for name, line in outside(module):
        assert name not in PICKLERS, f"{place(module, line)} imports {name}: what is stored or sent is JSON."


@every_module
def test_only_context_pushes_contexts(module: str) -> None:
    if module in CONTEXT_ROOMS:
        return
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            assert name not in CONTEXT_CALLS, (
                f"{place(module, node.lineno)} calls {name}(): Flask contexts are pushed by context.py alone."
            )


@every_module
def test_modules_are_small(module: str) -> None:
    length = len(SOURCES[module].read_text("utf-8").splitlines())
    assert length <= MAX_LINES, (
        f"{SOURCES[module].relative_to(ROOT)} has {length} lines: more than one noun lives there."
    )


def declared() -> dict[str, str]:
    """Return the lower bound of each dependency in setup.cfg, keyed by its name in small letters."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", "utf-8")
    lines = parser["options"]["install_requires"].split()
    return {name.lower(): bound for name, bound in (line.split(">=") for line in lines)}


@every_module
def test_what_is_imported_is_declared(module: str) -> None:
    allowed = declared().keys() | WITH_FLASK | IF_THE_APP_HAS_IT | ADAPTERS.keys()
    for name, line in outside(module):
        if name not in sys.stdlib_module_names:
            assert DISTRIBUTIONS.get(name, name) in allowed, (
                f"{place(module, line)} imports {name}; setup.cfg lacks it."
            )


def test_lowest_versions_are_the_declared_ones() -> None:
    text = (ROOT / "requirements" / "lowest.in").read_text("utf-8")
    assert dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)) == declared()


def test_dependencies_are_explained() -> None:
    page = (ROOT / "docs" / "explanation" / "dependencies.rst").read_text("utf-8").lower()
    assert [name for name in declared() if f"* - {name}\n" not in page] == []


READ = """
import json, os.path
from __future__ import annotations
from . import errors, nothing
from .base import A
from ..stores import sql
from .. import states as s
if TYPE_CHECKING:
    from ..worker import B
else:
    from ..options import C
def later():
    try:
        from flask_asyncroute.task import D
    except ImportError:
        import flask_asyncroute
"""


def test_this_reader_sees_every_kind_of_import() -> None:
    known = dict.fromkeys(
        ["stores", "stores.sql", "stores.base", "stores.errors", "states", "options", "task", "worker"]
    )
    found = list(modules_imported(ast.parse(READ), "stores.memory", is_package=False, known=known))
    assert [name for name, _ in found] == [
        "stores.errors",
        "stores",
        "stores.base",
        "stores.sql",
        "states",
        "options",
        "task",
        "__init__",
    ]
    found = list(modules_imported(ast.parse("from .base import A"), "stores", is_package=True, known=known))
    assert found == [("stores.base", 1)]
