"""How late the event loop is, as its process tells it."""

from __future__ import annotations

import time

import pytest

from orchestrator import event_loop
from tests.support.waiting import eventually

BUSY_S = 0.3


async def test_a_loop_that_is_kept_busy_is_late_by_as_long_and_then_punctual_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(event_loop, "_EVERY_S", 0.01)
    seen: list[float] = []
    event_loop.watch_lag(seen.append)
    await eventually(lambda: len(seen) > 2)
    time.sleep(BUSY_S)  # noqa: ASYNC251  # the loop is to stand still
    before = len(seen)
    await eventually(lambda: len(seen) > before)
    assert seen[before] >= BUSY_S - 0.05
    await eventually(lambda: min(seen[before + 1 :], default=BUSY_S) < BUSY_S / 3)
    assert min(seen) >= 0
