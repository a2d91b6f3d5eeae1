"""A bar chart of whole tasks per second, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

BAR, GAP, LABELS, WIDTH = 16, 6, 220, 420
COLORS = ("#9a9a9a", "#5b8db8", "#2f5d50")
"""One for each durability class, from light to dark."""


def chart(bars: Sequence[tuple[str, str, float]], title: str) -> str:
    """Return the chart.

    :param bars: durability class, name and value of each bar. Bars of a class are neighbours.
    """
    longest = max((value for _, _, value in bars), default=1.0)
    classes = list(dict.fromkeys(name for name, _, _ in bars))
    parts, y, last = [], 0, None
    for durability, name, value in bars:
        if durability != last:
            y += 26
            parts.append(f'<text x="0" y="{y - 6}" font-weight="bold">{escape(durability)}</text>')
            last = durability
        length = max(value / longest * WIDTH, 1)
        middle, color = y + BAR - 4, COLORS[classes.index(durability) % len(COLORS)]
        parts += [
            f'<text x="{LABELS - 8}" y="{middle}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{LABELS}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{color}"/>',
            f'<text x="{LABELS + length + 6:.1f}" y="{middle}">{value:.2g}</text>',
        ]
        y += BAR + GAP
    size = f'viewBox="0 0 {LABELS + WIDTH + 50} {y + 4}" width="{LABELS + WIDTH + 50}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" '
            'font-size="13" role="img">',
            f"<title>{escape(title)}</title>",
            *parts,
            "</svg>",
            "",
        ]
    )
