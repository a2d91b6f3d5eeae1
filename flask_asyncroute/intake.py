"""What a start takes in before there is a task: the request, who makes it, who may read it, and the new task's record.

`dispatcher` fills it and has it stored. Nothing here writes.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from urllib.parse import quote

import msgspec
from flask import Request
from werkzeug.exceptions import ClientDisconnected, RequestEntityTooLarge
from werkzeug.http import parse_options_header
from werkzeug.sansio.utils import get_host

from . import start_key
from .config import Config
from .delivery import NOT_STARTED, Delivery, Shown
from .errors import CannotStart, NotAuthenticated, NotPermitted, RequestRefused
from .locations import events_path
from .names import MAX_NAME, plain
from .permissions import Caller, Permission
from .registry import Route
from .snapshot import Body, Snapshot
from .start_key import StartKey
from .states import State
from .task import AsyncRouteTask, now_us

logger = logging.getLogger("flask_asyncroute")

ID_PATTERN = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._~-]{1,128}\Z")


@dataclass(slots=True)
class Intake:
    """One start that was asked for. Of one thread.

    :param body: what ``captured`` does not hold of the request's body; whoever stores the task closes it.
    :param permission: of the route, for this request; see :func:`permission_of`.
    """

    route: Route
    current: Request
    caller: Caller | None
    captured: Snapshot
    body: Body | None
    permission: Permission | None = None
    key: StartKey | None = None
    delivery: Delivery | None = None

    def take_key(self, name: str, secret: bytes) -> StartKey:
        """Take the request's ``Idempotency-Key``, of which the task then sees nothing; return it.

        :param name: see :func:`start_key.key_name`.
        """
        pieces = self.body.pieces() if self.body is not None else (self.captured.body or b"",)
        kind = self.captured.environ.get("CONTENT_TYPE", "")
        # Clients make a new one for each request, and so do we where a form was read before.
        found = parse_options_header(kind)[1].get("boundary", "") if kind.startswith("multipart/") else ""
        boundary = found.encode("ascii", "replace")
        fingerprint = start_key.fingerprint(self.current, url_of(self.current), pieces, boundary or None, secret)
        self.captured.environ.pop(start_key.HEADER, None)
        self.key = StartKey(name, fingerprint)
        return self.key

    def record(self, worker: str, config: Config) -> AsyncRouteTask:
        """Return a new task with a new id.

        :param worker: this process, whose own a task is that no other can run.
        :raises CannotStart: where the route's id generator fails.
        """
        route, current = self.route, self.current
        options = route.options
        method = current.method
        owner = None if self.caller is None else self.caller.id
        task_id = _new_id(route)
        group = None if options.sse is None else (options.sse.group or self._rule)[:MAX_NAME]
        return AsyncRouteTask(
            id=task_id,
            async_route_id=self.name(),
            endpoint=route.endpoint,
            state=State.NOT_STARTED,
            cancellable=options.cancellable,
            user=owner,
            url=url_of(current)[:2048],
            method=method,
            created_us=now_us(),
            permission_json=None if owner is None or self.permission is None else msgspec.json.encode(self.permission),
            timeout_us=options.timeout,
            retention_us=options.retention,
            on_loss=options.on_loss,
            body_size=0 if self.body is None else self.body.size,
            owner=worker if options.is_bound else None,
            sse_group=group,
            sse_url=None
            if group is None or "events" not in config.operations
            else events_path(config, current.root_path, task_id),
            sse_result=options.sse is not None and options.sse.send_result,
            callback_json=None if self.delivery is None else self._shown(self.delivery),
            callback_state=None if self.delivery is None else NOT_STARTED,
        )

    @property
    def _rule(self) -> str:
        rule = self.current.url_rule
        return rule.rule if rule is not None else self.current.path

    def name(self) -> str:
        """Return the task's ``AsyncRouteId``."""
        return (self.route.options.name or f"[{self.current.method.capitalize()}]{self._rule}")[:MAX_NAME]

    def _shown(self, delivery: Delivery) -> bytes:
        callback = self.route.options.callback
        assert callback is not None, "a delivery is made of one"
        return msgspec.json.encode(
            Shown(
                url_field=callback.url_field,
                method=delivery.method,
                content_type=delivery.content_type,
                send_result=delivery.send_result,
                event_name=delivery.event_name,
                header_fields=list(callback.headers),
                url=delivery.url.partition("?")[0],
            )
        )

    def grants(self) -> set[tuple[str, str]]:
        """Return each (kind, name) that may list the task beside its owner."""
        if self.caller is None or self.permission is None:
            return set()
        return {*self.permission.read, *self.permission.write} - {("users", self.caller.id)}


def permission_of(route: Route, caller: Caller | None) -> Permission | None:
    """Return who else may read and write a task that the caller starts by the present request.

    :raises NotAuthenticated: where the route has a permission and nobody known asks.
    :raises NotPermitted: where the route's function does not return one.
    """
    asked = route.options.permission
    if asked is None:
        return None
    if caller is None:
        raise NotAuthenticated("This route starts tasks for known callers only. Sign in and try again.")
    if isinstance(asked, Permission):
        return asked
    try:
        permission = asked()
    except (RequestRefused, ClientDisconnected, RequestEntityTooLarge):
        # It read the body, and what is wrong with that is the client's.
        raise
    except Exception as error:
        logger.exception("The permission function of endpoint %s raised.", route.endpoint)
        raise NotPermitted("The permission for this task could not be determined.") from error
    if not isinstance(permission, Permission):
        logger.error(
            "The permission function of endpoint %s returned a %s; it must return a Permission.",
            route.endpoint, type(permission).__name__,
        )  # fmt: skip
        raise NotPermitted("The permission for this task could not be determined.")
    return permission


def _new_id(route: Route) -> str:
    try:
        task_id = route.options.id_generator()
    except Exception as error:
        logger.exception("The id generator of endpoint %s raised.", route.endpoint)
        raise CannotStart("The id generator of this route failed. Nothing was started.") from error
    if not isinstance(task_id, str) or not ID_PATTERN.match(task_id):
        logger.error("The id generator of endpoint %s returned %r.", route.endpoint, task_id)
        raise CannotStart(
            "The id generator of this route returned something else than 1 to 128 of A-Z a-z 0-9 . _ ~ -. Nothing was started."
        )
    return plain(task_id)


def url_of(current: Request) -> str:
    """Return the absolute URL of a request without its query; as `Request.base_url`, percent-encoded, and faster."""
    path = quote(current.root_path + current.path, safe="/:@!$&'()*+,;=~", errors="replace")
    # Older Werkzeug lets userinfo through in the Host header, newer gives nothing for one that is none.
    host = current.host.rpartition("@")[2] or get_host(current.scheme, None, current.server)
    return f"{current.scheme}://{host}{path}"
