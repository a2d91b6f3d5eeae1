"""Event ids: valid ids can be opened, other text cannot, and an id reveals nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute.http.sse_format import EventIds

KEY = b"k" * 32
IDS = EventIds(KEY)
CHANGES = st.integers(0, 2**63 - 1)
NAMES = st.text("abcXYZ019._~-", min_size=1, max_size=128)


@given(CHANGES, NAMES)
def test_a_sealed_id_can_be_opened(change: int, task_id: str) -> None:
    sealed = IDS.seal(change, task_id)
    assert (IDS.open(sealed), IDS.open(sealed, task_id)) == (change, change)
    assert sealed == IDS.seal(change, task_id), "an event always has the same id"
    assert sealed.isascii() and "\n" not in sealed and len(sealed) == 32


@given(CHANGES, NAMES, NAMES)
def test_an_id_is_valid_for_one_task(change: int, task_id: str, other: str) -> None:
    opened = IDS.open(IDS.seal(change, task_id), other)
    assert opened == (change if task_id == other else None)


@given(CHANGES, st.integers(0, 31), st.sampled_from("ABab01_-"))
def test_an_altered_id_is_invalid(change: int, index: int, character: str) -> None:
    sealed = IDS.seal(change, "task")
    altered = sealed[:index] + character + sealed[index + 1 :]
    assert IDS.open(altered) == (change if altered == sealed else None)


@given(st.text(max_size=40))
def test_any_other_text_is_invalid(text: str) -> None:
    assert IDS.open(text) is None


@given(CHANGES)
def test_an_id_of_another_key_is_invalid(change: int) -> None:
    assert EventIds(b"o" * 32).open(IDS.seal(change, "task")) is None


def test_consecutive_ids_look_unrelated() -> None:
    """Two ids do not reveal how many changes lie between them."""
    ids = [IDS.seal(number, "task") for number in range(200)]
    assert len({sealed[:4] for sealed in ids}) > 190 and len({sealed[-8:] for sealed in ids}) == 200
