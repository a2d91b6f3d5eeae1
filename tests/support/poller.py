"""Poll a path, each time on a new connection, and measure the response times.

``python -m tests.support.poller PORT PATH SECONDS`` prints the response times in seconds as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import cast

from tests.support.client import Connection
from tests.support.programs import ROOT

PAUSE = 0.01


def poll(port: int, path: str, seconds: float) -> list[float]:
    """Return the response times in seconds."""
    found = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with Connection(port) as connection:
            reply = connection.send("GET", path, headers={"Connection": "close"})
        assert reply.status == 200, f"a GET returned {reply.status}"
        found.append(reply.answered_at - reply.sent_at)
        time.sleep(PAUSE)
    return found


def poll_from_another_process(port: int, path: str, seconds: float) -> list[float]:
    """Return the response times in seconds, measured in a process where no other thread needs the
    GIL.
    """
    command = [sys.executable, "-m", "tests.support.poller", str(port), path, str(seconds)]
    output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    return cast("list[float]", json.loads(output))


if __name__ == "__main__":
    print(json.dumps(poll(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))))
