"""Encode JSON, XML and YAML, and decode JSON."""

from .json import clean_text, decode_json, encode_json
from .results import encode_result, encode_value, json_default
from .xml import encode_xml
from .yaml import encode_yaml

MEDIA_TYPES = ("application/json", "application/xml", "application/yaml")
# JSON needs no charset, because it is always UTF-8.
CONTENT_TYPES = {
    "application/json": "application/json",
    "application/xml": "application/xml; charset=utf-8",
    "application/yaml": "application/yaml; charset=utf-8",
    "application/problem+json": "application/problem+json",
    "application/problem+xml": "application/problem+xml; charset=utf-8",
}
"""The ``Content-Type`` header for each media type."""

__all__ = ["CONTENT_TYPES", "MEDIA_TYPES", "clean_text", "decode_json", "encode_json"]
__all__ += ["encode_result", "encode_value", "encode_xml", "encode_yaml", "json_default"]
