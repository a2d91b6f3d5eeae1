"""Large uploads to the app of `tests.support.apps.csv`."""

from __future__ import annotations

from collections.abc import Iterator

from tests.support.client import send
from tests.support.waiting import eventually_true

LINE = b"2024-03-01,Z\xc3\xbcrich,4711,12.50,some more text to fill the line\n"
BOUNDARY = "boundary-5f0c"
PATIENCE = 60.0


def upload(port: int, size: int, is_chunked: bool) -> None:
    """Send a form with a file; wait until its task has read the whole file."""
    lines = size // len(LINE)
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="field"\r\n\r\nvalue\r\n'
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="data.csv"\r\n'
        "Content-Type: text/csv\r\n\r\n"
    ).encode()
    tail = f"\r\n--{BOUNDARY}--\r\n".encode()

    def pieces() -> Iterator[bytes]:
        yield head
        for start in range(0, lines, 1000):
            yield LINE * min(1000, lines - start)
        yield tail

    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    if not is_chunked:
        headers["Content-Length"] = str(len(head) + lines * len(LINE) + len(tail))
    reply = send(port, "POST", "/csv", body=pieces(), headers=headers)
    assert reply.status == 202, f"the upload returned {reply.status}: {reply.body[:300]!r}"
    ended = eventually_true(
        lambda: (
            task
            if (task := send(port, "GET", reply.headers["location"]).json())["IsCompleted"]
            else None
        ),
        PATIENCE,
        0.05,
    )
    expected = {"Lines": lines, "Size": lines * len(LINE), "Name": "data.csv", "Field": "value"}
    assert ended.get("Result") == expected, f"the task read other data: {ended}"
