"""What brings the tables of an older release up to date, step by step, as SQL that each database understands.

A step is never changed once it is released: it says what a database of that time lacks.
"""

from __future__ import annotations

VERSION = 2
"""Of the schema in `tables`; raised with every change to it."""

UPGRADES: dict[int, tuple[str, ...]] = {
    2: (
        "ALTER TABLE asyncroute_namespaces RENAME COLUMN removed_change TO change",
    ),
}  # fmt: skip
"""By the version that a step leads to."""
