"""Print tables and lines in which text from clients cannot control the terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..encoding import encode_json
from ..task import State

if TYPE_CHECKING:
    from rich.console import Console

MOST_IN_CELL = 60  # characters of a table cell without rich, which fits columns to the terminal
LEAST = 12  # characters of a column that can be cut on a terminal
GAP = 2  # characters between two columns
# Control characters, marks and overrides of the text direction, line separators, surrogates.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
STYLES: dict[str, str] = {
    State.RUNNING: "cyan", State.COMPLETED: "green", State.FAILED: "red", State.ABORTED: "yellow"
}  # fmt: skip


def escape(text: str) -> str:
    """Replace characters that change the terminal or the reading order by Python escapes."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def preview(json: bytes, most: int) -> str:
    """Return the first characters of a JSON value, and its size if it is longer."""
    # A character has at most four bytes.
    text = json[: 4 * (most + 1)].decode("utf-8", "ignore")
    if len(text) <= most:
        return text
    return f"{cut(text, most)} ({len(json):,} bytes; use 'show --json')"


def echo_json(value: Any) -> None:
    """Print a value as JSON on one line. The terminal cannot interpret any character of it."""
    text = encode_json(value).decode()
    # In JSON, these characters occur only in strings.
    click.echo(_UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def console() -> Console | None:
    """Return a console of rich; None if stdout is not a terminal, or rich is not installed."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    # Without markup and emoji, brackets and colons of a text stay as they are.
    found = Console(markup=False, emoji=False, highlight=False)
    return None if found.is_dumb_terminal else found


def print_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], whole: Sequence[str] = ()
) -> None:
    """Print a table.

    :param whole: the columns that are never cut.
    """
    safe = [[escape(cell) for cell in row] for row in rows]
    terminal = console()
    if terminal is None:
        _print_plain(header, safe, whole)
        return
    from rich.table import Table
    from rich.text import Text

    columns = _fitting(header, safe, whole, terminal.width)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, GAP, 0, 0))
    for number, width in columns.items():
        least = width if header[number] in whole else None
        table.add_column(header[number], min_width=least, no_wrap=True, overflow="ellipsis")
    for row in safe:
        table.add_row(*(Text(row[n], style=STYLES.get(row[n], "")) for n in columns))
    terminal.print(table)


def _fitting(
    header: Sequence[str], rows: Sequence[Sequence[str]], whole: Sequence[str], width: int
) -> dict[int, int]:
    """Return the numbers and the widths of the columns that fit on a terminal.

    Empty columns are left out, and so are the last columns on a narrow terminal.
    """
    found: dict[int, int] = {}
    used = 0
    for number, cells in enumerate(zip(*rows, strict=True)):
        wide = max(len(header[number]), *map(len, cells))
        if not any(cells):
            continue
        used += (wide if header[number] in whole else min(wide, LEAST)) + GAP
        if used > width + GAP and found:
            break
        found[number] = wide
    return found


def _print_plain(
    header: Sequence[str], rows: Iterable[Sequence[str]], whole: Sequence[str]
) -> None:
    most = [None if name in whole else MOST_IN_CELL for name in header]
    lines = [list(header)]
    for row in rows:
        lines.append([c if m is None else cut(c, m) for c, m in zip(row, most, strict=True)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo((" " * GAP).join(cells).rstrip())


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Print a line for each name and value."""
    known = list(fields)
    width = max(len(name) for name, _ in known)
    for name, value in known:
        click.echo(f"{name.ljust(width)}  {escape(value)}")
