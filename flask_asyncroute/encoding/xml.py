"""Documents to XML 1.0. `http.negotiation` calls it for answers, callbacks for their bodies.

Whatever a JSON document holds can be read back: what XML has no place for goes into an attribute, or into base64. It
never writes a character, or a name, that makes a parser refuse the document.
"""

from __future__ import annotations

import base64
import re
from functools import lru_cache
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

_ASCII_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9._-]*")
_NAME = re.compile(
    "[A-Z_a-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02ff\u0370-\u037d\u037f-\u1fff\u200c\u200d\u2070-\u218f\u2c00-\u2fef"
    "\u3001-\ud7ff\uf900-\ufdcf\ufdf0-\ufffd\U00010000-\U000effff][-.0-9A-Z_a-z\u00b7\u00c0-\u00d6\u00d8-\u00f6"
    "\u00f8-\u037d\u037f-\u1fff\u200c\u200d\u203f\u2040\u2070-\u218f\u2c00-\u2fef\u3001-\ud7ff\uf900-\ufdcf"
    "\ufdf0-\ufffd\U00010000-\U000effff]*"
)
"""XML 1.0, fifth edition, section 2.3, without the colon, which belongs to namespaces."""

_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MAX_NAME = 255


def encode_xml(document: Any, root: str) -> bytes:
    """Return a document of plain JSON values as UTF-8 XML under an element called ``root``.

    An element per field; list members are ``<item>``, a key that is no XML name, or is ``item``, is
    ``<item name="…">``; null is ``nil="true"``. From an element ``Result`` downwards what is not a string says its
    type: ``type="number"``, ``boolean``, ``array`` or ``object``. A string that XML cannot hold is base64 of its UTF-8,
    with ``encoding="base64"``; such a key likewise, with ``name-encoding="base64"``. A carriage return is ``&#13;``.

    :raises TypeError: for a value that is not plain JSON, :class:`msgspec.Raw` included.
    """
    element = ElementTree.Element(root)
    _fill(element, document, root == "Result")
    written: bytes = ElementTree.tostring(element, encoding="utf-8", xml_declaration=True)
    # ElementTree writes a CR in text as it is, and every parser reads that as a line feed (XML 1.0, section 2.11).
    return written.replace(b"\r", b"&#13;")


def _fill(element: ElementTree.Element, value: Any, is_typed: bool) -> None:
    if isinstance(value, str):
        if _ILLEGAL.search(value):
            element.set("encoding", "base64")
            value = _base64(value)
        element.text = value
        return
    kind = None
    if value is None:
        element.set("nil", "true")
    elif isinstance(value, bool):
        kind = "boolean"
        element.text = "true" if value else "false"
    elif isinstance(value, (int, float)):
        kind = "number"
        element.text = repr(value)
    elif isinstance(value, dict):
        kind = "object"
        for key, item in value.items():
            _fill(_child(element, key), item, is_typed or key == "Result")
    elif isinstance(value, list):
        kind = "array"
        for item in value:
            _fill(ElementTree.SubElement(element, "item"), item, is_typed)
    else:
        raise TypeError(f"XML is written from plain JSON values, not from {type(value).__name__}.")
    if is_typed and kind is not None:
        element.set("type", kind)


def _child(element: ElementTree.Element, key: str) -> ElementTree.Element:
    if _is_name(key):
        return ElementTree.SubElement(element, key)
    if _ILLEGAL.search(key):
        return ElementTree.SubElement(element, "item", {"name": _base64(key), "name-encoding": "base64"})
    return ElementTree.SubElement(element, "item", {"name": key})


def _is_name(key: str) -> bool:
    if len(key) > _MAX_NAME or key == "item" or key[:3].lower() == "xml":  # those that begin with xml are reserved
        return False
    return _ASCII_NAME.fullmatch(key) is not None or (not key.isascii() and _is_name_everywhere(key))


@lru_cache(maxsize=1024)
def _is_name_everywhere(key: str) -> bool:
    """Whether this is a name in the fourth edition too: expat, which reads XML for Python, C and PHP, kept to that."""
    if _NAME.fullmatch(key) is None:
        return False
    try:
        expat.ParserCreate("utf-8").Parse(f"<{key}/>".encode(), True)
    except expat.ExpatError:
        return False
    return True


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode("ascii")
