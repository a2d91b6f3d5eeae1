"""The tests that generate requests, run with a very high count."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable

from tests.support.programs import ROOT

REQUESTS = 20_000
COUNT = "ASYNCROUTE_FUZZ"
"""The environment variable for the number of requests that those tests generate."""
PATIENCE = 3600.0


def test_generated_requests(scaled: Callable[..., int], figures: Callable[[str], None]) -> None:
    count = scaled(REQUESTS, 200)
    files = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if COUNT in path.read_text("utf-8") and path.parent.name != "stress"
    ]
    assert files, f"no test reads {COUNT}"
    # A process of its own reads the count when it imports the tests.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", *files], cwd=ROOT,
        env={**os.environ, COUNT: str(count)}, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=PATIENCE,
    )  # fmt: skip
    output = f"{done.stdout[-4000:]}\n{done.stderr[-1000:]}"
    assert done.returncode == 0, f"pytest ended with {done.returncode}:\n{output}"
    summary = re.findall(r"^\d+ passed.*$", done.stdout, re.MULTILINE)
    figures(f"{count} requests: {summary[-1] if summary else 'passed'}")
