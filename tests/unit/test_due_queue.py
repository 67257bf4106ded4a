from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.database import Claimed
from orchestrator.dispatch.queue import due_queue as module
from orchestrator.dispatch.queue.destination_queue import DestinationQueue, Windows
from orchestrator.dispatch.queue.due_queue import DueQueue
from tests.support.waiting import eventually


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


def claimed(start_at: float, event_id: str = "", destination: str = "http://a/", lane: int = 1) -> Claimed:
    """An event that may start then."""
    return Claimed(
        claimed_at=start_at,
        event_id=event_id,
        attempt=1,
        due_at=start_at,
        start_at=start_at,
        lease_until=start_at + 60,
        scheduled_at="2030-01-01 00:00:00+00",
        delivery_type="HTTP",
        destination=destination,
        key=None,
        headers=None,
        payload="{}",
        lane=lane,
    )


async def ended(tasks: Sequence[asyncio.Task[Claimed | None]], count: int) -> list[Claimed | None]:
    """Waits until exactly so many of the tasks have ended."""
    await eventually(lambda: sum(task.done() for task in tasks) == count)
    return [task.result() for task in tasks if task.done()]


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 7), st.lists(st.integers(0, 60), max_size=10))
def test_every_event_is_handed_out_once_in_order_of_due_time_and_never_early(
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
            queue.put([claimed(due) for due in sorted(due_times[half:])])
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


async def test_an_event_due_sooner_overtakes_waiting_events() -> None:
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


async def test_closing_the_queue_ends_every_taker_and_gives_its_events_back() -> None:
    queue = DueQueue(Clock())
    queue.put([claimed(10, "a"), claimed(5, "b")])
    takers = [asyncio.create_task(queue.get()) for _ in range(3)]
    await asyncio.sleep(0)
    assert sorted(event.event_id for event in queue.close()) == ["a", "b"]
    assert await ended(takers, 3) == [None, None, None]
    assert await queue.get() is None
    assert len(queue) == 0


async def test_the_queue_waits_until_the_clock_has_been_read() -> None:
    def unread() -> float:
        raise RuntimeError("the database's clock has not been read yet")

    queue = DueQueue(unread)
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    assert queue.remove(None) == []
    assert queue.close() == []
    assert await waiting is None


async def taken(queue: DueQueue, count: int) -> list[Claimed]:
    """So many events, which must be there to be had."""
    async with asyncio.timeout(5):
        found = [await queue.get() for _ in range(count)]
    assert None not in found
    return [event for event in found if event is not None]


async def nothing_to_be_had(queue: DueQueue) -> bool:
    taker = asyncio.create_task(queue.get())
    for _ in range(5):
        await asyncio.sleep(0)
    taker.cancel()
    await asyncio.gather(taker, return_exceptions=True)
    return taker.cancelled()


async def test_a_backlog_of_thousands_does_not_delay_an_event_of_another_destination() -> None:
    clock = Clock()
    queue = DueQueue(clock)
    queue.put([claimed(-1, f"hog-{n}") for n in range(2000)])
    queue.put([claimed(5, "other", "http://b/")])
    await taken(queue, 100)
    clock.s = 5.0
    assert "other" in [event.event_id for event in await taken(queue, 2)]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(1, 60))
def test_destinations_take_turns(counts: list[int], count: int) -> None:
    async def scenario() -> None:
        queue = DueQueue(Clock())
        for n, events in enumerate(counts):
            queue.put([claimed(-1, f"{n} {k}", f"http://host-{n}/") for k in range(events)])
        order = [event.event_id for event in await taken(queue, min(count, sum(counts)))]
        for n, events in enumerate(counts):
            own = [event_id for event_id in order if event_id.startswith(f"{n} ")]
            assert own == [f"{n} {k}" for k in range(len(own))]
            if len(own) < events:  # it still waits, so nobody has had two turns more
                for others in Counter(event_id.split()[0] for event_id in order).values():
                    assert others <= len(own) + 1

    asyncio.run(scenario())


async def test_urls_of_one_host_and_port_have_one_turn() -> None:
    queue = DueQueue(Clock())
    urls = ["http://a.example/x", "http://A.example:80/y?z", "http://a.example?q", "HTTP://a.example/#f"]
    queue.put([claimed(-1, "a", url) for url in urls])
    queue.put([claimed(-1, "b", f"http://b.example/{n}") for n in range(4)])
    assert [event.event_id for event in await taken(queue, 8)] == ["a", "b"] * 4


async def test_events_of_a_destination_go_by_their_start_and_then_by_arrival() -> None:
    clock = Clock()
    queue = DueQueue(clock)
    queue.put([claimed(5, "5a"), claimed(3, "3a"), claimed(5, "5b")])
    queue.put([claimed(4, "4a"), claimed(3, "3b"), claimed(7, "7a")])
    clock.s = 6.0
    assert [event.event_id for event in await taken(queue, 5)] == ["3a", "3b", "4a", "5a", "5b"]
    assert await nothing_to_be_had(queue)


async def test_events_claimed_overdue_keep_the_order_of_their_claim() -> None:
    """It gives those of higher priority first."""
    clock = Clock()
    clock.s = 10.0
    queue = DueQueue(clock)
    queue.put([claimed(15, "later"), claimed(9, "high"), claimed(3, "low"), claimed(5, "lower")])
    clock.s = 12.0
    queue.put([claimed(11, "high 2"), claimed(2, "low 2"), claimed(14, "soon"), claimed(13, "sooner")])
    clock.s = 20.0
    order = ["high", "low", "lower", "high 2", "low 2", "sooner", "soon", "later"]
    assert [event.event_id for event in await taken(queue, 8)] == order


async def test_a_batch_holds_as_much_of_each_destination_as_there_is_room() -> None:
    queue = DueQueue(Clock())
    queue.put([claimed(-1, "hog") for _ in range(2000)])
    queue.put([claimed(-1, "b", "http://b/") for _ in range(30)])
    queue.put([claimed(1, "late", "http://c/")])
    async with asyncio.timeout(5):
        assert Counter(event.event_id for event in await queue.take(100)) == {"hog": 70, "b": 30}
        assert Counter(event.event_id for event in await queue.take(5000)) == {"hog": 1930}
    assert len(queue) == 1


async def test_at_most_a_window_of_events_is_under_way_and_other_destinations_pass_by() -> None:
    queue = DueQueue(Clock(), Windows(2, 10))
    queue.put([claimed(-1, "a") for _ in range(5)])
    queue.put([claimed(-1, "b", "http://b/")])
    first = await taken(queue, 3)
    assert Counter(event.event_id for event in first) == {"a": 2, "b": 1}
    assert await nothing_to_be_had(queue)
    queue.ended(first[0])  # without an attempt: the window is as it was
    await taken(queue, 1)
    assert await nothing_to_be_had(queue)
    assert len(queue) == 2


async def test_a_window_that_limits_grows_with_each_quick_attempt_and_shrinks_with_a_slow_one() -> None:
    queue = DueQueue(Clock(), Windows(2, 5))
    queue.put([claimed(-1) for _ in range(100)])
    running = await taken(queue, 2)
    for width in (3, 4, 5, 5, 5):
        queue.ended(running.pop(), quick=True)
        running += await taken(queue, width - len(running))
        assert await nothing_to_be_had(queue)
    queue.ended(running.pop(), quick=False)
    assert await nothing_to_be_had(queue)
    while len(running) >= 2:
        assert await nothing_to_be_had(queue)
        queue.ended(running.pop())
    running += await taken(queue, 1)
    assert await nothing_to_be_had(queue)


async def test_a_window_that_does_not_limit_does_not_grow() -> None:
    clock = Clock()
    queue = DueQueue(clock, Windows(2, 5))
    for n in range(20):
        queue.put([claimed(n), claimed(n + 0.5)])
        clock.s = n + 1
        for event in await taken(queue, 2):
            queue.ended(event, quick=True)
    queue.put([claimed(0) for _ in range(9)])
    await taken(queue, 2)
    assert await nothing_to_be_had(queue)


async def test_the_window_of_a_destination_is_forgotten_when_it_was_idle_for_long() -> None:
    monotonic = Clock()
    monotonic.s = 100.0
    queue = DueQueue(Clock(), Windows(1, 5), monotonic=monotonic)
    queue.put([claimed(-1) for _ in range(3)])
    (first,) = await taken(queue, 1)
    queue.ended(first, quick=True)  # grows to 2
    for event in await taken(queue, 2):
        queue.ended(event)
    for idle_s, width in ((9, 2), (11, 1)):
        monotonic.s += idle_s
        queue.put([claimed(-1) for _ in range(9)])
        running = await taken(queue, width)
        assert await nothing_to_be_had(queue)
        queue.remove(None)
        for event in running:
            queue.ended(event)


async def test_all_events_of_a_lane_can_be_taken_out_wherever_they_wait() -> None:
    clock = Clock()
    queue = DueQueue(clock, Windows(1, 1))
    queue.put([claimed(-1, "full", lane=70), claimed(-1, "full", lane=70), claimed(-1, "moved", lane=7)])
    queue.put([claimed(-1, "ready", "http://b/", 70), claimed(9, "later", "http://c/", 70)])
    queue.put([claimed(-1, "other", "http://d/", 71)])
    (running,) = await taken(queue, 1)
    assert running.event_id == "full"
    assert sorted(event.event_id for event in queue.remove(70)) == ["full", "later", "ready"]
    assert len(queue) == 2
    assert [event.event_id for event in await taken(queue, 1)] == ["other"]
    assert await nothing_to_be_had(queue)
    queue.ended(running)
    assert [event.event_id for event in await taken(queue, 1)] == ["moved"]
    clock.s = 10.0
    assert await nothing_to_be_had(queue)


async def test_closing_the_queue_gives_back_events_behind_a_full_window() -> None:
    queue = DueQueue(Clock(), Windows(1, 1))
    queue.put([claimed(-1, str(n)) for n in range(3)])
    (running,) = await taken(queue, 1)
    assert [event.event_id for event in queue.close()] == ["1", "2"]
    queue.ended(running, quick=True)
    assert await queue.get() is None


async def test_idle_destinations_are_forgotten_when_there_are_very_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_REMEMBERED", 100)
    queue = DueQueue(Clock(), Windows(1, 1))
    queue.put([claimed(-1, "0"), claimed(-1, "1")])
    (running,) = await taken(queue, 1)
    for n in range(1000):
        queue.put([claimed(-1, "x", f"http://host-{n}/")])
        queue.ended((await taken(queue, 1))[0], quick=True)
    assert len(queue.queues) <= 101
    assert await nothing_to_be_had(queue)  # the window of the first is still full
    queue.ended(running)
    assert [event.event_id for event in await taken(queue, 1)] == ["1"]


class Model:
    """What a queue must do, whatever happens to it."""

    def __init__(self) -> None:
        self.clock, self.monotonic = Clock(), Clock()
        self.queue = DueQueue(self.clock, Windows(2, 4), monotonic=self.monotonic)
        self.waiting: set[str] = set()
        self.running: list[Claimed] = []
        self.count = 0

    def destination_queue(self, event: Claimed) -> DestinationQueue:
        return next(each for each in self.queue.queues if each.destination == event.destination)

    def put(self, events: list[tuple[int, int]]) -> None:
        made = []
        for start, host in events:
            self.count += 1
            made.append(claimed(self.clock.s + start, str(self.count), f"http://host-{host}/", 64 + host % 2))
        self.waiting |= {event.event_id for event in made}
        self.queue.put(made)

    async def take(self) -> None:
        """Takes all that is to be had."""
        while True:
            taker = asyncio.create_task(self.queue.get())
            for _ in range(3):
                await asyncio.sleep(0)
            if not taker.done():
                taker.cancel()
                await asyncio.gather(taker, return_exceptions=True)
                return
            event = taker.result()
            assert event is not None
            assert event.start_at <= self.clock.s
            self.waiting.remove(event.event_id)
            self.running.append(event)
            each = self.destination_queue(event)
            assert each.running <= each.window

    def check(self) -> None:
        assert len(self.queue) == len(self.waiting) == sum(len(each.events) for each in self.queue.queues)
        for each in self.queue.queues:
            assert each.running == sum(event.destination == each.destination for event in self.running)
            assert each.window <= 4


OPERATIONS = st.one_of(
    st.tuples(st.just("put"), st.lists(st.tuples(st.integers(-3, 5), st.integers(0, 3)), min_size=1, max_size=12)),
    st.tuples(st.just("end"), st.integers(0, 100), st.sampled_from([None, True, False])),
    st.tuples(st.just("clock"), st.integers(-5, 8)),
    st.tuples(st.just("take")),
    st.tuples(st.just("stall"), st.integers(0, 100), st.integers(0, 2), st.integers(0, 3)),
    st.tuples(st.just("recover"), st.integers(0, 100)),
    st.tuples(st.just("remove"), st.sampled_from([64, 65, None])),
)


@given(st.lists(OPERATIONS, max_size=40))
def test_no_history_of_the_queue_loses_an_event_or_hands_one_out_early_or_beyond_its_window(
    operations: list[tuple[object, ...]],
) -> None:
    async def scenario() -> None:
        model = Model()
        queue = model.queue
        for operation in operations:
            match operation:
                case ("put", list(events)):
                    model.put(events)
                case ("end", int(n), quick) if model.running:
                    model.monotonic.s += 1
                    event = model.running.pop(n % len(model.running))
                    queue.ended(event, quick if isinstance(quick, bool) else None)
                    await model.take()  # as the caller of ended() does
                case ("clock", int(step)):
                    model.clock.s += step
                    queue.put([])
                case ("take",):
                    await model.take()
                case ("stall", int(n), int(window), int(keep)) if queue.queues:
                    out = queue.stall(queue.queues[n % len(queue.queues)], window, keep)
                    model.waiting -= {event.event_id for event in out}
                case ("recover", int(n)) if queue.stalled:
                    queue.recover(sorted(queue.stalled, key=lambda each: str(each.destination))[n % len(queue.stalled)])
                case ("remove", lane):
                    out = queue.remove(lane if isinstance(lane, int) else None)
                    model.waiting -= {event.event_id for event in out}
            model.check()
        for each in list(queue.stalled):
            queue.recover(each)
        model.clock.s += 1000
        queue.put([])
        for _ in range(len(model.waiting) + len(model.running) + 1):
            await model.take()
            if model.running:
                queue.ended(model.running.pop(), quick=True)
        assert not model.waiting
        assert queue.close() == []

    asyncio.run(scenario())


async def test_it_counts_the_characters_of_the_payloads_that_it_holds() -> None:
    queue = DueQueue(Clock(), Windows(8, 8))
    queue.put([claimed(-1, str(n), f"http://{n % 3}/", lane=n % 3) for n in range(12)])
    assert (len(queue), queue.payload) == (12, 12 * len("{}"))
    assert await queue.get() is not None
    assert (len(queue), queue.payload) == (11, 22)
    assert len(await queue.take(2)) == 2
    assert (len(queue), queue.payload) == (9, 18)
    [one, *_] = queue.queues
    taken = queue.stall(one, 0, 1) + queue.remove(2)
    assert taken
    assert (len(queue), queue.payload) == (9 - len(taken), 18 - 2 * len(taken))
    queue.close()
    assert (len(queue), queue.payload) == (0, 0)
