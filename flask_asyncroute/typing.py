"""Names for the types that pass between rooms."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeAlias

Seconds: TypeAlias = "float | int | timedelta"
View: TypeAlias = Callable[..., Any]
IdentityLoader: TypeAlias = Callable[[], Any]
