"""The states and the steps between them, as CONTRACT draws them."""

from __future__ import annotations

import pytest

from flask_asyncroute.states import TERMINAL, TRANSITIONS, UNFINISHED, State


def test_the_values_are_those_of_the_wire() -> None:
    assert [state.value for state in State] == ["NotStarted", "Running", "Completed", "Failed", "Aborted"]
    assert f"{State.RUNNING}" == "Running"
    assert State("Failed") is State.FAILED
    with pytest.raises(ValueError, match="running"):
        State("running")


def test_three_states_are_terminal() -> None:
    assert {state for state in State if state.is_terminal} == TERMINAL == {State.COMPLETED, State.FAILED, State.ABORTED}
    assert UNFINISHED == {State.NOT_STARTED, State.RUNNING}


def test_the_steps() -> None:
    steps = {(before.value, after.value) for before, afters in TRANSITIONS.items() for after in afters}
    assert steps == {
        ("NotStarted", "Running"),
        ("NotStarted", "Aborted"),
        ("Running", "Completed"),
        ("Running", "Failed"),
        ("Running", "Aborted"),
        ("Running", "NotStarted"),
    }
    assert set(TRANSITIONS) == set(State)


def test_no_step_leaves_a_terminal_state_or_stays() -> None:
    assert all(not TRANSITIONS[state] for state in TERMINAL)
    assert all(state not in TRANSITIONS[state] for state in State)
