"""Each test has an assertion, and no test waits for a fixed time.

The test files are parsed, not imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("test_*.py"))
CHECKS = {
    "eventually", "eventually_true", "expect", "pytest.fail", "pytest.raises", "pytest.warns",
    "run_state_machine_as_test",
}  # fmt: skip
"""Functions of pytest, Playwright, Hypothesis and tests/support that can fail a test."""
FLOW_METHODS = {"became", "ended", "error", "purge", "query", "result", "run", "start", "still"}
"""Methods of `tests.support.flow.Flow` that check the status of each response."""
WITHOUT_ASSERTION = {
    "test_python_in_the_pages_runs": "the code in the pages has its own assertions, if any",
    "test_a_fake_task_accepts_any_number_of_events": "send_event must not raise",
}
"""Tests without an assertion, and why."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def functions(node: ast.AST) -> list[Function]:
    """Return the functions and methods of a module or class, without nested functions."""
    found: list[Function] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            found.append(child)
        elif isinstance(child, ast.ClassDef):
            found += functions(child)
    return found


def asserts(function: Function, checkers: set[str]) -> bool:
    """Return whether ``function`` has an assertion or calls one of ``checkers``."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            method = name.rpartition(".")[2]
            if name in CHECKS or method in checkers:
                return True
            if method in FLOW_METHODS and name.partition(".")[0].endswith("flow"):
                return True
    return False


def checkers(among: Iterable[Function], known: set[str]) -> set[str]:
    """Return ``known`` and the names of functions that assert, directly or by calling each other."""
    found = set(known)
    helpers = [each for each in among if not each.name.startswith(("test_", "__"))]
    while new := {each.name for each in helpers if asserts(each, found)} - found:
        found |= new
    return found


@cache
def shared_checkers() -> set[str]:
    """Return the names of the functions of tests/support that assert."""
    modules = [tree(path) for path in (TESTS / "support").glob("*.py")]
    top = [node for module in modules for node in module.body if isinstance(node, Function)]
    return checkers(top, {"assert_no_traceback"})


def sleeps(node: ast.AST) -> list[int]:
    """Return the lines with ``time.sleep`` in a function, without nested functions."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            continue
        if isinstance(child, ast.Call) and ast.unparse(child.func) == "time.sleep":
            found.append(child.lineno)
        found += sleeps(child)
    return found


def test_each_test_has_an_assertion() -> None:
    without = []
    for path in FILES:
        found = functions(tree(path))
        known = checkers(found, shared_checkers())
        without += [
            f"{path.relative_to(TESTS)}:{test.lineno} {test.name}"
            for test in found
            if test.name.startswith("test_")
            and not asserts(test, known)
            and test.name not in WITHOUT_ASSERTION
        ]
    assert without == [], "These tests have no assertion."


def test_no_test_sleeps() -> None:
    """A fixed pause is too short on a slow machine and too long on a fast one. Views may sleep."""
    found = [
        f"{path.relative_to(TESTS)}:{line}"
        for path in FILES
        if path.parent.name != "stress"
        for function in functions(tree(path))
        for line in sleeps(function)
    ]
    assert found == [], "Wait for a condition with the fixture eventually instead."
