"""How slow this machine is beside the one on which bounds in milliseconds were set."""

from __future__ import annotations

import json
import sqlite3
import time
from statistics import median

REFERENCE_MS = 0.5
"""What a round takes on the machine of the bounds."""
ROUNDS = 300
MOST = 2.0
"""What is slower still is no measure for anything."""


def slowness() -> float:
    """Return by how much a bound is to be stretched: 1 on a machine as quick as the reference, up to 2 on a slower one.

    Measured by what the package does not touch: rows out of SQLite, made into objects and JSON.
    """
    connection = sqlite3.connect(":memory:")
    try:
        columns = ", ".join(f"c{number}" for number in range(20))
        connection.execute(f"CREATE TABLE rows ({columns})")
        row = [f"value {number}" for number in range(20)]
        connection.executemany(f"INSERT INTO rows VALUES ({', '.join('?' * 20)})", [row] * 100)
        took = [_round(connection) for _ in range(ROUNDS)]
    finally:
        connection.close()
    return min(max(median(took) * 1000 / REFERENCE_MS, 1.0), MOST)


def _round(connection: sqlite3.Connection) -> float:
    began = time.perf_counter()
    cursor = connection.execute("SELECT * FROM rows")
    names = [column[0] for column in cursor.description]
    json.dumps([dict(zip(names, row, strict=True)) for row in cursor.fetchall()])
    return time.perf_counter() - began
