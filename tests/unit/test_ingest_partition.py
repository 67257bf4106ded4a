"""Where a partition is read from, and the logs that it must not be read from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.database.ingestion import Move, Position
from orchestrator.ingest.partition import HaltError, Partition, Step, record_hash, take


@dataclass
class Sent:
    offset: int
    value: bytes | None = b"value"
    key: bytes | None = b"key"
    timestamp: int = 1_000_000
    partition: int = 3
    headers: list[Any] = field(default_factory=list)


def partition() -> Partition:
    return Partition("orders", 3)


ANCHOR = Sent(99)
READ_TO_100 = Position(100, 99, record_hash(ANCHOR))


def test_a_partition_that_was_never_read_is_read_from_the_beginning_of_its_log() -> None:
    new = partition()
    assert new.place(None, 7, 20) == 7
    steps: dict[int, Step] = {}
    take(steps, new, [Sent(7), Sent(8)], 9)
    take(steps, new, [Sent(9)], 12)  # two markers follow
    assert steps[3].move() == Move(3, None, 12, 9, record_hash(Sent(9)))


def test_a_batch_expects_what_the_batch_before_it_has_moved_to() -> None:
    placed = partition()
    placed.place(READ_TO_100, 0, 200)
    steps: dict[int, Step] = {}
    take(steps, placed, placed.fresh([ANCHOR, Sent(100)]), 101)
    assert steps[3].move()[:3] == (3, 100, 101)
    steps = {}
    take(steps, placed, [], 103)
    assert steps[3].move() == Move(3, 101, 103, 100, record_hash(Sent(100)))
    assert placed.position() == Position(103, 100, record_hash(Sent(100)))


def test_an_anchor_that_is_read_again_proves_the_log() -> None:
    placed = partition()
    assert placed.place(READ_TO_100, 0, 200) == 99
    assert [record.offset for record in placed.fresh([ANCHOR, Sent(100), Sent(101)])] == [100, 101]
    assert [record.offset for record in placed.fresh([Sent(102)])] == [102]


@pytest.mark.parametrize(
    "other", [Sent(99, value=b"other"), Sent(99, key=None), Sent(99, timestamp=1_000_001), Sent(99, value=None)]
)
def test_another_record_in_the_anchor_s_place_halts_the_partition(other: Sent) -> None:
    placed = partition()
    placed.place(READ_TO_100, 0, 200)
    with pytest.raises(HaltError, match="offset 99 is not the one that was read"):
        placed.fresh([other, Sent(100)])


def test_an_anchor_that_compaction_has_removed_neither_proves_the_log_nor_halts_the_partition() -> None:
    placed = partition()
    placed.place(READ_TO_100, 0, 200)
    assert [record.offset for record in placed.fresh([Sent(104)])] == [104]


def test_an_anchor_that_retention_has_removed_is_not_looked_for() -> None:
    placed = partition()
    assert placed.place(READ_TO_100, 100, 200) == 100
    assert [record.offset for record in placed.fresh([Sent(100)])] == [100]


@pytest.mark.parametrize(
    ("begins", "ends", "why", "may_pass"),
    [(0, 99, "ends at offset 99", True), (0, 0, "ends at offset 0", True), (101, 200, "begins at offset 101", False)],
)
def test_a_log_that_does_not_reach_the_position_halts_the_partition(
    begins: int, ends: int, why: str, may_pass: bool
) -> None:
    placed = partition()
    with pytest.raises(HaltError, match=why) as halt:
        placed.place(READ_TO_100, begins, ends)
    placed.halt(halt.value)
    assert placed.halt_reason is not None
    assert "partition 3 of topic orders is halted at offset 100" in placed.halt_reason
    assert "select orchestrator.set_ingest_offset('orders', 3, <offset>)" in placed.halt_reason
    assert placed.may_pass is may_pass
    assert placed.position() == READ_TO_100


@pytest.mark.parametrize(("begins", "ends"), [(0, 100), (100, 100), (50, 1000)])
def test_a_log_that_reaches_the_position_does_not_halt_the_partition(begins: int, ends: int) -> None:
    partition().place(READ_TO_100, begins, ends)


@given(
    st.tuples(st.binary() | st.none(), st.binary() | st.none(), st.integers(0, 2**40)),
    st.tuples(st.binary() | st.none(), st.binary() | st.none(), st.integers(0, 2**40)),
)
def test_records_that_differ_hash_differently_and_hashes_fit_a_bigint(one: Any, other: Any) -> None:
    hashes = [record_hash(Sent(1, value=value, key=key, timestamp=at)) for value, key, at in (one, other)]
    assert (hashes[0] == hashes[1]) == (one == other)
    assert all(-(2**63) <= each < 2**63 for each in hashes)
