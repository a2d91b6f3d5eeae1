"""Rules for the structure of the package: which module may import which, and which code belongs
where.

The layers are those of ``docs/explanation/design.rst``. The tests parse the source and import no
module of the package. Imports under ``if TYPE_CHECKING:`` and module names in strings count too.
"""

from __future__ import annotations

import ast
import configparser
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "flask_asyncroute"
DESIGN = ROOT / "docs" / "explanation" / "design.rst"
LONG = 450
"""A longer module gets a warning, because it may have more than one subject."""

ENTRY_POINTS = {"child_main"}
"""Modules that a new process starts with. They are named only in strings."""

ADAPTERS = {
    "MySQLdb": (),
    "billiard": ("executors.celery",),
    "celery": ("executors.celery", "executors.celery_app"),
    "psycopg": ("stores.sql",),
    "psycopg_pool": ("stores.sql",),
    "pymysql": ("stores.sql",),
    "redis": (),
    "rich": ("cli",),
    "sqlite3": ("stores.sql",),
}
"""Each driver, and the only modules or folders that may import it."""

CONTEXT_CALLS = {
    "app_context",
    "request_context",
    "test_request_context",
    "copy_current_request_context",
}
CONTEXT_MODULES = ("request.context", "testing")
PICKLERS = {"cloudpickle", "dill", "jsonpickle", "marshal", "pickle", "shelve"}

DISTRIBUTIONS = {"yaml": "pyyaml"}
"""The distribution of an imported name, if the two differ."""
WITH_FLASK = {"click", "jinja2", "markupsafe"}
"""Dependencies of Flask."""
IF_THE_APP_HAS_IT = {"flask_login", "flask_wtf"}
TYPES_ONLY = {"_typeshed"}


def read_layers(page: str) -> list[list[str]]:
    """Return the modules and folders of each layer, in the order of the table after ``..
    _layers:``.
    """
    after = page.partition(".. _layers:")[2].partition(".. list-table::")[2]
    rows = re.findall(r"^   \* - (``.*?)\n     - ", re.split(r"\n\n(?=\S)", after)[0], re.MULTILINE)
    return [re.findall(r"``(\w+)``", row) for row in rows]


def sources() -> dict[str, Path]:
    """Return the file of each module by its name within the package. A package has its own name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


SOURCES = sources()
LAYERS = {
    name: number
    for number, layer in enumerate(read_layers(DESIGN.read_text("utf-8")))
    for name in layer
}
"""The layer of each module at the root of the package, and of each folder."""

every_module = pytest.mark.parametrize("module", SOURCES)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text("utf-8"))


def is_within(module: str, parent: str) -> bool:
    """Return whether ``module`` is ``parent`` or part of it."""
    return module == parent or module.startswith(parent + ".")


def layer_of(module: str) -> int | None:
    """Return the layer of ``module``, or of the folder that contains it."""
    return LAYERS.get(module.split(".")[0])


def imported(source: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[str, int]]:
    """Yield each imported absolute name, which may name a module, with its line number."""
    home = [PACKAGE, *(part for part in module.split(".") if part != "__init__")]
    if not is_package:
        home.pop()
    for node in ast.walk(source):
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
    """Yield each imported module of the package. Other names count as imports of their module."""
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
    """Yield each top-level name outside the package that ``module`` imports."""
    for name, line in imported(tree(module), module, is_package=is_package(module)):
        if not is_within(name, PACKAGE):
            yield name.split(".")[0], line


def location(module: str, line: int) -> str:
    return f"{SOURCES[module].relative_to(ROOT)}:{line}"


def named_in_strings(module: str) -> Iterator[tuple[str, int]]:
    """Yield each module of the package that a string of ``module`` names, except in docstrings."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree(module))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree(module)):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
        ):
            for name in re.findall(rf"{PACKAGE}\.([\w.]+)", node.value):
                if name in SOURCES:
                    yield name, node.lineno


@every_module
def test_module_has_a_layer(module: str) -> None:
    assert layer_of(module) is not None, (
        f"{module} is new: add it to a layer of {DESIGN.relative_to(ROOT)}."
    )


def test_layers_name_existing_modules() -> None:
    assert LAYERS.keys() == {module.split(".")[0] for module in SOURCES}


@every_module
def test_imports_come_from_the_same_or_a_lower_layer(module: str) -> None:
    own = layer_of(module)
    assert own is not None
    named = (
        (target, line) for target, line in named_in_strings(module) if target not in ENTRY_POINTS
    )
    for target, line in (*edges(module), *named):
        other = layer_of(target)
        assert other is not None and other <= own, (
            f"{location(module, line)}: {module} imports {target}, which is in a higher layer. "
            "Move the required code to a lower layer, or pass it as an argument."
        )


def test_imports_form_no_cycle() -> None:
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            pytest.fail(
                "Imports form a cycle: " + " → ".join([*path[path.index(module) :], module])
            )
        if module not in done:
            named = (
                name
                for name, _ in named_in_strings(module)
                if name != module and name not in ENTRY_POINTS
            )
            for target in (*(target for target, _ in edges(module)), *named):
                follow(target, (*path, module))
            done.add(module)

    for module in SOURCES:
        follow(module, ())


@every_module
def test_drivers_stay_in_their_adapters(module: str) -> None:
    for name, line in outside(module):
        adapters = ADAPTERS.get(name)
        assert adapters is None or any(is_within(module, adapter) for adapter in adapters), (
            f"{location(module, line)} imports {name}, which only "
            f"{' and '.join(adapters) or 'no module'} may import."
        )


@pytest.mark.covers("A67")
@every_module
def test_nothing_is_pickled(module: str) -> None:
    for name, line in outside(module):
        assert name not in PICKLERS, (
            f"{location(module, line)} imports {name}: stored and sent data is JSON."
        )


@every_module
def test_only_request_context_pushes_flask_contexts(module: str) -> None:
    if module in CONTEXT_MODULES:
        return
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            assert name not in CONTEXT_CALLS, (
                f"{location(module, node.lineno)} calls {name}(): only request/context.py pushes "
                "Flask contexts."
            )


@every_module
@pytest.mark.filterwarnings("default:.* lines:UserWarning")
def test_module_is_not_long(module: str) -> None:
    length = len(SOURCES[module].read_text("utf-8").splitlines())
    if length > LONG:
        warnings.warn(
            f"{location(module, 1)} has {length} lines: does it have more than one subject?",
            stacklevel=1,
        )
    assert length > 0


def declared() -> dict[str, str]:
    """Return the lower bound of each dependency in setup.cfg by its lower-case name."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", "utf-8")
    lines = parser["options"]["install_requires"].split()
    return {name.lower(): bound for name, bound in (line.split(">=") for line in lines)}


@every_module
def test_imported_dependencies_are_declared(module: str) -> None:
    allowed = declared().keys() | WITH_FLASK | IF_THE_APP_HAS_IT | TYPES_ONLY | ADAPTERS.keys()
    for name, line in outside(module):
        if name not in sys.stdlib_module_names:
            assert DISTRIBUTIONS.get(name, name) in allowed, (
                f"{location(module, line)} imports {name}; setup.cfg lacks it."
            )


def test_lowest_versions_match_the_declared_bounds() -> None:
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


def test_every_kind_of_import_is_found() -> None:
    known = dict.fromkeys(
        [
            "stores",
            "stores.sql",
            "stores.base",
            "stores.errors",
            "states",
            "options",
            "task",
            "worker",
        ]
    )
    found = list(modules_imported(ast.parse(READ), "stores.memory", is_package=False, known=known))
    assert [name for name, _ in found] == [
        "stores.errors",
        "stores",
        "stores.base",
        "stores.sql",
        "states",
        "worker",
        "options",
        "task",
        "__init__",
    ]
    found = list(
        modules_imported(ast.parse("from .base import A"), "stores", is_package=True, known=known)
    )
    assert found == [("stores.base", 1)]
