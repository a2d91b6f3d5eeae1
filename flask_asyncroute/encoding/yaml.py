"""Documents to YAML. `http.negotiation` calls it. PyYAML is imported at the first call: most apps never need it."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

_CORE_1_2 = (
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("bool", r"[yYnN]", "yYnN"),
)
"""What YAML 1.2 readers, or 1.1 readers stricter than PyYAML, take for something else than a string."""

_ONE_LINE = 2**31 - 1  # the C emitter takes no infinity


def encode_yaml(document: Any) -> bytes:
    """Return a document of plain JSON values as UTF-8 YAML, without anchors, keys in their order.

    Strings that a reader of YAML 1.1 or 1.2 would take for something else are quoted.
    """
    import yaml

    text: bytes = yaml.dump(
        document,
        Dumper=_dumper(),
        encoding="utf-8",
        allow_unicode=True,
        sort_keys=False,
        default_flow_style=False,
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
        # Line breaks of every kind, control and format characters survive only in the double-quoted style.
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')

    Dumper.add_representer(str, text)
    for kind, pattern, first in _CORE_1_2:
        Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{pattern})\Z"), list(first))
    return Dumper
