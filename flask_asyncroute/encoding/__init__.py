"""Values to bytes and back: JSON, XML and YAML.

`worker` encodes what a view returned, `http` writes documents and reads request bodies. Pure: no Flask, no store, no
clock. Nothing here ever guesses: what a format cannot hold is refused, or written so that it can be read back.
"""

from .json import clean_text, decode_json, encode_json
from .media_types import CONTENT_TYPES, MEDIA_TYPES
from .results import encode_result, encode_value
from .xml import encode_xml
from .yaml import encode_yaml

__all__ = [
    "CONTENT_TYPES",
    "MEDIA_TYPES",
    "clean_text",
    "decode_json",
    "encode_json",
    "encode_result",
    "encode_value",
    "encode_xml",
    "encode_yaml",
]
