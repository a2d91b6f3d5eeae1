"""The executor registry: accepted values, and the rule that no other module compares kinds by name."""

from __future__ import annotations

import ast
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import flask_asyncroute
from flask_asyncroute.executors import registry

PACKAGE = Path(flask_asyncroute.__file__).parent
MODULES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "executors/registry.py"]
CONCRETE = {"thread", "inline", "process", "celery"}


def test_an_executor_object_of_the_app_has_its_own_kind() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert registry.kind_of(registry.checked("executor", pool)) is registry.APP_EXECUTOR


@pytest.mark.parametrize("name", registry.KINDS)
def test_each_name_selects_its_kind(name: str) -> None:
    assert registry.kind_of(registry.checked("executor", name)).name == name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_registry_compares_kinds_by_name(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Compare):
            named = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            assert not named & registry.KINDS.keys(), f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_executors_package_imports_an_executor(path: Path) -> None:
    # These modules run or send the tasks of one kind of executor.
    own = ("child_main.py", "celery_task.py", "lost_messages.py")
    if (PACKAGE / "executors") in path.parents or path.name in own:
        return
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and "executors" in node.module:
            module = node.module.partition("executors")[2].lstrip(".").partition(".")[0]
            names = {module} if module else {alias.name for alias in node.names}
            assert not names & CONCRETE, f"{path}:{node.lineno}"
