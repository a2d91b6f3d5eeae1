"""Encode documents as XML 1.0 that every parser accepts and can decode without loss."""

from __future__ import annotations

import base64
import re
from functools import lru_cache
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

_ASCII_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9._-]*")
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# Keys with these characters are not passed to expat, which could read them as markup with entities.
_MARKUP = re.compile(r"[<>&!/=?;'\"\s]")
"""Matches characters that XML names cannot contain."""
_MAX_NAME = 255


def encode_xml(document: Any, root: str) -> bytes:
    """Encode a document of plain JSON values as UTF-8 XML with the root element ``root``.

    - Each field becomes an element, and each member of a list an ``<item>`` element.
    - A key that is not an XML name, or is ``item``, becomes ``<item name="…">``.
    - null becomes the attribute ``nil="true"``.
    - ``Result`` and the values inside it have the attribute ``type``: ``number``, ``boolean``,
      ``array`` or ``object``. Strings and nulls have no ``type``.
    - A string with characters that XML forbids becomes base64 of its UTF-8, with the attribute
      ``encoding="base64"``. Such a key gets ``name-encoding="base64"``.
    - A carriage return becomes ``&#13;``.

    :raises TypeError: for a value that is not plain JSON, such as :class:`msgspec.Raw`.
    """
    element = ElementTree.Element(root)
    _fill(element, document, root == "Result")
    written: bytes = ElementTree.tostring(element, encoding="utf-8", xml_declaration=True)
    # ElementTree does not escape a CR in text, and parsers read it as LF (XML 1.0, section 2.11).
    return written.replace(b"\r", b"&#13;")


def _fill(element: ElementTree.Element, value: Any, is_typed: bool) -> None:
    if isinstance(value, str):
        if _ILLEGAL.search(value):
            element.set("encoding", "base64")
            value = _base64(value)
        element.text = value
        return
    if value is None:
        element.set("nil", "true")
        return
    if isinstance(value, bool):
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
        raise TypeError(f"encode_xml() takes plain JSON values, not {type(value).__name__}.")
    if is_typed:
        element.set("type", kind)


def _child(element: ElementTree.Element, key: str) -> ElementTree.Element:
    if _is_name(key):
        return ElementTree.SubElement(element, key)
    attributes = {"name": key}
    if _ILLEGAL.search(key):
        attributes = {"name": _base64(key), "name-encoding": "base64"}
    return ElementTree.SubElement(element, "item", attributes)


def _is_name(key: str) -> bool:
    # "xml" at the beginning is reserved, and a colon separates namespaces.
    if len(key) > _MAX_NAME or key == "item" or key[:3].lower() == "xml" or ":" in key:
        return False
    if key.isascii() or _MARKUP.search(key):
        return _ASCII_NAME.fullmatch(key) is not None
    return _is_expat_name(key)


@lru_cache(maxsize=1024)
def _is_expat_name(key: str) -> bool:
    # expat follows the fourth edition of XML 1.0. Parsers of the fifth edition also accept these
    # names.
    found: list[str] = []
    parser = expat.ParserCreate("utf-8")
    parser.StartElementHandler = lambda name, attributes: found.append(name)
    try:
        parser.Parse(f"<{key}/>".encode(), True)
    except (expat.ExpatError, UnicodeEncodeError):
        return False
    return found == [key]


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode("ascii")
