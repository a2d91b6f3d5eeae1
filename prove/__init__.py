"""What the package promises, tried at full length: ``python -m prove``, or ``make prove``.

Each proof is a function that returns a line of figures or raises :class:`Broken`. Everything runs on loopback and in
temporary folders, and ends what it has started. Nothing of the package imports it; tests/live uses `server` and `client`.
"""

from __future__ import annotations


class Broken(AssertionError):
    """A bound was not kept."""


def check(condition: object, message: str) -> None:
    """Raise :class:`Broken` with the message unless the condition holds."""
    if not condition:
        raise Broken(message)


def scaled(count: int, share: float, least: int = 1) -> int:
    """Return ``share`` of a count, ``least`` at the least."""
    return max(round(count * share), least)
