"""A large upload is received, stored, run and finished without being held in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.client import send
from tests.support.processes import memory
from tests.support.server import gunicorn
from tests.support.uploads import upload

SIZE = 50 * 1024 * 1024
"""Not scaled, because this size is promised."""
GROWTH = 20 * 1024 * 1024


@pytest.mark.parametrize(
    ("config", "is_chunked"),
    [("store='memory://'", False), ("", False), ("parses_first=True", False), ("", True)],
    ids=["memory", "sqlite", "sqlite-form-parsed-before", "sqlite-chunked"],
)
def test_a_large_upload_is_never_whole_in_memory(
    tmp_path: Path, config: str, is_chunked: bool, figures: Callable[[str], None]
) -> None:
    app = f"tests.support.apps.csv:create_app({str(tmp_path)!r}, {config})"
    with gunicorn(tmp_path / "log", app, "--workers", "1", "--threads", "4") as server:
        pid = send(server.port, "GET", "/pid").json()["pid"]
        upload(server.port, 100_000, is_chunked)
        before = memory(pid)
        # Resets the high-water mark: proc(5).
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        upload(server.port, SIZE, is_chunked)
        growth = memory(pid, "VmHWM") - before
        server.assert_no_traceback()
    figures(f"50 MB uploaded, resident memory at most +{growth / 1024 / 1024:.1f} MB")
    assert growth <= GROWTH, f"resident memory grew by {growth / 1024 / 1024:.1f} MB"
