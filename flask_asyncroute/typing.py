"""Names for the types that pass between rooms."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from flask import Response

Seconds: TypeAlias = "float | int | timedelta"
View: TypeAlias = Callable[..., Any]
Start: TypeAlias = "Callable[..., Response]"
"""What stands in a view's place."""
IdentityLoader: TypeAlias = Callable[[], Any]
