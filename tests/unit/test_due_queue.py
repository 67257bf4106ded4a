from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.database import Claimed
from orchestrator.dispatch.due_queue import DueQueue
from tests.support.waiting import eventually


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


def claimed(due_at: float, event_id: str = "") -> Claimed:
    scheduled_at = "2030-01-01 00:00:00+00"
    return Claimed(due_at, event_id, 1, due_at, due_at + 60, scheduled_at, "HTTP", "http://a/", None, None, "{}")


async def ended(tasks: Sequence[asyncio.Task[Claimed | None]], count: int) -> list[Claimed | None]:
    """Waits until exactly so many of the tasks have ended."""
    await eventually(lambda: sum(task.done() for task in tasks) == count)
    return [task.result() for task in tasks if task.done()]


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 7), st.lists(st.integers(0, 60), max_size=10))
def test_everything_is_handed_out_once_in_order_of_due_time_and_never_early(
    due_times: list[int], takers: int, moments: list[int]
) -> None:
    async def scenario() -> None:
        clock = Clock()
        queue = DueQueue(clock)
        taken: list[tuple[float, float]] = []

        async def take() -> None:
            while (event := await queue.get()) is not None:
                taken.append((event.due_at, clock.s))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(takers):
                tasks.create_task(take())
            half = len(due_times) // 2
            queue.put([claimed(due) for due in due_times[:half]])
            for moment in sorted(moments):
                clock.s = float(moment)
                queue.put([])
                for _ in range(2 * len(due_times) + 2):
                    await asyncio.sleep(0)
                assert len(taken) == sum(due <= moment for due in due_times[:half])
            assert [due for due, _ in taken] == sorted(due for due, _ in taken)
            before = len(taken)
            queue.put([claimed(due) for due in due_times[half:]])
            clock.s = 100.0
            queue.put([])
            await eventually(lambda: len(taken) == len(due_times), pause_s=0)
            assert [due for due, _ in taken[before:]] == sorted(due for due, _ in taken[before:])
            assert queue.close() == []
        assert sorted(due for due, _ in taken) == sorted(due_times)
        assert all(due <= at for due, at in taken)

    asyncio.run(scenario())


async def test_a_waiting_taker_is_woken_when_the_event_is_due_and_not_before() -> None:
    queue = DueQueue(time.monotonic)
    due_at = time.monotonic() + 0.05
    queue.put([claimed(due_at)])
    event = await queue.get()
    assert event is not None
    assert due_at <= time.monotonic() < due_at + 1


async def test_an_event_due_sooner_overtakes_those_that_wait() -> None:
    clock = Clock()
    queue = DueQueue(clock)
    queue.put([claimed(10, "later")])
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.put([claimed(0, "now")])
    event = await waiting
    assert event is not None
    assert event.event_id == "now"
    assert len(queue) == 1


async def test_events_of_one_instant_keep_their_order() -> None:
    queue = DueQueue(Clock())
    queue.put([claimed(0, str(n)) for n in range(100)])
    taken = [await queue.get() for _ in range(100)]
    assert [event.event_id for event in taken if event] == [str(n) for n in range(100)]


async def test_a_clock_that_was_set_forward_is_followed_when_events_are_put_in() -> None:
    clock = Clock()
    queue = DueQueue(clock)
    queue.put([claimed(3600)])
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    clock.s = 3600.0
    queue.put([])
    assert await asyncio.wait_for(waiting, 5) is not None


async def test_a_clock_that_was_set_back_holds_events_back() -> None:
    clock = Clock()
    queue = DueQueue(clock)
    clock.s = 10.0
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    clock.s = 9.97
    queue.put([claimed(10)])
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 0.1)  # the alarm has rung meanwhile
    clock.s = 10.0
    assert await asyncio.wait_for(waiting, 5) is not None


async def test_a_wake_up_is_passed_on_when_its_taker_is_cancelled_at_that_moment() -> None:
    clock = Clock()
    queue = DueQueue(clock)
    takers = [asyncio.create_task(queue.get()) for _ in range(3)]
    await asyncio.sleep(0)
    queue.put([claimed(0, "only")])  # wakes the first
    takers[0].cancel()
    event = await asyncio.wait_for(takers[1], 5)
    assert event is not None
    assert event.event_id == "only"
    queue.close()
    assert await takers[2] is None


async def test_cancelled_takers_are_skipped() -> None:
    queue = DueQueue(Clock())
    takers = [asyncio.create_task(queue.get()) for _ in range(3)]
    await asyncio.sleep(0)
    for taker in takers[:2]:
        taker.cancel()
    await asyncio.gather(*takers[:2], return_exceptions=True)
    queue.put([claimed(0)])
    assert await asyncio.wait_for(takers[2], 5) is not None


async def test_closing_ends_every_taker_and_gives_back_what_was_held() -> None:
    queue = DueQueue(Clock())
    queue.put([claimed(10, "a"), claimed(5, "b")])
    takers = [asyncio.create_task(queue.get()) for _ in range(3)]
    await asyncio.sleep(0)
    assert sorted(event.event_id for event in queue.close()) == ["a", "b"]
    assert await ended(takers, 3) == [None, None, None]
    assert await queue.get() is None
    assert len(queue) == 0
