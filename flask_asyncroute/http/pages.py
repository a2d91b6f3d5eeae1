"""HTML pages for browsers: a task, a list of tasks, and a problem."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flask import Request, Response, current_app, render_template, send_from_directory
from itsdangerous import BadData, URLSafeTimedSerializer

from ..config import Config, task_path
from ..errors import BodyTooLarge, NotPermitted, RequestRefused
from ..permissions import Caller
from ..runtime import current_runtime
from ..task import AsyncRouteTask, State
from ..workers.runner import Runner
from . import params, responses
from .responses import HTML, NO_STORE, VARY

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
_PATH = re.compile(r"/(?![/\\])[\x21-\x5b\x5d-\x7e]{,2000}")


def wants_page(current: Request, config: Config) -> bool:
    """Return whether the client is a browser that shows a page, and the app has pages."""
    return config.pages and responses.is_browser(current.environ.get("HTTP_ACCEPT", ""))


def redirects_form(current: Request, config: Config) -> bool:
    """Return whether a browser's form has sent the request, and a link to the task can work."""
    # The content type is parsed last, because most starts come from other clients.
    is_post = current.method == "POST" and wants_page(current, config)
    return is_post and current.mimetype in FORMS and _has_links(config)


def _has_links(config: Config) -> bool:
    """Return whether a URL alone identifies a task. A link sends no header and sets no cookie."""
    return "get" in config.operations and not {"path", "query"}.isdisjoint(config.task_id_in)


def task_page(
    runner: Runner, current: Request, task: AsyncRouteTask, caller: Caller | None, may_stop: bool
) -> Response:
    """Return the page of a task. It updates itself until the task cannot change any more."""
    config = runner.config
    result, is_cut = _shown_result(task)
    following = next_path(current)
    stop_url = None
    if may_stop and task.cancellable and not task.is_completed and "stop" in config.operations:
        stop_url = _with_next(task_path(config, current.root_path, task.id, "/stop"), following)
    times = {
        "Created": task.creation_time,
        "Started": task.starting_time,
        "Next attempt": task.next_attempt_time,
        "Ends at the latest": None if task.is_completed else task.expire_time,
        "Ended": task.completed_time,
    }
    response = _page(
        "task.html", 200, current,
        task=task, words=WORDS, result=result, is_cut=is_cut,
        progress=_percent(task),
        result_url=task_path(config, current.root_path, task.id, "/result"),
        is_at_rest=task.is_completed and not task.stopping,
        events_url=task.sse_url,
        stop_url=stop_url,
        csrf_tokens=_tokens(runner, task, caller) if stop_url else (),
        times=[(name, time, _utc(time)) for name, time in times.items() if time is not None],
        duration=_duration(task),
        next_path=following,
        tasks_url=_tasks_url(config, current),
    )  # fmt: skip
    if stop_url:
        # The checks of other extensions need the Referer and Origin of the form's request.
        response.headers["Referrer-Policy"] = "same-origin"
    return response


def tasks_page(
    runner: Runner, current: Request, tasks: Sequence[AsyncRouteTask], next_url: str | None
) -> Response:
    """Return a list of tasks. ``next_url`` is the URL of its next page, if there is one."""
    config = runner.config
    listed = [
        {
            "task": task,
            "url": _task_url(config, current, task.id),
            "created": _utc(task.creation_time),
            "duration": _duration(task),
            "progress": _percent(task),
        }
        for task in tasks
    ]
    return _page("tasks.html", 200, current, tasks=listed, words=WORDS, next_url=next_url)


def refuse(refusal: RequestRefused, current: Request) -> Response:
    """Return the response to a refused request, as a page if the client is a browser."""
    response = responses.refuse(refusal, current)
    config = current_runtime().config
    if not wants_page(current, config):
        return response
    task_url = None
    if refusal.task_id is not None and refusal.status != 404:
        task_url = _task_url(config, current, refusal.task_id)
    problem = {"Id": None, **responses.problem_of(refusal, current.path)}
    page = _page(
        "problem.html", refusal.status, current,
        problem=problem, task_url=task_url, tasks_url=_tasks_url(config, current),
    )  # fmt: skip
    for name in ("Retry-After", "WWW-Authenticate", "Allow"):
        if name in response.headers:
            page.headers[name] = response.headers[name]
    return page


def redirect_to_task(runner: Runner, current: Request, task: AsyncRouteTask) -> Response:
    """Return a redirect (303) to the page of a task. It keeps the ``next`` of the request."""
    path = task_path(runner.config, current.root_path, task.id)
    location = _with_next(path, next_path(current))
    headers = {"Location": location, "Cache-Control": NO_STORE, "Vary": VARY}
    return Response(status=303, headers=headers)


def next_path(current: Request) -> str | None:
    """Return the path of this app in ``?next=``; None if it is missing or not such a path."""
    try:
        given = current.args.get("next", "")
    except UnicodeDecodeError:
        return None
    path = re.split("[?#]", given)[0]
    # Browsers resolve dot segments, encoded ones too, so they could lead out of this app.
    segments = path.lower().replace("%2e", ".").split("/")
    if not _PATH.fullmatch(given) or not {".", ".."}.isdisjoint(segments):
        return None
    return given if f"{path}/".startswith(f"{quote(current.root_path)}/") else None


def check_token(runner: Runner, current: Request, task_id: str, caller: Caller | None) -> None:
    """Raise NotPermitted unless the form contains the token of this task and caller."""
    if (current.content_length or 0) > params.MAX_BODY:
        raise BodyTooLarge(f"The form is too large; send at most {params.MAX_BODY} bytes.")
    signer, expected = _signer(runner), _signed(task_id, caller)
    for token in current.form.getlist(TOKEN):
        try:
            if signer.loads(token, max_age=TOKEN_SECONDS) == expected:
                return
        except BadData:
            continue
    raise NotPermitted(
        "The form has expired. Go back, load the page again, and press the button.",
        task_id=task_id,
    )


def asset(filename: str) -> Response:
    """Return a script or style sheet of the pages."""
    return send_from_directory(ASSETS, filename)


def _task_url(config: Config, current: Request, task_id: str) -> str | None:
    return task_path(config, current.root_path, task_id) if _has_links(config) else None


def _tasks_url(config: Config, current: Request) -> str | None:
    if "query" not in config.operations:
        return None
    return f"{current.root_path}{config.url_prefix}{config.tasks_path}"


def _with_next(url: str, following: str | None) -> str:
    if following is None:
        return url
    return f"{url}{'&' if '?' in url else '?'}next={quote(following)}"


def _tokens(runner: Runner, task: AsyncRouteTask, caller: Caller | None) -> list[tuple[str, str]]:
    """Return the names and values of the form's hidden fields."""
    own = (TOKEN, str(_signer(runner).dumps(_signed(task.id, caller))))
    config = current_app.config
    if "csrf" not in current_app.extensions or not config.get("WTF_CSRF_ENABLED"):
        return [own]
    from flask_wtf.csrf import generate_csrf  # the app uses Flask-WTF

    # Flask-WTF reads the first value, and usually its field has the same name.
    return [(config["WTF_CSRF_FIELD_NAME"], generate_csrf()), own]


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


def _percent(task: AsyncRouteTask) -> int | None:
    return None if task.progress is None else int(task.progress)  # 99.9 is not yet 100


def _utc(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"


def _duration(task: AsyncRouteTask) -> str | None:
    """Return how long the task ran, in words; None if it has not ended or never started."""
    if task.started_us is None or task.completed_us is None:
        return None
    exact = (task.completed_us - task.started_us) / 1_000_000
    if exact < 10:
        return f"{exact:.1f} s"
    minutes, seconds = divmod(int(exact), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _page(template: str, status: int, current: Request, **values: Any) -> Response:
    config = current_runtime().config
    assets = f"{current.root_path}{config.url_prefix}{config.task_path}-pages"
    html = render_template(f"asyncroute/{template}", assets=assets, **values)
    headers = {
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
