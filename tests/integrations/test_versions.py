"""The page on extensions names the versions that are tested."""

from __future__ import annotations

import re
from importlib.metadata import version

from tests.support.programs import ROOT

PAGE = ROOT / "docs" / "howto" / "extensions.rst"


def test_the_page_names_the_tested_versions() -> None:
    named = dict(re.findall(r"^   \* - (\S+)\n     - (\d\S+)$", PAGE.read_text(), re.MULTILINE))
    assert len(named) == 16
    assert named == {name: version(name) for name in named}
    assert version("flask").startswith("3.1.") and version("werkzeug").startswith("3.1.")
