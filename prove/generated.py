"""Very many generated requests: the tests that make them, run with a higher count."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from . import check, scaled
from .server import ROOT

REQUESTS = 20_000
COUNT = "ASYNCROUTE_FUZZ"
"""The environment variable by which those tests are told how many requests to make."""
PATIENCE = 3600.0


def prove(share: float) -> str:
    """Run the tests that generate requests, in a process of their own."""
    count = scaled(REQUESTS, share, 200)
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if COUNT in path.read_text("utf-8")]
    check(files, f"no test reads {COUNT}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", *files],
        cwd=ROOT, env={**os.environ, COUNT: str(count)}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    check(done.returncode == 0, f"pytest ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-1000:]}")
    summary = re.findall(r"^\d+ passed.*$", done.stdout, re.MULTILINE)
    return f"{count} requests: {summary[-1] if summary else 'passed'}"
