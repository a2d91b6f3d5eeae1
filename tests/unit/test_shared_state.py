"""The shared state, a mapping for the requests and tasks of all processes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest
from flask import Flask
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute import AsyncRoute, AsyncRouteError
from flask_asyncroute.errors import StateValueError
from flask_asyncroute.shared_state import MAX_KEY, MAX_VALUE, SharedState
from flask_asyncroute.stores.base import TaskStore
from flask_asyncroute.stores.memory import MemoryTaskStore


def not_json(value: Any) -> Any:
    raise TypeError(f"{type(value).__name__} is no JSON")


@pytest.fixture
def state(store: TaskStore) -> SharedState:
    return SharedState(lambda: store, lambda: not_json)


@pytest.fixture(scope="module")
def in_memory() -> SharedState:
    store = MemoryTaskStore()
    return SharedState(lambda: store, lambda: not_json)


def test_mapping_operations(state: SharedState) -> None:
    assert isinstance(state, MutableMapping)
    assert len(state) == 0 and list(state) == [] and "a" not in state
    state["a"] = {"n": [1, 2.5, None, True, "é \U0001f600"]}
    state["b"] = None
    assert state["a"] == {"n": [1, 2.5, None, True, "é \U0001f600"]}
    assert state["b"] is None and "b" in state
    assert (list(state), len(state)) == (["a", "b"], 2)
    state["a"] = 1
    assert dict(state) == {"a": 1, "b": None}
    del state["b"]
    assert "b" not in state
    assert state.get("b", "default") == "default"


def test_mutable_mapping_mixin_methods(state: SharedState) -> None:
    state.update({"a": 1, "b": 2}, c=3)
    assert state.setdefault("a", 9) == 1
    assert state.setdefault("d", 4) == 4
    assert state.pop("a") == 1
    assert state.pop("a", None) is None
    assert sorted(state.items()) == [("b", 2), ("c", 3), ("d", 4)]
    key, value = state.popitem()
    assert {key: value}.items() <= {"b": 2, "c": 3, "d": 4}.items()
    state.clear()
    assert len(state) == 0


def test_a_missing_key_raises_key_error(state: SharedState) -> None:
    with pytest.raises(KeyError, match="nothing"):
        state["nothing"]
    with pytest.raises(KeyError, match="nothing"):
        del state["nothing"]
    with pytest.raises(KeyError):
        state.pop("nothing")


def test_reads_return_copies(state: SharedState) -> None:
    given_value = [1]
    state["a"] = given_value
    given_value.append(2)
    state["a"].append(3)
    assert state["a"] == [1]


@pytest.mark.parametrize(
    "key", ["", "x" * (MAX_KEY + 1), 5, None, b"a", ("a",), "a\x00b", "\ud800", True]
)
def test_an_invalid_key_is_refused(state: SharedState, key: Any) -> None:
    uses: list[Callable[[], object]] = [
        lambda: state[key],
        lambda: state.__setitem__(key, 1),
        lambda: state.__delitem__(key),
        lambda: state.apply(key, lambda value: value),
    ]
    for use in uses:
        with pytest.raises(StateValueError) as refused:
            use()
        assert isinstance(refused.value, ValueError) and isinstance(refused.value, AsyncRouteError)
        assert len(str(refused.value)) < 300
    if not isinstance(key, str):
        assert key not in state


@pytest.mark.parametrize(
    "key", ["a", "x" * MAX_KEY, "\U0001f600" * MAX_KEY, "a b/c.d", "é", "e\u0301"]
)
def test_a_valid_key_is_accepted(state: SharedState, key: str) -> None:
    state[key] = key
    assert state[key] == key
    assert list(state) == [key]
    assert key in state


@pytest.mark.parametrize(
    "value",
    [{1, 2}, b"x", object(), lambda: 1, iter([1]), Exception("x"), [{"a": {1}}]],
    ids=lambda value: type(value).__name__,
)
def test_a_value_that_is_not_json_is_refused(state: SharedState, value: Any) -> None:
    state["k"] = "before"
    with pytest.raises(StateValueError, match=r"state\['k'\]"):
        state["k"] = value
    with pytest.raises(StateValueError, match=r"state\['k'\]"):
        state.apply("k", lambda _: value)
    assert state["k"] == "before"


def test_a_cycle_is_refused(state: SharedState) -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(StateValueError, match="contains itself"):
        state["k"] = cycle


def test_a_value_over_one_mebibyte_is_refused(state: SharedState) -> None:
    state["k"] = "x" * (MAX_VALUE - 2)
    assert len(state["k"]) == MAX_VALUE - 2
    with pytest.raises(StateValueError, match=r"1,048,576|1 MiB"):
        state["k"] = "x" * (MAX_VALUE - 1)
    assert len(state["k"]) == MAX_VALUE - 2


def test_errors_do_not_mention_results_of_views(state: SharedState) -> None:
    """``ASYNCROUTE_MAX_RESULT`` does not apply to the state."""
    for value in ({1}, "x" * (MAX_VALUE + 1)):
        with pytest.raises(StateValueError) as refused:
            state["k"] = value
        assert "ASYNCROUTE_MAX_RESULT" not in str(refused.value)
        assert "The view returned" not in str(refused.value)


@pytest.mark.covers("A46")
def test_nan_and_infinity_become_null(state: SharedState) -> None:
    state["k"] = [float("nan"), float("inf"), 1.5]
    assert state["k"] == [None, None, 1.5]


def test_types_that_results_may_have_are_accepted(state: SharedState) -> None:
    @dataclasses.dataclass
    class Point:
        x: int

    state["k"] = {
        "at": datetime(2026, 1, 2, 3, 4, 5),
        "price": Decimal("1.50"),
        "point": Point(1),
        "pair": (1, 2),
    }
    assert state["k"] == {
        "at": "2026-01-02T03:04:05Z",
        "price": "1.50",
        "point": {"x": 1},
        "pair": [1, 2],
    }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(json_values)
def test_every_json_value_round_trips(in_memory: SharedState, value: Any) -> None:
    in_memory["k"] = value
    assert in_memory["k"] == json.loads(json.dumps(value))


def test_apply_stores_and_returns_the_result_of_the_function(state: SharedState) -> None:
    assert state.apply("n", lambda n: n + 1, default=0) == 1
    assert state.apply("n", lambda n: n + 1, default=0) == 2
    assert state["n"] == 2
    assert state.apply("list", lambda old: [*(old or []), "x"]) == ["x"]
    assert state.apply("t", lambda _: (1, 2)) == [1, 2], "the return value is the stored value"


def test_apply_that_raises_changes_nothing(state: SharedState) -> None:
    state["n"] = 1

    def fail(value: int) -> int:
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        state.apply("n", fail)
    assert state["n"] == 1


def test_concurrent_applies_lose_no_update(state: SharedState) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: state.apply("n", lambda n: n + 1, default=0), range(100)))
    assert state["n"] == 100


def test_apply_is_retried_after_a_concurrent_write(state: SharedState) -> None:
    state["n"] = 1
    seen: list[int] = []

    def increment(n: int) -> int:
        seen.append(n)
        if len(seen) == 1:
            state["n"] = 10
        elif len(seen) == 2:
            del state["n"]
            state["n"] = 10
        return n + 1

    assert state.apply("n", increment) == 11
    assert seen == [1, 10, 10]


def test_apply_is_retried_after_a_concurrent_delete(state: SharedState) -> None:
    state["n"] = 5
    seen: list[Any] = []

    def increment(n: Any) -> int:
        seen.append(n)
        if len(seen) == 1:
            del state["n"]
        return 1

    state.apply("n", increment, default="none")
    assert seen == [5, "none"]


def test_keys_may_be_deleted_during_iteration(state: SharedState) -> None:
    state.update({"a": 1, "b": 2, "c": 3})
    for key in state:
        del state[key]
    assert len(state) == 0


def test_an_app_context_is_required(make_app: Callable[..., Flask]) -> None:
    async_routes = AsyncRoute(make_app(ASYNCROUTE_STORE="memory://"))
    for use in (
        lambda: async_routes.state["a"],
        lambda: list(async_routes.state),
        lambda: len(async_routes.state),
    ):
        with pytest.raises(RuntimeError, match="application context"):
            use()


@pytest.mark.parametrize("url", ["memory://", "sqlite:///asyncroute.db"])
def test_each_app_of_an_extension_has_its_own_state(
    make_app: Callable[..., Flask], url: str
) -> None:
    async_routes = AsyncRoute()
    apps = [make_app(name, ASYNCROUTE_STORE=url) for name in ("one", "two")]
    for app in apps:
        async_routes.init_app(app)
        with app.app_context():
            assert dict(async_routes.state) == {}
            async_routes.state["name"] = app.name
    for app in apps:
        with app.app_context():
            assert dict(async_routes.state) == {"name": app.name}


@pytest.mark.usefixtures("separate_processes")
def test_processes_with_the_same_namespace_share_the_state(
    make_app: Callable[..., Flask], tmp_path: Any
) -> None:
    """Two app objects with the same name and file stand for two worker processes."""
    names = ["shop", "shop", "other"]
    apps = [make_app(name, instance_path=tmp_path / "instance") for name in names]
    all_routes = [AsyncRoute(app) for app in apps]
    with apps[0].app_context():
        all_routes[0].state["n"] = 1
    with apps[1].app_context():
        assert all_routes[1].state.apply("n", lambda n: n + 1) == 2
    with apps[0].app_context():
        assert all_routes[0].state["n"] == 2
    with apps[2].app_context():
        assert "n" not in all_routes[2].state


def test_the_json_provider_of_the_app_encodes_other_types(make_app: Callable[..., Flask]) -> None:
    class Money:
        pass

    app = make_app(ASYNCROUTE_STORE="memory://")
    app.json.default = lambda value: "money" if isinstance(value, Money) else not_json(value)  # type: ignore[attr-defined]
    async_routes = AsyncRoute(app)
    with app.app_context():
        async_routes.state["k"] = Money()
        assert async_routes.state["k"] == "money"
