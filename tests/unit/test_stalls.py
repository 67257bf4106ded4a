from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from orchestrator.database import Claimed
from orchestrator.dispatch.queue import stalls as module
from orchestrator.dispatch.queue.destination_queue import Windows, http_windows
from orchestrator.dispatch.queue.due_queue import DueQueue
from orchestrator.dispatch.queue.stalls import Stalls
from orchestrator.settings import Settings
from tests.support.waiting import eventually
from tests.unit.test_due_queue import Clock, claimed, nothing_to_be_had, taken


class Fixture:
    """A queue with windows of 2, and one stalled destination may keep 1 event."""

    def __init__(self) -> None:
        self.monotonic = Clock()
        self.rooms = self.takes = 0
        self.released: list[str] = []
        self.queue = DueQueue(Clock(), Windows(2, 8), self.note_room, self.monotonic)
        self.stalls = Stalls(self.queue, self.release, self.note_taken, window=2, keep=1, monotonic=self.monotonic)

    def note_taken(self) -> None:
        self.takes += 1

    def note_room(self) -> None:
        self.rooms += 1

    def release(self, events: Sequence[Claimed]) -> None:
        self.released += [event.event_id for event in events]

    def put(self, count: int, destination: str = "http://a/", lane: int = 70) -> None:
        self.queue.put([claimed(-1, str(n), destination, lane) for n in range(count)])

    def look(self, after_s: float) -> None:
        self.monotonic.s += after_s
        self.stalls.look()


@pytest.fixture
async def fixture() -> Fixture:
    return Fixture()


async def test_events_that_wait_for_a_hanging_destination_are_handed_back_after_a_second(fixture: Fixture) -> None:
    fixture.put(5)
    fixture.put(1, "http://b/", 71)
    await taken(fixture.queue, 3)
    fixture.look(0.9)
    assert fixture.released == []
    fixture.look(0.1)
    assert sorted(fixture.released) == ["2", "3", "4"]
    assert fixture.takes == 1
    assert fixture.stalls.lanes(100) == {70}
    fixture.put(2)  # claimed before the lane was left out
    assert await nothing_to_be_had(fixture.queue)
    fixture.look(0.25)
    assert sorted(fixture.released) == ["0", "1", "2", "3", "4"]


async def test_a_destination_that_answers_in_time_does_not_stall_however_full_its_window(fixture: Fixture) -> None:
    fixture.put(50)
    running = await taken(fixture.queue, 2)
    for _ in range(5):
        fixture.look(0.9)
        fixture.queue.ended(running.pop(0), quick=True)
        running += await taken(fixture.queue, 2)
        assert await nothing_to_be_had(fixture.queue)
    assert fixture.released == []
    assert fixture.stalls.lanes(100) == set()


async def test_a_slow_destination_keeps_little_and_its_lane_is_claimed_from_only_when_it_has_room(
    fixture: Fixture,
) -> None:
    fixture.put(9)
    running = await taken(fixture.queue, 2)
    fixture.monotonic.s += 1.5
    fixture.queue.ended(running.pop(), quick=False)
    running += await taken(fixture.queue, 1)
    fixture.look(0.1)
    assert len(fixture.released) == 5
    assert len(fixture.queue) == 1
    assert fixture.stalls.lanes(100) == {70}
    assert fixture.rooms == 0
    fixture.queue.ended(running.pop(), quick=False)
    running += await taken(fixture.queue, 1)
    assert fixture.rooms == 0
    fixture.queue.ended(running.pop(), quick=False)
    assert fixture.rooms == 1
    assert fixture.stalls.lanes(100) == set()


async def test_a_stalled_destination_recovers_with_the_first_quick_attempt(fixture: Fixture) -> None:
    fixture.put(5)
    running = await taken(fixture.queue, 2)
    fixture.look(1)
    fixture.queue.ended(running.pop(), quick=True)
    assert fixture.rooms == 1
    assert fixture.queue.stalled == set()
    fixture.put(9)
    await taken(fixture.queue, 1)
    fixture.look(0.9)
    assert len(fixture.queue) == 8


async def test_a_stalled_destination_in_a_shared_lane_asks_for_a_dedicated_lane_once(fixture: Fixture) -> None:
    fixture.put(5, lane=7)
    await taken(fixture.queue, 2)
    fixture.look(1)
    assert fixture.stalls.lanes(100) == set()  # others are in there, too
    (queue,) = fixture.stalls.without_dedicated_lane()
    assert (queue.delivery_type, queue.destination) == ("HTTP", "http://a/")
    assert fixture.stalls.without_dedicated_lane() == []
    queue.lane = 99
    assert fixture.stalls.lanes(100) == {99}
    fixture.put(3, lane=7)  # on their way since before
    fixture.stalls.sweep()
    assert len(fixture.queue) == 0
    assert fixture.stalls.lanes(100) == {99}


async def test_a_dedicated_lane_that_was_removed_is_asked_for_again(fixture: Fixture) -> None:
    fixture.put(5, lane=7)
    await taken(fixture.queue, 2)
    fixture.look(1)
    for after_s in (0, 5, 5):
        fixture.put(3, lane=7)
        fixture.look(after_s)
        (queue,) = fixture.stalls.without_dedicated_lane()
        queue.lane = 99
        fixture.put(3, lane=7)
        fixture.look(4.9)
        assert fixture.stalls.without_dedicated_lane() == []
        assert fixture.stalls.lanes(100) == {99}


async def test_a_dedicated_lane_takes_at_most_its_share_of_the_memory(fixture: Fixture) -> None:
    fixture.put(30, lane=70)
    fixture.put(30, "http://b/", lane=7)
    fixture.put(10, "http://c/", lane=71)
    fixture.put(10, "http://d/", lane=71)
    assert fixture.stalls.lanes(29) == {70}
    assert fixture.stalls.lanes(30) == set()
    assert fixture.stalls.lanes(15) == {70, 71}
    assert fixture.stalls.without_dedicated_lane() == []


async def test_destinations_that_share_one_connection_stall_and_recover_together() -> None:
    released: list[Claimed] = []
    queue = DueQueue(Clock())
    stalls = Stalls(queue, released.extend, lambda: None, window=0)
    queue.put([claimed(-1, "a", "http://a/", 70), claimed(-1, "b", "http://b/", 7), claimed(9, "c", "http://c/", 71)])
    stalls.stall_all()
    assert sorted(event.event_id for event in released) == ["a", "b", "c"]
    assert stalls.lanes(100) == {70, 71}
    assert [queue.destination for queue in stalls.without_dedicated_lane()] == ["http://b/"]
    queue.put([claimed(-1, "a", "http://a/", 70)])
    assert await nothing_to_be_had(queue)
    stalls.recover_all()
    assert stalls.lanes(100) == set()
    assert [event.event_id for event in await queue.take(10)] == ["a"]


async def test_stalls_are_looked_for_while_a_window_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    fixture = Fixture()
    watching = asyncio.create_task(fixture.stalls.watch())
    for n in range(2):
        fixture.put(3, f"http://host-{n}/", lane=70 + n)
        await taken(fixture.queue, 2)
        fixture.monotonic.s += 1
        await eventually(lambda: fixture.stalls.lanes(100) == set(range(70, 71 + n)))  # noqa: B023
    watching.cancel()


@pytest.mark.parametrize(
    ("connections", "bound", "first", "most"),
    [
        (1, None, 1, 1),
        (2, None, 1, 1),
        (3, None, 2, 2),
        (20, None, 2, 18),
        (200, None, 20, 180),
        (200, 5, 5, 5),
        (200, 50, 20, 50),
    ],
)
def test_no_window_takes_all_connections(connections: int, bound: int | None, first: int, most: int) -> None:
    environ = {"HTTP_MAX_CONNECTIONS": str(connections)} | ({"CUSTOMER_MAX_PARALLEL": str(bound)} if bound else {})
    assert http_windows(Settings.from_env(environ)) == (first, most)
