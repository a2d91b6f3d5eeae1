"""Each row of ``docs/explanation/threat-model.rst`` has a test, and tests name only existing rows.

The test files are parsed, not imported.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "explanation" / "threat-model.rst"


@cache
def rows() -> list[str]:
    return re.findall(r"^   \* - ([AFI]\d+)$", PAGE.read_text("utf-8"), re.MULTILINE)


@cache
def claims() -> dict[str, list[str]]:
    """Return the tests that cover each id."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.covers":
                    assert node.name.startswith("test_"), f"{path}: {node.name} is not a test"
                    for argument in mark.args:
                        found[ast.literal_eval(argument)].append(f"{path.name}::{node.name}")
    return found


def test_tests_name_existing_rows() -> None:
    unknown = {id: tests for id, tests in claims().items() if id not in rows()}
    assert unknown == {}, "These tests cover ids that docs/explanation/threat-model.rst lacks."


def test_each_row_has_a_test() -> None:
    assert [id for id in rows() if id not in claims()] == [], "These rows have no test."


def test_row_ids_are_unique_and_in_order() -> None:
    found = rows()
    assert len(found) > 90
    for kind in "IAF":
        numbers = [int(id[1:]) for id in found if id[0] == kind]
        assert numbers == sorted(set(numbers))
