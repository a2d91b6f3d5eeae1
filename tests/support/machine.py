"""How slow this machine is, compared with the reference machine of limits in milliseconds."""

from __future__ import annotations

import json
import sqlite3
import time
from statistics import median

REFERENCE_MS = 0.5
"""The time of one round on the reference machine."""
ROUNDS = 300
MAX_FACTOR = 2.0
"""The largest factor returned."""


def slowness() -> float:
    """Return the factor for limits: 1 on a machine as fast as the reference, up to 2 on a slower
    one.

    It measures work that the package does not change: rows read from SQLite and dumped as JSON.
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
    return min(max(median(took) * 1000 / REFERENCE_MS, 1.0), MAX_FACTOR)


def _round(connection: sqlite3.Connection) -> float:
    began = time.perf_counter()
    cursor = connection.execute("SELECT * FROM rows")
    names = [column[0] for column in cursor.description]
    json.dumps([dict(zip(names, row, strict=True)) for row in cursor.fetchall()])
    return time.perf_counter() - began
