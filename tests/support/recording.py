"""Record a terminal with tmux, and draw the recording as an animated SVG."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from html import escape
from pathlib import Path
from types import TracebackType

CELL, LINE, FONT = 8.4, 19, 14
MARGIN = 14
BACKGROUND, FOREGROUND = "#1e2127", "#d7dae0"


class Terminal:
    """A terminal of tmux in which a shell runs while the context lasts.

    :param folder: for the socket of tmux.
    :param environ: variables of the shell, beside those of this process.
    """

    def __init__(self, folder: Path, columns: int, lines: int, environ: dict[str, str]) -> None:
        self._tmux = ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
        self._start = ["new-session", "-d", "-x", str(columns), "-y", str(lines), "sh"]
        # The first call starts the server of tmux, which passes on the variables of that call. An
        # option for variables exists, but PATH always comes from the call.
        self._environ = {**os.environ, **environ}

    def _call(self, *words: str) -> str:
        done = subprocess.run(
            [*self._tmux, *words], env=self._environ, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def __enter__(self) -> Terminal:
        self._call(*self._start)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._call("kill-server")

    def type(self, line: str) -> None:
        self._call("send-keys", "-l", line)
        self._call("send-keys", "Enter")

    def frame(self) -> str:
        """Return what the terminal shows, with escape sequences for colours."""
        return self._call("capture-pane", "-e", "-p").rstrip()


def draw(frames: Sequence[str], columns: int, lines: int, seconds: float) -> str:
    """Return an SVG that repeats the frames. Without animation, it shows the last.

    :param seconds: how long each frame is shown; the last is shown five times as long.
    """
    count = len(frames) + 4
    width, height = columns * CELL + 2 * MARGIN, lines * LINE + 2 * MARGIN
    rules, groups = [], []
    for number, frame in enumerate(frames):
        begin = 100 * number / count
        end = 100.0 if number == len(frames) - 1 else 100 * (number + 1) / count
        before = f"0%,{begin:.2f}%{{visibility:hidden}}" if number else ""
        after = f"{end:.2f}%,100%{{visibility:hidden}}" if end < 100 else ""
        # The second rule of a pair at the same percentage wins.
        rules.append(f"@keyframes k{number}{{{before}{begin:.2f}%{{visibility:visible}}{after}}}")
        rules.append(f".f{number}{{animation:k{number} {count * seconds:g}s infinite step-end}}")
        groups.append(f'<g class="f f{number}">{_text(frame)}</g>')
    style = "".join(rules)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}">\n'
        f"<style>text{{font:{FONT}px ui-monospace,Menlo,Consolas,monospace;fill:{FOREGROUND};"
        f"white-space:pre}}.f{{visibility:hidden}}.f:last-of-type{{visibility:visible}}"
        f"@media(prefers-reduced-motion:no-preference){{{style}}}</style>\n"
        f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>\n'
        + "\n".join(groups)
        + "\n</svg>\n"
    )


def _text(frame: str) -> str:
    from rich.console import Console
    from rich.terminal_theme import SVG_EXPORT_THEME
    from rich.text import Text

    console = Console()
    drawn = []
    for number, line in enumerate(frame.splitlines()):
        y = MARGIN + LINE * number + FONT
        column = 0
        for segment in Text.from_ansi(line).render(console):
            style = segment.style
            css = ""
            if style is not None and style.color is not None and not style.color.is_default:
                css = f"fill:{style.color.get_truecolor(SVG_EXPORT_THEME).hex};"
            if style is not None and style.bold:
                css += "font-weight:bold;"
            if segment.text.strip():
                # The length keeps the columns aligned in any font.
                wide = len(segment.text) * CELL
                drawn.append(
                    f'<text x="{MARGIN + column * CELL:g}" y="{y}" textLength="{wide:g}" '
                    f'style="{css}">{escape(segment.text)}</text>'
                )
            column += len(segment.text)
    return "".join(drawn)
