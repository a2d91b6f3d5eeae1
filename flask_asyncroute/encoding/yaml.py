"""Encode documents as YAML."""

# PyYAML is imported on the first call, because importing it is slow.

from __future__ import annotations

import re
from functools import cache
from typing import Any

_ALSO_TYPED = (
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("bool", r"[yYnN]", "yYnN"),
)
"""Patterns of text that must be quoted: YAML 1.2 and strict 1.1 parsers do not read it as a string,
although PyYAML does.
"""

_ONE_LINE = 2**31 - 1  # maximum line width; the C emitter does not accept infinity


def encode_yaml(document: Any) -> bytes:
    """Encode plain JSON values as UTF-8 YAML. Keys keep their order, and no anchors are used.

    Strings that a YAML 1.1 or 1.2 parser would read as another type are quoted.
    """
    import yaml

    text: bytes = yaml.dump(
        document,
        Dumper=_dumper(),
        encoding="utf-8",
        allow_unicode=True,
        sort_keys=False,
        width=_ONE_LINE,
    )
    return text


@cache
def _dumper() -> Any:
    import yaml

    class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Any, value: str) -> Any:
        # Only the double-quoted style keeps all line breaks and control characters.
        style = None if value.isprintable() else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    for kind, pattern, first in _ALSO_TYPED:
        regexp = re.compile(rf"(?:{pattern})\Z")
        Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", regexp, list(first))
    return Dumper
