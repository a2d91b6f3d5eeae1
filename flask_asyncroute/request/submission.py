"""The request, caller, permission and record of a new task before it is stored."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from urllib.parse import quote
from uuid import UUID

import msgspec
from flask import Request
from werkzeug.exceptions import ClientDisconnected, HTTPException, RequestEntityTooLarge
from werkzeug.http import parse_options_header
from werkzeug.sansio.utils import get_host

from ..callbacks.model import NOT_STARTED, Callback, Delivery, Shown
from ..config import Config, events_path
from ..errors import CannotStart, NotAuthenticated, NotPermitted, RequestRefused
from ..permissions import Caller, Permission
from ..routes import Route
from ..snapshot import Body, Snapshot
from ..stores.base import Joined, StartKey
from ..task import AsyncRouteTask, State, now_us
from ..validators import MAX_NAME, name_of, plain
from . import idempotency
from .capture import body_refusal, restore_body, url_variables

logger = logging.getLogger("flask_asyncroute")

ID_PATTERN = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._~-]{1,128}\Z")


@dataclass
class StartRequest:
    """A request that starts a task.

    A small body is in ``captured``; a large one is in ``body``, which the store closes.
    """

    route: Route
    current: Request
    caller: Caller | None
    captured: Snapshot
    body: Body | None
    permission: Permission | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)  # the view's, without the fixed ones
    key: StartKey | None = None
    unique_key: str | None = None
    delivery: Delivery | None = None
    start_at_us: int | None = None
    joined: Joined | None = None  # the app's transaction that adds the task
    is_from_code: bool = False  # whether `submit` starts the task

    def __post_init__(self) -> None:
        rule = self.current.url_rule
        self.rule = rule.rule if rule is not None else self.current.path
        name = self.route.options.name or f"[{self.current.method.capitalize()}]{self.rule}"
        self.name = name[:MAX_NAME]  # the ``AsyncRouteId``

    def take_key(self, name: str, secret: bytes) -> StartKey:
        """Remove the ``Idempotency-Key`` from the captured request; return its hash and a
        fingerprint.
        """
        pieces = self.body.pieces() if self.body is not None else (self.captured.body or b"",)
        kind = self.captured.environ.get("CONTENT_TYPE", "")
        # A form's multipart boundary differs in each request, so exclude it.
        boundary = ""
        if kind.startswith("multipart/"):
            boundary = parse_options_header(kind)[1].get("boundary", "")
        fingerprint = idempotency.fingerprint(
            self.current, url_of(self.current), pieces, boundary.encode("ascii", "replace"), secret
        )
        self.captured.environ.pop(idempotency.HEADER, None)
        self.key = StartKey(name, fingerprint)
        return self.key

    def record(self, worker: str, config: Config) -> AsyncRouteTask:
        """Return the new task's record. ``worker`` is the owner if only this process can run the
        task.
        """
        options, current, delivery = self.route.options, self.current, self.delivery
        user = None if self.caller is None else self.caller.id
        has_permission = self.permission is not None
        task_id = _new_id(self.route)
        group = sse_url = callback_json = None
        if options.sse is not None:
            group = (options.sse.group or self.rule)[:MAX_NAME]
            if "events" in config.operations:
                sse_url = events_path(config, current.root_path, task_id)
        if delivery is not None and options.callback is not None:
            callback_json = _shown(options.callback, delivery)
        created, start_by, retry = now_us(), options.start_timeout, options.retry
        if start_by is not None:
            start_by += max(created, self.start_at_us or 0)
        return AsyncRouteTask(
            id=task_id,
            async_route_id=self.name,
            endpoint=self.route.endpoint,
            state=State.NOT_STARTED,
            cancellable=options.cancellable,
            user=user,
            url=url_of(current)[:2048],
            method=current.method,
            created_us=created,
            permission_json=msgspec.json.encode(self.permission) if has_permission else None,
            timeout_us=options.timeout,
            start_by_us=start_by,
            start_at_us=self.start_at_us,
            retention_us=options.retention,
            on_loss=options.on_loss,
            retry_json=None if retry is None else msgspec.json.encode(retry.schedule),
            unique_key=self.unique_key,
            body_size=0 if self.body is None else self.body.size,
            owner=worker if options.is_bound else None,
            sse_group=group,
            sse_url=sse_url,
            sse_result=options.sse is not None and options.sse.send_result,
            callback_json=callback_json,
            callback_state=None if delivery is None else NOT_STARTED,
        )

    def grants(self) -> set[tuple[str, str]]:
        """Return the (kind, name) pairs of callers, besides the task's user, that may list the
        task.
        """
        if self.permission is None:
            return set()
        owner = set() if self.caller is None else {("users", self.caller.id)}
        return {*self.permission.read, *self.permission.write} - owner


def permission_of(route: Route, caller: Caller | None) -> Permission | None:
    """Return the permission of the task that the current request starts.

    :raises NotAuthenticated: if the route has a permission and the caller is unknown.
    :raises NotPermitted: if the route's permission function raises an exception or returns no
        Permission.
    """
    option = route.options.permission
    if option is None:
        return None
    if caller is None:
        raise NotAuthenticated(
            "Only authenticated callers may start tasks of this route. Sign in and try again."
        )
    if isinstance(option, Permission):
        return option
    try:
        permission = option()
    except Exception as error:
        if _is_refusal(error):
            raise
        logger.exception(
            "The permission function of endpoint %s raised an exception. The request got 403.",
            route.endpoint,
        )
        raise NotPermitted("The permission for this task could not be determined.") from error
    if not isinstance(permission, Permission):
        logger.error(
            "The permission function of endpoint %s returned a %s instead of a Permission. The "
            "request got 403.",
            route.endpoint, type(permission).__name__,
        )  # fmt: skip
        raise NotPermitted("The permission for this task could not be determined.")
    return permission


def validate(incoming: StartRequest) -> None:
    """Call the route's ``validate`` function. Its exceptions are those of the caller."""
    options = incoming.route.options
    if options.validate is not None:
        restore_body(incoming.current, incoming.captured, incoming.body)
        try:
            options.validate(**{**options.arguments, **incoming.arguments})
        except (ClientDisconnected, RequestEntityTooLarge) as error:
            if error.description != type(error).description:
                raise  # the function itself refuses the request
            raise body_refusal(incoming.current, error) from error


def take_unique_key(incoming: StartRequest, secret: bytes) -> None:
    """Set the ``unique_key`` of a start request.

    :raises CannotStart: if the route's function raises an exception or returns neither a key nor
        None.
    """
    option, key = incoming.route.options.unique, None
    if option is True:
        key = json.dumps(url_variables(incoming.current), sort_keys=True, default=str)
    elif callable(option):
        restore_body(incoming.current, incoming.captured, incoming.body)
        key = _unique_key(option, incoming)
    if key is not None:
        incoming.unique_key = idempotency.unique_name(
            incoming.current, incoming.route.endpoint, incoming.caller, key, secret
        )


def _unique_key(function: Callable[[], Any], incoming: StartRequest) -> str | None:
    try:
        key = function()
        if key is None:
            return None
        if isinstance(key, (str, int, Enum, UUID)):
            return name_of(key)
        # The text of other objects can differ between equal keys.
        raise TypeError(f"it returned a {type(key).__name__}")
    except Exception as error:
        if isinstance(error, HTTPException):
            error = body_refusal(incoming.current, error)
        if _is_refusal(error):
            raise error
        logger.exception(
            "The unique function of endpoint %s raised an exception, or returned no valid key; "
            "return a string, an integer, an Enum, a UUID or None. The request got 500.",
            incoming.route.endpoint,
        )
        raise CannotStart("The unique key of this task could not be determined.") from error


def _is_refusal(error: Exception) -> bool:
    """Return whether an app's function has failed because the body is invalid or the store is
    unavailable.
    """
    if isinstance(error, (ClientDisconnected, RequestEntityTooLarge)):
        return True
    # The errors about a task are HTTPExceptions; in these functions they are mistakes.
    return isinstance(error, RequestRefused) and not isinstance(error, HTTPException)


def url_of(current: Request) -> str:
    """Return a request's absolute, percent-encoded URL without its query."""
    path = quote(current.root_path + current.path, safe="/:@!$&'()*+,;=~", errors="replace")
    # Older versions of Werkzeug keep userinfo in the host. Newer ones return "" for an invalid
    # host.
    host = current.host.rpartition("@")[2] or get_host(current.scheme, None, current.server)
    return f"{current.scheme}://{host}{path}"


def _new_id(route: Route) -> str:
    try:
        task_id = route.options.id_generator()
    except Exception as error:
        raise CannotStart("The id generator of this route failed. No task was started.") from error
    if not isinstance(task_id, str) or not ID_PATTERN.match(task_id):
        raise CannotStart(
            "The id generator of this route returned an invalid id; use 1 to 128 characters of "
            "A-Z a-z 0-9 . _ ~ -. No task was started."
        ) from ValueError(f"it returned {task_id!r:.80}")
    return plain(task_id)


def _shown(callback: Callback, delivery: Delivery) -> bytes:
    same = ("method", "content_type", "send_result", "event_name")
    shown = Shown(
        url_field=callback.url_field,
        header_fields=list(callback.headers),
        url=delivery.url.partition("?")[0],
        **{name: getattr(delivery, name) for name in same},
    )
    return msgspec.json.encode(shown)
