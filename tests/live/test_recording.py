"""A recording of ``flask asyncroute watch`` in a terminal of tmux.

``PICTURE=docs/_static/watch.svg`` writes the recording for the documentation.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import ROOT
from tests.support.recording import Terminal, draw
from tests.support.server import START, gunicorn

pytestmark = pytest.mark.live

COLUMNS, LINES = 100, 7
FRAME_SECONDS = 0.25
APP = "tests.support.apps.operated:create_app({folder!r})"


def test_a_recording_shows_the_progress_bar(tmp_path: Path, eventually: Callable[..., Any]) -> None:
    pytest.importorskip("rich")
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    (tmp_path / "bin").mkdir()
    flask = tmp_path / "bin" / "flask"
    flask.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m flask "$@"\n', "utf-8")
    flask.chmod(0o700)
    app = APP.format(folder=str(tmp_path))
    environ = {
        "FLASK_APP": app, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LANG": "C.UTF-8",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }  # fmt: skip
    frames: list[str] = []
    with (
        gunicorn(tmp_path / "log", app, "--threads", "4", conf=START),
        Terminal(tmp_path, COLUMNS, LINES, environ) as terminal,
    ):
        submit = [str(flask), "asyncroute", "submit", "steps", "--value", "count=40"]
        done = subprocess.run(
            submit, cwd=ROOT, env={**os.environ, **environ}, text=True, capture_output=True, check=True
        )  # fmt: skip
        terminal.type("PS1='$ '; clear")
        eventually(lambda: terminal.frame() == "$", 30)
        terminal.type(f"flask asyncroute watch {done.stdout.strip()}")

        def has_ended() -> bool:
            frame = terminal.frame()
            if "flask" in frame and (not frames or frames[-1] != frame):
                frames.append(frame)
            return "is Completed" in frame

        try:
            eventually(has_ended, 30, FRAME_SECONDS)
        except AssertionError:
            pytest.fail(f"The command has not ended. The terminal shows:\n{terminal.frame()}")
    shown = "\n".join(re.sub(r"\x1b\[[0-9;]*m", "", frame) for frame in frames)
    assert "━" in shown and "step 40 of 40" in shown and "100 %" in shown
    picture = draw(frames, COLUMNS, LINES, FRAME_SECONDS)
    assert "step 40 of 40" in picture
    if path := os.environ.get("PICTURE"):
        Path(path).write_text(picture, "utf-8")
