"""One app with eleven extensions, and async routes in threads and processes."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentry_sdk
from cachelib import FileSystemCache
from flask import Flask, render_template_string, request, session
from flask_babel import Babel, gettext
from flask_caching import Cache
from flask_compress import Compress
from flask_cors import CORS
from flask_limiter import Limiter
from flask_login import LoginManager, UserMixin, current_user, login_required, login_user
from flask_session import Session
from flask_sqlalchemy import SQLAlchemy
from flask_wtf import CSRFProtect, FlaskForm
from flask_wtf.csrf import generate_csrf
from flask_wtf.file import FileField, FileRequired
from opentelemetry.instrumentation.flask import FlaskInstrumentor
from opentelemetry.propagate import extract
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from wtforms import StringField
from wtforms.validators import DataRequired

from flask_asyncroute import AsyncRoute, current_task
from tests.support.apps.naming import name_process

ORIGIN = "https://front.example"
STARTS = 8
"""The number of tasks of each kind that a user may start per minute."""


class Base(DeclarativeBase): ...


db = SQLAlchemy(model_class=Base)


class User(UserMixin, db.Model):  # type: ignore[name-defined, misc]
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Report(db.Model):  # type: ignore[name-defined, misc]
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    owner: Mapped[str]


class ReportForm(FlaskForm):
    title = StringField(validators=[DataRequired()])
    table = FileField(validators=[FileRequired()])


class FileTransport(Transport):
    """Writes the events for Sentry to a file."""

    path: Path

    def capture_envelope(self, envelope: Envelope) -> None:
        if (event := envelope.get_event()) is not None:
            append(self.path, event)


class FileExporter(SpanExporter):
    """Writes finished spans to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        for span in spans:
            context = span.get_span_context()
            assert context is not None
            append(self.path, {"name": span.name, "trace": format(context.trace_id, "032x")})
        return SpanExportResult.SUCCESS


def append(path: Path, value: Any) -> None:
    """Append a line of JSON. Several processes may do so at the same time."""
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(number, json.dumps(value, default=str).encode() + b"\n")
    finally:
        os.close(number)


def create_app(folder: str) -> Flask:
    """Return the app.

    :param folder: with ``translations``; for the database, sessions, cache and store, and for the
        files of `FileTransport` and `FileExporter`.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    transport = FileTransport()
    transport.path = Path(folder, "sentry")
    sentry_sdk.init(dsn="http://key@127.0.0.1:9/1", transport=transport)
    app = Flask("eleven", instance_path=folder)
    app.config.update(
        SECRET_KEY="not secret",
        SESSION_TYPE="cachelib",
        SESSION_CACHELIB=FileSystemCache(f"{folder}/sessions"),
        SQLALCHEMY_DATABASE_URI="sqlite:///app.db",
        CACHE_TYPE="FileSystemCache",
        CACHE_DIR=f"{folder}/cache",
        COMPRESS_MIN_SIZE=1,
        BABEL_TRANSLATION_DIRECTORIES=f"{folder}/translations",
        ASYNCROUTE_APP=f"{__name__}:create_app({folder!r})",
    )
    # First, so that requests that another extension refuses have a span as well.
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(FileExporter(Path(folder, "spans"))))
    FlaskInstrumentor().instrument_app(app, tracer_provider=provider)
    tracer = provider.get_tracer(__name__)

    db.init_app(app)
    Session(app)
    login_manager = LoginManager(app)
    csrf = CSRFProtect(app)
    limiter = Limiter(
        lambda: current_user.get_id() or "nobody",
        app=app,
        default_limits=["1000/minute"],
        strategy="moving-window",
        storage_uri="memory://",
        headers_enabled=True,
    )
    exposed = ["Location", "Retry-After", "ETag", "Link", "Idempotency-Replayed"]
    CORS(app, origins=[ORIGIN], expose_headers=exposed, supports_credentials=True)
    Compress(app)
    cache = Cache(app)
    Babel(app, locale_selector=lambda: request.accept_languages.best_match(["en", "de"]))

    async_routes = AsyncRoute(app, decorators=[login_required])
    csrf.exempt(async_routes.blueprint)
    limiter.exempt(async_routes.blueprint)
    app.extensions["async_routes"] = async_routes
    name_process(app)

    @login_manager.user_loader
    def load_user(user_id: str) -> User | None:
        return db.session.get(User, int(user_id))

    @app.get("/token")
    def token() -> str:
        return generate_csrf()

    @app.post("/login")
    def login() -> dict[str, str]:
        name = request.form["name"]
        login_user(db.session.scalars(db.select(User).filter_by(name=name)).one())
        session["cart"] = [name]
        return {"csrf_token": generate_csrf()}

    @app.get("/session")
    @login_required
    def show_session() -> dict[str, Any]:
        return {"cart": session["cart"], "draft": session.get("draft")}

    @async_routes.before_task
    def describe_task() -> None:
        sentry_sdk.get_isolation_scope().set_user({"id": current_task.user})

    def traced(view: Any) -> Any:
        @functools.wraps(view)
        def wrapper(**arguments: Any) -> Any:
            with tracer.start_as_current_span(f"task {request.endpoint}", extract(request.headers)):
                return view(**arguments)

        return wrapper

    @cache.memoize()
    def computed_by(kind: str) -> int:
        return os.getpid()

    @traced
    def report() -> Any:
        form = ReportForm()
        if not form.validate_on_submit():
            return {"Errors": form.errors}
        db.session.add(Report(title=form.title.data, owner=current_user.name))
        db.session.commit()
        session["draft"] = form.title.data
        found = db.select(Report.title).filter_by(owner=current_user.name).order_by(Report.id)
        return {
            "Titles": list(db.session.scalars(found)),
            "Bytes": len(form.table.data.read()),
            "User": [current_user.get_id(), current_user.name, current_task.user],
            "Cart": session["cart"],
            "Draft": session["draft"],
            "Word": gettext("Report"),
            "HasToken": 'value="' in render_template_string("{{ form.csrf_token }}", form=form),
            "Cached": computed_by("any"),
            "Pid": os.getpid(),
        }

    @traced
    def long() -> None:
        for number in range(10_000):
            current_task.send_event({"n": number}, event="step")
            current_task.sleep(0.05)
            current_task.check()

    def failing() -> None:
        raise LookupError(gettext("Report"))

    def limited() -> None: ...

    for executor in ("thread", "process"):
        for view in (report, long, failing, limited):
            limit = limiter.limit(f"{STARTS}/minute", override_defaults=True)
            async_routes.route(
                f"/{executor}/{view.__name__}",
                methods=["POST"],
                endpoint=f"{executor}_{view.__name__}",
                executor=executor,
                decorators=[limit, login_required] if view is limited else [login_required],
            )(view)
    return app
