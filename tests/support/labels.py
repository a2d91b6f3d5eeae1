"""Names of parametrized tests."""

from __future__ import annotations

import re
from typing import Any


def label(value: Any) -> str:
    """Return a name without object addresses, so that it is the same in each run."""
    return re.sub(r" at 0x[0-9a-f]+", "", ascii(value))
