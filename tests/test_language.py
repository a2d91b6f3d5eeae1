"""The prose of the project: phrases that readers had to read twice do not come back.

Add a phrase to the list when a reader stumbles over one. docs/howto/development.rst has the rules.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PHRASES = (
    # A store or a process is not a person.
    r"\b(is|are|was|were|be) told\b", r"\bhears?\b", r"\bheard\b", r"\bnews of\b",
    r"\blearns? of\b", r"\bsays nothing\b", r"\bknows? nothing\b", r"\bnobody known\b",
    r"\bkeeps? house\b", r"\bhousekeep(er|ing)\b", r"\bburied\b", r"\bforsak\w+",
    r"\bcensus\b",
    # Old or indirect words.
    r"\banew\b", r"\bbeforehand\b", r"\blikewise\b", r"\bwhoever\b", r"\bwhatsoever\b",
    r"\breckon\w*", r"\bheeds?\b", r"\bbut for\b", r"\blest\b", r"\bthereof\b", r"\bhence\b",
    r"\bfor want of\b", r"\bfor ever\b", r"\bmind (what|that|the)\b", r"\byet to be\b",
    r"\bone too many\b", r"\bso many seconds\b", r"\bas ever\b", r"\bby chance\b",
    # Verbs with a term of the field.
    r"\blet(s|ting)? go of\b", r"\btaken? back\b", r"\bgiven? back\b", r"\bhang(s|ing)? up on\b",
    r"\bhung up on\b", r"\bparted from\b", r"\bsettled?\b", r"\bset aside\b", r"\bput off\b",
    # Clauses in place of a noun.
    r"\bwhat (became|becomes) of\b", r"\bwhat (there )?is (there|left|new)\b", r"\bwho asks\b",
    r"\bwho follows\b", r"\bwhat waits\b", r"\bwhat runs\b", r"\bwhat ran\b",
    r"\b(?-i:is none)\b", r"\bis no (valid|longer a)\b", r"\bwill not do\b", r"\bis behind\b",
)  # fmt: skip
NAMES = re.compile(r"(?i)HOUSEKEEPING_INTERVAL|``[^`]*``|`[^`]*`|\"[^\"\n]*\"\.")
"""Not prose: names and literals."""


def prose_of_python(path: Path) -> Iterator[tuple[int, str]]:
    """Yield docstrings, comments, longer string literals and names of tests, with their lines."""
    source = path.read_text("utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.lineno, node.name.replace("_", " ")


def prose() -> Iterator[tuple[str, int, str]]:
    """Yield each piece of prose of the project, with its file and line."""
    for place in ("flask_asyncroute", "tests", "example_app", "benchmarks", "docs"):
        for path in sorted((ROOT / place).rglob("*.py")):
            if path != Path(__file__):
                for line, text in prose_of_python(path):
                    yield str(path.relative_to(ROOT)), line, text
    for page in (
        ROOT / "README.rst",
        ROOT / "CHANGES.rst",
        *sorted((ROOT / "docs").rglob("*.rst")),
    ):
        for number, text in enumerate(page.read_text("utf-8").split("\n\n")):
            yield str(page.relative_to(ROOT)), number, text


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_phrase_does_not_come_back(phrase: str) -> None:
    pattern = re.compile(phrase, re.IGNORECASE)
    found = [
        f"{path}:{line}: {' '.join(text.split())[:100]}"
        for path, line, text in ALL
        if pattern.search(" ".join(NAMES.sub(" ", text).split()))
    ]
    assert found == []


ALL = list(prose())
