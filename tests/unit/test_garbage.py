"""The garbage collector leaves alone what a process has made once it has started."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from orchestrator import garbage
from tests.support.waiting import eventually


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


async def test_what_is_made_until_the_process_has_started_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "_STARTED_S", 0.1)
    garbage.spare_what_stays()
    made: list[list[int]] = [[]]
    assert gc.get_freeze_count() == 0
    await eventually(lambda: gc.get_freeze_count() > 0)
    looked_at = gc.get_objects()
    assert not any(each is made for each in looked_at)
    later: list[list[int]] = [[]]
    assert any(each is later for each in gc.get_objects())
