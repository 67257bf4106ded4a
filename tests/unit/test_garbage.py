"""The garbage collector leaves alone what a process has made once it has started."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from orchestrator import garbage
from tests.support.waiting import eventually


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    thresholds = gc.get_threshold()
    gc.unfreeze()  # what another test has frozen
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


def is_looked_at(wanted: object) -> bool:
    return any(each is wanted for each in gc.get_objects())


async def test_what_is_made_until_the_process_has_started_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "_STARTED_S", 0.1)
    garbage.spare_what_stays()
    made: list[list[int]] = [[]]
    assert is_looked_at(made)
    await eventually(lambda: not is_looked_at(made))
    later: list[list[int]] = [[]]
    assert is_looked_at(later)


async def test_a_batch_in_use_is_looked_at_once_in_10_000_objects() -> None:
    garbage.spare_what_stays()

    def looks_at(objects: int) -> int:
        gc.collect()
        before = gc.get_stats()[0]["collections"]
        held = [[n] for n in range(objects)]
        return gc.get_stats()[0]["collections"] - before if held else 0

    assert looks_at(9_000) == 0
    assert looks_at(11_000) == 1
