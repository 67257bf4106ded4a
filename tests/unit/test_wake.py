from __future__ import annotations

import asyncio
import time

from orchestrator.dispatch.clock import DatabaseClock
from orchestrator.dispatch.wake import Wake


def wake(lookahead_s: float = 2.5) -> Wake:
    """One whose database's clock reads as this machine's monotonic one; it has just claimed."""
    clock = DatabaseClock()
    now_s = time.monotonic()
    clock.sample(now_s, now_s, now_s)
    made = Wake(clock, lookahead_s)
    made.note_claim(now_s)
    return made


async def woken_after_s(made: Wake, rest_s: float = 5.0) -> float:
    began_s = time.monotonic()
    assert await made.wait(rest_s)
    return time.monotonic() - began_s


async def test_a_rest_ends_without_being_woken() -> None:
    began_s = time.monotonic()
    assert not await wake().wait(0.05)
    assert time.monotonic() - began_s >= 0.05


async def test_an_event_expected_within_the_look_ahead_shares_a_claim_soon() -> None:
    made = wake()
    made.expect(time.monotonic() + 2.0)
    assert 0.2 <= await woken_after_s(made) < 1.0


async def test_an_event_expected_beyond_it_wakes_when_the_look_ahead_reaches_it() -> None:
    made = wake(lookahead_s=1.0)
    made.expect(time.monotonic() + 1.5)
    assert 0.45 <= await woken_after_s(made) < 1.2


async def test_an_event_due_sooner_wakes_at_once() -> None:
    made = wake()
    made.expect(time.monotonic() + 0.1)
    assert await woken_after_s(made) < 0.2


async def test_without_look_ahead_an_event_wakes_when_it_is_due() -> None:
    made = wake(lookahead_s=0.0)
    made.expect(time.monotonic() + 0.3)
    assert 0.29 <= await woken_after_s(made) < 1.0


async def test_it_is_woken_while_it_waits_and_a_claim_makes_it_forget() -> None:
    made = wake()
    waiting = asyncio.create_task(made.wait(5.0))
    await asyncio.sleep(0)
    made.soon()
    assert await asyncio.wait_for(waiting, 1)
    made.at_once()
    made.reset()
    assert not await made.wait(0.02)
