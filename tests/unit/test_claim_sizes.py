from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.database import Claimed
from orchestrator.dispatch.claim_sizes import MOST_AHEAD, ClaimSizes
from orchestrator.settings import Settings
from tests.unit.test_due_queue import claimed

MIB = 1 << 20


def sizes(**environ: str) -> ClaimSizes:
    return ClaimSizes(Settings.from_env(environ))


def events(count: int, start_at: float = 0.0, payload: int = 2) -> list[Claimed]:
    return [msgspec.structs.replace(claimed(start_at), payload="x" * payload)] * count


def test_claims_double_while_they_come_back_full_and_begin_again_after_a_short_one() -> None:
    ours, asked = sizes(), []
    for _ in range(7):
        asked.append(ours.size)
        ours.note(ours.size, events(ours.size), 0, now=1.0)
    assert asked == [100, 200, 400, 800, 1600, 2000, 2000]
    ours.note(ours.size, events(1999), 0, now=1.0)
    assert ours.size == 100


def test_a_batch_size_beyond_the_largest_claim_is_kept() -> None:
    ours = sizes(SCHEDULER_BATCH_SIZE="5000")
    ours.note(5000, events(5000), 0, now=1.0)
    assert ours.size == 5000
    assert ours.room(0, 0) == 5000


def test_far_more_events_may_be_held_while_those_claimed_last_are_not_due() -> None:
    ours = sizes()
    assert ours.room(0, 0) == 1000 - 100
    ours.note(100, events(100, start_at=10.0), 100, now=1.0)
    assert ours.room(100, 200) == MOST_AHEAD - 200


def test_a_herd_fills_the_memory_before_it_is_due_and_drains_before_more_is_claimed() -> None:
    ours, held = sizes(), 0
    while held <= ours.room(held, 0):
        held += ours.size
        ours.note(ours.size, events(ours.size, start_at=10.0), held, now=1.0)
    assert MOST_AHEAD - 2000 < held <= MOST_AHEAD
    ours.note(2000, events(2000, start_at=10.0), held, now=11.0)
    assert ours.most == 4000
    assert ours.room(held, 0) == 2000


def test_few_events_that_are_not_due_do_not_make_a_claim_one_of_a_herd() -> None:
    ours = sizes()
    ours.note(100, events(60, start_at=0.0) + events(40, start_at=10.0), 100, now=1.0)
    assert ours.most == 1000


def test_what_is_due_at_once_is_claimed_beside_a_memory_full_of_what_is_not() -> None:
    ours = sizes()
    ours.note(500, events(500, start_at=10.0), MOST_AHEAD, now=1.0)
    assert ours.room(MOST_AHEAD, 0) < MOST_AHEAD
    assert ours.narrow_size(MOST_AHEAD, 0, now=1.0) == 200
    assert ours.narrow_size(MOST_AHEAD + 1000, 0, now=1.0) == 0


def test_beside_a_herd_that_drains_one_event_is_claimed_for_two_that_have_left() -> None:
    ours = sizes()
    ours.note(100, events(100, start_at=10.0), 20_000, now=1.0)
    assert ours.narrow_size(20_000, 0, now=11.0) == 0
    assert ours.narrow_size(19_900, 0, now=11.0) == 50
    assert ours.narrow_size(10_000, 0, now=11.0) == ours.size
    ours.note_narrow(events(50), 19_950)
    assert ours.narrow_size(19_940, 0, now=11.0) == 5


@pytest.mark.parametrize("start_at", [0.0, 10.0])
def test_a_prefetch_that_is_given_is_never_exceeded(start_at: float) -> None:
    ours, held = sizes(SCHEDULER_BATCH_SIZE="50", SCHEDULER_PREFETCH="400"), 0
    while held <= ours.room(held, 0):
        held += ours.size
        ours.note(ours.size, events(ours.size, start_at=start_at), held, now=1.0)
    while asked := ours.narrow_size(held, 0, now=1.0):
        held += asked
        ours.note_narrow(events(asked), held)
    assert 200 <= held <= 400


@given(
    st.lists(st.tuples(st.integers(1, 4 * MIB), st.booleans(), st.integers(0, 1000)), min_size=1, max_size=40),
    st.sampled_from([1, 100, 10_000]),
)
def test_claims_of_like_payloads_hold_no_more_than_64_mib_and_never_stop(
    steps: list[tuple[int, bool, int]], batch: int
) -> None:
    payload = steps[0][0]
    ours, held = sizes(SCHEDULER_BATCH_SIZE=str(batch)), 0
    ours.note(1, events(1, payload=payload), 0, now=1.0)
    for _, ahead, left in steps:
        held = max(0, held - left)
        if held <= ours.room(held, held * payload):
            asked = ours.size
            held += asked
            ours.note(asked, events(asked, 10.0 if ahead else 0.0, 1) and events(1, 10.0, payload), held, now=1.0)
            assert held * payload <= max(64 * MIB, payload)
    assert ours.room(0, 0) >= 0
    assert ours.size >= 1


def test_a_claim_waits_until_enough_characters_have_left() -> None:
    ours = sizes()
    ours.note(100, events(100, payload=MIB), 60, now=1.0)
    assert ours.size == 16
    room = ours.room(60, 60 * MIB)
    assert 0 <= room < 60
    assert room <= ours.room(room, room * MIB)
    assert room * MIB + 16 * MIB <= 64 * MIB
