"""The ``ASYNCROUTE_*`` keys: valid and invalid values, and when they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import (
    Access,
    AsyncRoute,
    Callback,
    ConfigurationError,
    Permission,
    config,
    options,
)
from flask_asyncroute.config import KEYS, Config
from flask_asyncroute.retries import Retry
from flask_asyncroute.runtime import runtime_of
from tests.support.labels import label

MakeApp = Callable[..., Flask]

NOT_BOOLEANS: list[Any] = ["False", "True", "", None, 0, 1, 1.0, [], "0"]
NOT_WHOLE: list[Any] = ["5", 0, -1, 1.5, 2.0, True, None, [], math.nan]
NOT_PATHS: list[Any] = [
    None,
    "",
    "/",
    "task",
    "/task/",
    "//task",
    "/a b",
    "/<id>",
    "/é",
    5,
    "/task\n",
    "/a?b",
    "/a#b",
    "/a%20b",
]
NOT_LISTS: list[Any] = [None, "get", 5, {"get"}, {"get": 1}]
NOT_SECONDS: list[Any] = [
    "5",
    "",
    True,
    [],
    math.nan,
    math.inf,
    -1,
    timedelta(seconds=-1),
    101 * 365 * 86400,
]
BAD: dict[str, list[Any]] = {
    "STORE": [
        None, "", 5, "False", "memory", "memory:", "memory://x", "asyncroute.db", "/tmp/asyncroute.db", "sqlite", "sqlite:",
        "sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///x.db?mode=memory", "sqlite:///x.db?timeout=5",
        "sqlite:///x.db?synchronous=SOMETIMES", "sqlite:///x.db?synchronous=FULL&synchronous=OFF",
        "sqlite+aiosqlite:///x.db", "postgresql://localhost/x", "postgresql+psycopg://localhost",
        "postgresql://localhost:port/x", "mysql+pymysql://localhost/x", "redis://localhost", "http://localhost", object(),
        b"memory://", ["memory://"], "sqlite://server/x.db", "sqlite://user:secret@server/x.db", "sqlite:///a\0b",
    ],
    "APP": [
        "", 5, True, ["x"], b"x", "a b", "x:", ":app", "x:app:y", "x.:app", "x/y", "x:app.y", "x:create(", "x:5", "5x",
        "x:app\n",
    ],
    "NAMESPACE": ["", 5, [], True, "x" * 256, b"x"],
    "CREATE_TABLES": NOT_BOOLEANS,
    "RUN_TASKS": NOT_BOOLEANS,
    "PAGES": NOT_BOOLEANS,
    "OPERATIONS": [*NOT_LISTS, [], (), ["get", "get"], ["Get"], ["get", "callback"], [5], [["get"]]],
    "URL_PREFIX": [value for value in NOT_PATHS if value != ""],
    "TASK_PATH": [*NOT_PATHS, "/tasks"],
    "TASKS_PATH": [*NOT_PATHS, "/task"],
    "TASK_ID_IN": [*NOT_LISTS, [], ["path", "path"], ["body"], ["Path"], [None]],
    "TASK_ID_NAME": [None, "", 5, "a b", "a:b", "x" * 65, "é", "Id\n", "a,b", b"Id"],
    "ACCEPTED_STATUS": [None, "202", "200", 201, 303, 200.0, 202.0, True, [202]],
    "MAX_BODY": NOT_WHOLE,
    "MAX_RESULT": NOT_WHOLE,
    "EXPOSE_ERRORS": NOT_BOOLEANS,
    "SNAPSHOT_DROP": [None, "Cookie", 5, [5], [""], {"a"}, ["x" * 256]],
    "USER_ID_FIELD": [None, "", 5, "x" * 256, ["id"]],
    "ADMINS": ["admin", ["admin"], Permission(), {"Roles": ["admin"]}, True, Access],
    "LIST_ANONYMOUS": [value for value in NOT_BOOLEANS if value is not None],
    "TRUSTED_ORIGINS": [
        None, "https://a.example", 5, ["a.example"], ["https://a.example/"], ["https://a.example/x"], ["*"], ["null"],
        ["ftp://a.example"], ["https://"], ["https://a b"], [""], [5], ["https://a.example?x"], ["https://a.example\n"],
    ],
    "DRAIN": NOT_SECONDS,
    "MAX_WAIT": [*NOT_SECONDS, None],
    "MAX_STREAMS": [None, -1, 1.5, "2", True],
    "STREAM_AGE": [*NOT_SECONDS, None, 0, 0.9],
    "HOUSEKEEPING_INTERVAL": [*NOT_SECONDS, None, 0, 0.09],
    "TIMEOUT": [*NOT_SECONDS[:-3], -2, 0],
    "START_TIMEOUT": [*NOT_SECONDS, -1, 0],
    "CANCELLABLE": NOT_BOOLEANS,
    "EXECUTOR": [None, "Thread", "", 5, True],
    "MIN_WORKERS": ["1", 1.5, True, -1],
    "MAX_WORKERS": NOT_WHOLE,
    "MAX_TASKS_PER_USER": [value for value in NOT_WHOLE if value is not None],
    "QUEUE_SIZE": [value for value in NOT_WHOLE if value != 0 or isinstance(value, bool)],
    "INTERRUPT_AFTER": NOT_SECONDS,
    "ID_GENERATOR": [None, "uuid4", 5, str],
    "PERMISSION": [Access(), "anna", 5, True],
    "CALLBACK": ["http://example.com", True, {}, Callback],
    "CALLBACK_ATTEMPTS": NOT_WHOLE,
    "CALLBACK_SECRET": [
        "", "secret", "whsec_", "whsec_secret", "!" * 40, 5, True, b"MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", [5], ["secret"], "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLa==",
        ["MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "secret"], "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw secret", "whsec_whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "é" * 40,
    ],
    "CALLBACK_ALLOWED_HOSTS": [
        None, "localhost", 5, [5], [""], ["*"], ["*.example.com"], ["http://a.example"], ["a.example:80"], ["10.0.0.1/8"], ["10.0.0.0/33"], ["127.1"], [b"x"],
        ["a.example", None], {"a.example"}, ["a b"], ["0177.0.0.1"],
    ],
    "SSE": ["False", "True", None, 0, 1, {}],
    "RESPONSE_TYPES": ["application/json", [], None, ["text/html"], ["application/json", "application/json"]],
    "RETENTION": [*NOT_SECONDS, None],
    "CELERY": [5, [], object()],
    "RETRY": [None, True, -1, "3"],
    "UNIQUE": ["key", 1],
    "VALIDATE": ["check", 1],
    "RESPOND": ["answer", 1],
    "ON_LOSS": [None, "", "Abort", True],
}  # fmt: skip

GOOD: dict[str, list[Any]] = {
    "STORE": [
        "memory://", "sqlite:///asyncroute.db", "sqlite:////var/lib/asyncroute.db", "sqlite+pysqlite:///x.db",
        "sqlite:///x.db?synchronous=FULL", "sqlite:///x.db?synchronous=off", "sqlite:///a/b c/é.db",
    ],
    "APP": [None, "x", "x.y", "x:app", "x.y:create_app()", "x:create_app('a', b=5)", "été:app"],
    "NAMESPACE": ["x", "x" * 255, None],
    "CREATE_TABLES": [True, False],
    "RUN_TASKS": [True, False],
    "PAGES": [True, False],
    "OPERATIONS": [["get"], ("query", "stop"), ["get", "stop", "query"], ["events"]],
    "URL_PREFIX": ["", "/api", "/api/v1", "/a.b-c_d~e"],
    "TASK_PATH": ["/job", "/api/task"],
    "TASKS_PATH": ["/jobs", "/api/tasks"],
    "TASK_ID_IN": [["path"], ["query", "header", "cookie"], ("path", "query", "header", "cookie")],
    "TASK_ID_NAME": ["Id", "X-Task-Id", "x" * 64],
    "ACCEPTED_STATUS": [200, 202],
    "MAX_BODY": [1, 10**12],
    "MAX_RESULT": [1, 10**12],
    "EXPOSE_ERRORS": [True, False],
    "SNAPSHOT_DROP": [[], ["Authorization", "session"], ()],
    "USER_ID_FIELD": ["id", "sub"],
    "ADMINS": [Access(roles=("admin",)), None],
    "LIST_ANONYMOUS": [True, False, None],
    "TRUSTED_ORIGINS": [[], ["https://a.example", "http://localhost:8000"]],
    "DRAIN": [0, 2.5, timedelta(seconds=3)],
    "MAX_WAIT": [0, 2.5, timedelta(seconds=30)],
    "MAX_STREAMS": [0, 2, 1000],
    "STREAM_AGE": [1, 300, timedelta(minutes=5)],
    "HOUSEKEEPING_INTERVAL": [0.1, 30, timedelta(minutes=1)],
    "TIMEOUT": [5, None, -1, timedelta(hours=1)],
    "START_TIMEOUT": [None, 0.5, 30, timedelta(minutes=5)],
    "CANCELLABLE": [True, False],
    "EXECUTOR": ["thread", "immediate", "process"],
    "MIN_WORKERS": [0, 2, None],
    "MAX_WORKERS": [1, 100],
    "MAX_TASKS_PER_USER": [None, 1, 100],
    "QUEUE_SIZE": [0, 100],
    "INTERRUPT_AFTER": [None, 0, 2.5, timedelta(seconds=1)],
    "ID_GENERATOR": [lambda: "x"],
    "PERMISSION": [None, Permission(), lambda: Permission()],
    "CALLBACK": [None, Callback()],
    "CALLBACK_ATTEMPTS": [1, 4, 100],
    "CALLBACK_SECRET": [None, [], "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",) * 2, "A" * 43, "A" * 43 + "="],
    "CALLBACK_ALLOWED_HOSTS": [[], ["localhost", "10.0.0.0/8", "10.1.2.3", "fd00::/8", "::1", "Bücher.Example."], ()],
    "SSE": [True, False],
    "RESPONSE_TYPES": [["application/xml"], ("application/json", "application/yaml")],
    "RETENTION": [0, 5.5, timedelta(days=7)],
    "CELERY": [None, "package.module:celery"],
    "RETRY": [0, 3, Retry(times=2)],
    "UNIQUE": [None, False, True, lambda: "key"],
    "VALIDATE": [None, print],
    "RESPOND": [None, print],
    "ON_LOSS": ["abort", "restart"],
}  # fmt: skip


def read(app: Flask, name: str, value: Any) -> Config:
    app.config[f"ASYNCROUTE_{name}"] = value
    return config.read(app)


def test_every_key_is_tested_here() -> None:
    assert set(BAD) == set(GOOD) == set(KEYS)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BAD.items() for value in values],
    ids=label,
)
def test_a_bad_value_is_refused_by_name(make_app: MakeApp, name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"ASYNCROUTE_{name}\b") as refused:
        read(make_app(), name, value)
    assert len(str(refused.value)) < 400
    assert "secret" not in str(refused.value), "messages must not contain passwords"


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in GOOD.items() for value in values],
    ids=label,
)
def test_a_good_value_is_accepted(make_app: MakeApp, name: str, value: Any) -> None:
    read(make_app(), name, value)


@pytest.mark.parametrize("name", [name for name in KEYS if name not in options.DEFAULTED])
def test_init_app_checks_each_key(make_app: MakeApp, name: str) -> None:
    app = make_app(**{f"ASYNCROUTE_{name}": object()})
    async_routes = AsyncRoute()
    with pytest.raises(ConfigurationError, match=f"ASYNCROUTE_{name}"):
        async_routes.init_app(app)
    del app.config[f"ASYNCROUTE_{name}"]
    async_routes.init_app(app)


def test_defaults(make_app: MakeApp) -> None:
    found = config.read(make_app("shop", TESTING=False))
    assert found.store == "sqlite:///asyncroute.db"
    assert found.namespace == "shop"
    assert found.create_tables is True
    assert (found.url_prefix, found.task_path, found.tasks_path) == ("", "/task", "/tasks")
    assert (found.task_id_in, found.task_id_name) == (("path", "query"), "Id")
    assert found.accepted_status == 202
    assert (found.max_body, found.max_result) == (64 * 1024 * 1024, 1024 * 1024)
    assert found.expose_errors is True
    assert found.snapshot_drop == frozenset()
    assert found.user_id_field == "id"
    assert found.admins == Access()
    assert found.trusted_origins == ()
    assert found.housekeeping_interval == 30.0
    assert set(found.defaults) == set(options.DEFAULTED)


@pytest.mark.parametrize(
    ("mode", "listed"),
    [
        ({}, False),
        ({"TESTING": True}, True),
        ({"DEBUG": True}, True),
        ({"DEBUG": True, "TESTING": True}, True),
    ],
)
def test_anonymous_tasks_are_listed_in_debug_and_testing(
    make_app: MakeApp, mode: dict[str, bool], listed: bool
) -> None:
    app = make_app(**{"TESTING": False, **mode})
    assert config.read(app).list_anonymous is listed
    assert read(app, "LIST_ANONYMOUS", not listed).list_anonymous is not listed


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("ASYNCROUTE_TIME_OUT", "ASYNCROUTE_TIMEOUT"),
        ("ASYNCROUTE_EXECUTER", "ASYNCROUTE_EXECUTOR"),
        ("ASYNCROUTE_store", ""),
        ("ASYNCROUTE_", ""),
        ("ASYNCROUTE_NOTHING_LIKE_IT_AT_ALL", "Remove"),
        ("ASYNCROUTE_POOL", ""),
        ("ASYNCROUTE_ARGUMENTS", ""),
    ],
)
def test_an_unknown_key_is_refused_by_name(make_app: MakeApp, key: str, hint: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{key} is not .*{hint}"):
        config.read(make_app(**{key: 5}))


def test_keys_without_the_prefix_are_ignored(make_app: MakeApp) -> None:
    config.read(make_app(SOMETHING_ELSE=object(), asyncroute_store=5, MY_ASYNCROUTE_STORE=5))


def test_the_two_paths_must_differ(make_app: MakeApp) -> None:
    with pytest.raises(ConfigurationError, match="ASYNCROUTE_TASK_PATH and ASYNCROUTE_TASKS_PATH"):
        config.read(make_app(ASYNCROUTE_TASK_PATH="/x", ASYNCROUTE_TASKS_PATH="/x"))


def test_a_store_in_memory_needs_a_process_that_runs_tasks(make_app: MakeApp) -> None:
    app = make_app(ASYNCROUTE_RUN_TASKS=False, ASYNCROUTE_STORE="memory://")
    with pytest.raises(ConfigurationError, match="ASYNCROUTE_RUN_TASKS is False"):
        AsyncRoute(app)


def test_values_are_normalised(make_app: MakeApp) -> None:
    app = make_app(
        ASYNCROUTE_OPERATIONS=["get", "query"],
        ASYNCROUTE_SNAPSHOT_DROP=["X-Secret", "Session"],
        ASYNCROUTE_TRUSTED_ORIGINS=["https://App.Example:8443"],
        ASYNCROUTE_HOUSEKEEPING_INTERVAL=timedelta(seconds=5),
        ASYNCROUTE_TASK_ID_IN=["header"],
    )
    found = config.read(app)
    assert found.operations == ("get", "query")
    assert found.snapshot_drop == {"x-secret", "session"}
    assert found.trusted_origins == ("https://app.example:8443",)
    assert found.housekeeping_interval == 5.0
    assert found.task_id_in == ("header",)


def test_a_long_app_name_is_cut_to_a_valid_namespace(make_app: MakeApp) -> None:
    assert config.read(make_app("x" * 300)).namespace == "x" * 255


def test_values_can_come_from_prefixed_environment_variables(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "MAX_BODY": 1000,
        "CANCELLABLE": False,
        "TIMEOUT": 2.5,
        "OPERATIONS": ["get"],
        "STORE": "memory://",
    }
    for name, value in values.items():
        monkeypatch.setenv(
            f"FLASK_ASYNCROUTE_{name}", value if isinstance(value, str) else json.dumps(value)
        )
    app = make_app()
    app.config.from_prefixed_env()
    found = config.read(app)
    assert (found.max_body, found.operations, found.store) == (1000, ("get",), "memory://")
    assert (found.defaults["cancellable"], found.defaults["timeout"]) == (False, 2_500_000)


@pytest.mark.parametrize(
    "name", ["CREATE_TABLES", "EXPOSE_ERRORS", "LIST_ANONYMOUS", "CANCELLABLE", "SSE"]
)
def test_capitalised_false_in_the_environment_is_an_error(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """``from_prefixed_env`` parses JSON, so "False" stays a string, which would count as true."""
    monkeypatch.setenv(f"FLASK_ASYNCROUTE_{name}", "False")
    app = make_app()
    app.config.from_prefixed_env()
    with pytest.raises(
        ConfigurationError, match=f"ASYNCROUTE_{name} must be True.* False.*'False'"
    ):
        AsyncRoute(app)


def test_start_rereads_and_freezes_the_configuration(make_app: MakeApp) -> None:
    app = make_app(ASYNCROUTE_MAX_BODY=1)
    async_routes = AsyncRoute(app)
    app.config["ASYNCROUTE_MAX_BODY"] = 2
    assert runtime_of(app).config.max_body == 1
    async_routes.start(app)
    assert runtime_of(app).config.max_body == 2
    app.config["ASYNCROUTE_MAX_BODY"] = "nonsense"
    async_routes.start(app)
    assert runtime_of(app).config.max_body == 2


def test_a_configuration_error_at_first_use_is_raised_until_it_is_fixed(make_app: MakeApp) -> None:
    app = make_app()
    async_routes = AsyncRoute(app)
    app.config["ASYNCROUTE_MAX_BODY"] = "1"
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="ASYNCROUTE_MAX_BODY"):
            async_routes.start(app)
        with app.app_context(), pytest.raises(ConfigurationError, match="ASYNCROUTE_MAX_BODY"):
            async_routes.get("x")
    app.config["ASYNCROUTE_MAX_BODY"] = 1
    async_routes.start(app)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PAGES", False),
        ("OPERATIONS", ["get"]),
        ("URL_PREFIX", "/x"),
        ("TASK_PATH", "/x"),
        ("TASKS_PATH", "/x"),
        ("TASK_ID_IN", ["query"]),
    ],
)
def test_keys_that_define_url_rules_cannot_change_after_init_app(
    make_app: MakeApp, name: str, value: Any
) -> None:
    app = make_app()
    async_routes = AsyncRoute(app)
    app.config[f"ASYNCROUTE_{name}"] = value
    with pytest.raises(ConfigurationError, match=rf"_{name}\b.*init_app"):
        async_routes.start(app)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://ann:s3cret@host:port/db", "postgresql+psycopg://ann:s3cret@host",
        "postgresql:/ann:s3cret@host/db", "mysql+pymysql://ann:s3cret@host/db",
        "sqlite://ann:s3cret@host/x.db",
    ],
)  # fmt: skip
def test_a_password_in_a_url_is_not_shown(make_app: Callable[..., Flask], url: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        config.read(make_app(ASYNCROUTE_STORE=url))
    assert "ASYNCROUTE_STORE" in str(refused.value)
    assert "s3cret" not in str(refused.value)
