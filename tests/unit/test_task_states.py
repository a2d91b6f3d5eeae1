"""The task states and the transitions between them."""

from __future__ import annotations

import pytest

from flask_asyncroute.task import TERMINAL, TRANSITIONS, UNFINISHED, State


def test_state_values() -> None:
    assert [state.value for state in State] == [
        "NotStarted",
        "Running",
        "Completed",
        "Failed",
        "Aborted",
    ]
    assert f"{State.RUNNING}" == "Running"
    assert State("Failed") is State.FAILED
    with pytest.raises(ValueError, match="running"):
        State("running")


def test_three_states_are_terminal() -> None:
    assert (
        {state for state in State if state.is_terminal}
        == TERMINAL
        == {State.COMPLETED, State.FAILED, State.ABORTED}
    )
    assert UNFINISHED == {State.NOT_STARTED, State.RUNNING}


def test_transitions() -> None:
    transitions = {
        (before.value, after.value) for before, afters in TRANSITIONS.items() for after in afters
    }
    assert transitions == {
        ("NotStarted", "Running"),
        ("NotStarted", "Aborted"),
        ("Running", "Completed"),
        ("Running", "Failed"),
        ("Running", "Aborted"),
        ("Running", "NotStarted"),
    }
    assert set(TRANSITIONS) == set(State)


def test_no_transition_leaves_a_terminal_state_or_keeps_the_state() -> None:
    assert all(not TRANSITIONS[state] for state in TERMINAL)
    assert all(state not in TRANSITIONS[state] for state in State)
