"""What a request to an operation asks for: the task's id, the query, and whether a foreign page may ask at all."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, unquote_plus

from flask import Request
from werkzeug.datastructures import MultiDict

from ..config import Config
from ..dispatcher import unknown
from ..encoding import decode_json
from ..errors import BodyTooLarge, InvalidRequest, NotPermitted, UnsupportedMediaType
from ..intake import ID_PATTERN
from ..query import Query, parse_get, parse_post

MAX_BODY = 1024 * 1024


def task_id(request: Request, config: Config, in_path: str | None) -> str:
    """Return the id of the task that is asked for, from the first of the configured places that has one.

    :raises InvalidRequest: where none has, or the query gives it twice.
    :raises TaskNotFound: for what cannot be an id.
    """
    name = config.task_id_name.lower()
    for place in config.task_id_in:
        found: str | None = None
        if place == "path":
            found = in_path
        elif place == "query":
            values = [value for key, value in arguments(request).items(multi=True) if key.lower() == name]
            if len(values) > 1:
                raise InvalidRequest(f"The query gives {config.task_id_name} more than once; give one task id.")
            found = values[0] if values else None
        elif place == "header":
            found = request.headers.get(config.task_id_name)
        else:
            found = next((value for key, value in request.cookies.items(multi=True) if key.lower() == name), None)
        if found is not None:
            if not ID_PATTERN.match(found):
                raise unknown(found[:128])
            return found
    raise InvalidRequest(
        f"No task id is given; it is looked for in: {', '.join(config.task_id_in)} ({config.task_id_name})."
    )


def is_purge(request: Request) -> bool:
    """Return whether a stop is to remove the task: ``?purge=true``.

    :raises InvalidRequest: for another value than true or false.
    """
    values = arguments(request).getlist("purge")
    if len(values) > 1 or (values and values[0].lower() not in ("true", "false")):
        raise InvalidRequest("purge takes one value, true or false.")
    return bool(values) and values[0].lower() == "true"


def query(request: Request) -> Query:
    """Return the query that the request is, in whichever of the three styles.

    :raises InvalidQuery: for what is none.
    :raises UnsupportedMediaType: for a body that is not JSON in UTF-8.
    :raises BodyTooLarge: for one over 1 MiB.
    """
    # As WSGI has it: undecoded, so that an encoded comma is not taken for one that begins a condition.
    query_string = request.query_string.decode("latin-1")
    if request.method != "POST":
        return parse_get(query_string)
    return parse_post(query_string, _document(request))


def refuse_foreign_page(request: Request, config: Config) -> None:
    """Refuse what a page of another site makes a browser do with the cookies of ours (Fetch Metadata).

    :raises NotPermitted: with a Cookie and ``Sec-Fetch-Site: cross-site``, unless the Origin is trusted.
    """
    headers = request.headers
    if headers.get("Sec-Fetch-Site", "").lower() != "cross-site" or "Cookie" not in headers:
        return
    if headers.get("Origin", "").lower() not in config.trusted_origins:
        raise NotPermitted(
            "A page of another site asked for this with your cookies. Sites that may are listed in ASYNCROUTE_TRUSTED_ORIGINS."
        )


def next_link(request: Request, cursor: str) -> tuple[str, str]:
    """Return the Link header that leads to the next page of this query."""
    query_string = request.query_string.decode("latin-1")
    kept = [part for part in query_string.split("&") if part and unquote_plus(part.partition("=")[0]) != "cursor"]
    target = "&".join([*kept, f"cursor={cursor}"])
    safe = "".join(
        character if 32 < ord(character) < 127 and character not in '<>"' else f"%{ord(character):02X}"
        for character in target
    )
    return "Link", f'<{quote(request.root_path + request.path)}?{safe}>; rel="next"'


def arguments(request: Request) -> MultiDict[str, str]:
    """Return the parameters of the query.

    :raises InvalidRequest: where it is not UTF-8.
    """
    try:
        return request.args
    except UnicodeDecodeError:
        raise InvalidRequest("The query string is not UTF-8; percent-encode what is not ASCII.") from None


def _document(request: Request) -> Any:
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("An encoded (compressed) body is not read here; send plain JSON.")
    if request.mimetype != "application/json":
        raise UnsupportedMediaType("A query is read as application/json; say so in the Content-Type.")
    charset = request.mimetype_params.get("charset", "utf-8").lower()
    if charset not in ("utf-8", "utf8"):
        raise UnsupportedMediaType("JSON is read as UTF-8; leave the charset out of the Content-Type.")
    if (request.content_length or 0) > MAX_BODY:
        raise BodyTooLarge(f"A query has at most {MAX_BODY} bytes.")
    announced = request.content_length
    data = bytearray()
    try:
        while piece := request.stream.read(MAX_BODY + 1 - len(data)):
            data += piece
            if len(data) > MAX_BODY:
                raise BodyTooLarge(f"A query has at most {MAX_BODY} bytes.")
    except BodyTooLarge:
        raise
    except Exception as error:
        raise InvalidRequest(f"The body cannot be read ({type(error).__name__}). Send it again.") from error
    if announced is not None and len(data) < announced:
        raise InvalidRequest(f"The body was cut short: {len(data)} of {announced} bytes arrived. Send it again.")
    return decode_json(bytes(data), "The query")
