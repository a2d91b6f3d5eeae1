"""HTML pages for browsers: a task, a list of tasks, and a problem."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flask import Request, Response, current_app, render_template, send_from_directory, url_for
from itsdangerous import BadSignature, URLSafeTimedSerializer

from ..config import Config, task_path
from ..errors import NotPermitted, RequestRefused
from ..permissions import Caller
from ..runtime import EXTENSION, current_runtime
from ..task import AsyncRouteTask, State
from ..workers.runner import Runner
from . import responses
from .responses import NO_STORE, VARY, negotiate

HTML = "text/html"
FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")
MAX_RESULT = 64 * 1024  # characters of a result on the page of its task
TOKEN = "csrf_token"
TOKEN_SECONDS = 24 * 60 * 60
ASSETS = Path(__file__).parent.parent / "static"
TEMPLATES = Path(__file__).parent.parent / "templates"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
WORDS = {
    State.NOT_STARTED: "Waiting",
    State.RUNNING: "Running",
    State.COMPLETED: "Completed",
    State.FAILED: "Failed",
    State.ABORTED: "Aborted",
}
_SAFE_PATH = re.compile(r"/(?![/\\])[\x21-\x5b\x5d-\x7e]*")


def wants_page(current: Request, config: Config) -> bool:
    """Return whether the client is a browser that shows a page, and the app has pages."""
    accept = current.environ.get("HTTP_ACCEPT", "")
    return HTML in accept and config.pages and negotiate(accept, responses.WITH_HTML) == HTML


def is_form(current: Request) -> bool:
    """Return whether a browser's form has sent the request."""
    return current.method == "POST" and current.mimetype in FORMS


def task_page(
    runner: Runner, current: Request, task: AsyncRouteTask, caller: Caller | None, may_stop: bool
) -> Response:
    """Return the page of a task. It updates itself until the task cannot change any more."""
    config = runner.config
    result, is_cut = _shown_result(task)
    stop_url = None
    if may_stop and task.cancellable and not task.is_completed and "stop" in config.operations:
        stop_url = task_path(config, current.root_path, task.id, "/stop")
    times = {
        "Created": task.creation_time,
        "Started": task.starting_time,
        "Next attempt": task.next_attempt_time,
        "Ends at the latest": None if task.is_completed else task.expire_time,
        "Ended": task.completed_time,
    }
    return _page(
        "task.html", 200,
        task=task, words=WORDS, result=result, is_cut=is_cut,
        result_url=task_path(config, current.root_path, task.id, "/result"),
        is_at_rest=task.is_completed and not task.stopping,
        events_url=task.sse_url,
        stop_url=stop_url,
        csrf_tokens=_tokens(runner, task, caller) if stop_url else (),
        times=[(name, time) for name, time in times.items() if time is not None],
        next_path=next_path(current),
        tasks_url=url_for(f"{EXTENSION}.query") if "query" in config.operations else None,
    )  # fmt: skip


def tasks_page(
    runner: Runner, current: Request, tasks: Sequence[AsyncRouteTask], next_url: str | None
) -> Response:
    """Return a list of tasks. ``next_url`` is the URL of its next page, if there is one."""
    config = runner.config
    has_get = "get" in config.operations
    listed = [
        (task, task_path(config, current.root_path, task.id) if has_get else None) for task in tasks
    ]
    return _page("tasks.html", 200, tasks=listed, words=WORDS, next_url=next_url)


def refuse(refusal: RequestRefused, current: Request) -> Response:
    """Return the response to a refused request, as a page if the client is a browser."""
    response = responses.refuse(refusal, current)
    if not wants_page(current, current_runtime().config):
        return response
    problem = responses.problem_of(refusal, current.path)
    page = _page("problem.html", refusal.status, problem=problem)
    for name in ("Retry-After", "WWW-Authenticate", "Allow"):
        if name in response.headers:
            page.headers[name] = response.headers[name]
    return page


def redirect_to_task(runner: Runner, current: Request, task: AsyncRouteTask) -> Response:
    """Return a redirect (303) to the page of a task. It keeps the ``next`` of the request."""
    location = task_path(runner.config, current.root_path, task.id)
    following = next_path(current)
    if following is not None:
        separator = "&" if "?" in location else "?"
        location += f"{separator}next={quote(following)}"
    headers = {"Location": location, "Cache-Control": NO_STORE, "Vary": VARY}
    return Response(status=303, headers=headers)


def next_path(current: Request) -> str | None:
    """Return the path of this app in ``next``; None if it is missing or not such a path."""
    given = current.args.get("next")
    if given is None and is_form(current):
        given = current.form.get("next")
    return given if given is not None and _SAFE_PATH.fullmatch(given) else None


def check_token(runner: Runner, current: Request, task_id: str, caller: Caller | None) -> None:
    """Raise NotPermitted unless the form contains the token of this task and caller."""
    signer, expected = _signer(runner), _signed(task_id, caller)
    for token in current.form.getlist(TOKEN):
        try:
            if signer.loads(token, max_age=TOKEN_SECONDS) == expected:
                return
        except BadSignature:
            continue
    raise NotPermitted("The form has expired. Go back, load the page again, and press the button.")


def asset(filename: str) -> Response:
    """Return a script or style sheet of the pages."""
    return send_from_directory(ASSETS, filename, max_age=3600)


def _tokens(runner: Runner, task: AsyncRouteTask, caller: Caller | None) -> list[tuple[str, str]]:
    """Return the names and values of the form's hidden fields."""
    own = (TOKEN, str(_signer(runner).dumps(_signed(task.id, caller))))
    if "csrf" not in current_app.extensions:
        return [own]
    from flask_wtf.csrf import generate_csrf  # the app uses Flask-WTF

    # Flask-WTF reads the first value, and usually its field has the same name.
    return [(current_app.config.get("WTF_CSRF_FIELD_NAME", TOKEN), generate_csrf()), own]


def _signer(runner: Runner) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(runner.store.secret(), salt="flask_asyncroute.stop")


def _signed(task_id: str, caller: Caller | None) -> list[str | None]:
    return [task_id, None if caller is None else caller.id]


def _shown_result(task: AsyncRouteTask) -> tuple[str | None, bool]:
    """Return the result as text, and whether it was cut."""
    if task.result_json is None:
        return None, False
    value = task.result
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2)
    return text[:MAX_RESULT], len(text) > MAX_RESULT


def _page(template: str, status: int, **values: Any) -> Response:
    html = render_template(f"asyncroute/{template}", **values)
    headers: Mapping[str, str] = {
        "Cache-Control": NO_STORE,
        "Vary": VARY,
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
    }
    response = Response(html, status, headers, mimetype=HTML)
    # An app that replaces the base template can load its own scripts and styles.
    base = current_app.jinja_env.get_template("asyncroute/base.html").filename
    if base is not None and Path(base).is_relative_to(TEMPLATES):
        response.headers["Content-Security-Policy"] = CSP
    return response
