"""The media types that documents are written in, and how an answer or a message names them."""

from __future__ import annotations

MEDIA_TYPES = ("application/json", "application/xml", "application/yaml")

CONTENT_TYPES = {
    "application/json": "application/json",
    "application/xml": "application/xml; charset=utf-8",
    "application/yaml": "application/yaml; charset=utf-8",
    "application/problem+json": "application/problem+json",
    "application/problem+xml": "application/problem+xml; charset=utf-8",
}
"""JSON is UTF-8 by its RFC 8259 and has no charset parameter."""
