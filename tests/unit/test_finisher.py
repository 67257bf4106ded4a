from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.database import Claimed, Finished, Leases, NotDelivered
from orchestrator.dispatch import finisher as module
from orchestrator.dispatch.finisher import Finisher
from orchestrator.errors import Blocked, DatabaseUnavailable, ValidationError
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings
from tests.support.waiting import eventually

SETTINGS = Settings.from_env({})


class FakeLeases:
    """The far end: a database that records, refuses what it is told to, or is away."""

    def __init__(self) -> None:
        self.finished: list[list[str]] = []
        self.texts: dict[str, tuple[str | None, str | None]] = {}
        self.released: list[str] = []
        self.answers: dict[str, NotDelivered] = {}
        self.refuses: Callable[[Finished], bool] = lambda result: False
        self.refusal: Exception = ValidationError("value", "invalid byte sequence")
        self.away = False
        self.hangs = False
        self.calls = 0
        self.held: set[str] = set()
        """Events that another session has locked."""

    async def finish(self, results: Sequence[Finished]) -> list[NotDelivered]:
        self.calls += 1
        await self._answer()
        if any(self.refuses(result) for result in results):
            raise self.refusal
        if any(result.event_id in self.held for result in results):
            raise Blocked("another session's open transaction holds what is needed")
        self.finished.append([result.event_id for result in results])
        self.texts |= {result.event_id: (result.error, result.response) for result in results}
        named = {result.event_id: None for result in results}
        return [self.answers[event_id] for event_id in named if event_id in self.answers]

    async def finish_free(self, results: Sequence[Finished]) -> list[NotDelivered]:
        free = [result for result in results if result.event_id not in self.held]
        blocked = [
            NotDelivered(each.event_id, "blocked", None, each.attempt) for each in results if each.event_id in self.held
        ]
        return blocked + (await self.finish(free) if free else [])

    async def release_free(self, leases: Sequence[Claimed]) -> tuple[int, set[str]]:
        return await self.release([lease for lease in leases if lease.event_id not in self.held]), self.held

    async def holders(self) -> str:
        return "pid 7 (psql)"

    async def release(self, leases: Sequence[Claimed]) -> int:
        await self._answer()
        if any(lease.event_id in self.held for lease in leases):
            raise Blocked("another session's open transaction holds what is needed")
        self.released += [lease.event_id for lease in leases]
        return len(leases)

    async def _answer(self) -> None:
        await asyncio.sleep(0)
        if self.hangs:
            await asyncio.Event().wait()
        if self.away:
            raise DatabaseUnavailable("the database is away: gone")

    @property
    def recorded(self) -> list[str]:
        return [event_id for batch in self.finished for event_id in batch]


def finished(
    event_id: object,
    result: str = "delivered",
    error: str | None = None,
    response: str | None = None,
    attempt: int = 1,
    correlation_id: str | None = None,
) -> Finished:
    return Finished(
        str(event_id), attempt, result, 204, 1.0, 2.0, error, response, None, 0.5, correlation_id=correlation_id
    )


def lease(event_id: object) -> Claimed:
    return Claimed(
        claimed_at=0.5,
        event_id=str(event_id),
        attempt=1,
        due_at=1.0,
        start_at=1.0,
        lease_until=60.0,
        scheduled_at="2030-01-01 00:00:00+00",
        delivery_type="HTTP",
        destination="http://a/",
        key=None,
        headers=None,
        payload="{}",
        lane=1,
    )


class Fixture:
    def __init__(self) -> None:
        self.metrics = Metrics(SETTINGS)
        self.retries: list[float] = []
        self.freed: list[int] = []  # how many results were recorded each time
        self.unrecorded: list[int] = []  # results that were left each time a batch had been recorded
        self.finisher = Finisher(self.metrics, self.retries.append, self.note_freed, self.note_recorded)
        self.leases = FakeLeases()

    def note_freed(self) -> None:
        self.freed.append(len(self.leases.recorded))

    def note_recorded(self) -> None:
        self.unrecorded.append(self.finisher.unrecorded)

    async def run(self) -> None:
        await self.finisher.run(cast(Leases, self.leases))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.run())
            yield
            self.finisher.close()

    def counted(self, name: str) -> float:
        return sum(
            sample.value
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.name == f"orchestrator_{name}"
        )


@pytest.fixture
def fixture() -> Fixture:
    return Fixture()


async def test_results_of_one_moment_are_recorded_by_one_call(fixture: Fixture) -> None:
    async with fixture.running():
        for n in range(100):
            fixture.finisher.add(finished(n))
        await eventually(lambda: fixture.finisher.pending == 0)
        assert fixture.leases.finished == [[str(n) for n in range(100)]]
    assert fixture.counted("events_delivered_total") == 100


async def test_a_full_batch_of_results_is_recorded_without_waiting_for_more(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GATHER_S", 60.0)
    async with fixture.running():
        for n in range(999):
            fixture.finisher.add(finished(n))
        for _ in range(10):
            await asyncio.sleep(0)
        assert fixture.leases.finished == []
        fixture.finisher.add(finished(999))
        await eventually(lambda: fixture.leases.recorded == [str(n) for n in range(1000)])


async def test_a_result_that_frees_other_events_is_recorded_at_once_and_announced(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GATHER_S", 60.0)
    async with fixture.running():
        fixture.finisher.add(finished("a"))
        for _ in range(10):
            await asyncio.sleep(0)
        assert fixture.leases.finished == []
        for event_id in ("b", "c"):
            fixture.finisher.add(finished(event_id), at_once=True)
            await eventually(lambda: fixture.finisher.pending == 0)
        assert fixture.leases.finished == [["a", "b"], ["c"]]
        assert fixture.freed == [2, 3]
        fixture.finisher.add(finished("d"))
        for _ in range(10):
            await asyncio.sleep(0)
        assert fixture.finisher.pending == 1
    assert fixture.freed == [2, 3]


async def test_a_result_that_frees_other_events_is_not_announced_before_it_is_recorded(fixture: Fixture) -> None:
    fixture.leases.away = True
    for n in range(1500):
        fixture.finisher.add(finished(n), at_once=n == 1400)
    with pytest.raises(DatabaseUnavailable):
        await fixture.run()
    assert fixture.freed == []
    fixture.leases.away = False
    async with fixture.running():
        await eventually(lambda: fixture.finisher.pending == 0)
    assert fixture.freed[-1] == 1500


async def test_each_batch_that_was_recorded_makes_room_for_claims(fixture: Fixture) -> None:
    fixture.finisher.add(*(finished(n) for n in range(2500)))
    assert fixture.finisher.unrecorded == 2500
    async with fixture.running():
        await eventually(lambda: fixture.unrecorded == [1500, 500, 0])


async def test_no_call_carries_more_than_a_thousand_results(fixture: Fixture) -> None:
    for n in range(2500):
        fixture.finisher.add(finished(n))
        fixture.finisher.release([lease(n)])
    async with fixture.running():
        pass
    assert [len(batch) for batch in fixture.leases.finished] == [1000, 1000, 500]
    assert len(fixture.leases.released) == 2500
    assert fixture.counted("events_released_total") == 2500


async def test_results_are_kept_while_the_database_is_away_and_recorded_when_it_is_back(fixture: Fixture) -> None:
    fixture.leases.away = True
    fixture.finisher.add(finished("a"))
    fixture.finisher.release([lease("b")])
    for n in range(3):
        with pytest.raises(DatabaseUnavailable):
            await fixture.run()
        fixture.finisher.add(finished(n))
    assert fixture.finisher.pending == 5
    fixture.leases.away = False
    async with fixture.running():
        await eventually(lambda: fixture.finisher.pending == 0)
    assert sorted(fixture.leases.recorded) == ["0", "1", "2", "a"]
    assert fixture.leases.released == ["b"]


async def test_a_call_that_hangs_is_given_up_and_its_results_are_kept(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 0.05)
    fixture.leases.hangs = True
    fixture.finisher.add(finished("a"))
    with pytest.raises(TimeoutError):
        await fixture.run()
    assert fixture.finisher.pending == 1


async def test_a_result_added_during_a_call_is_recorded_by_the_next_call(fixture: Fixture) -> None:
    async with fixture.running():
        for n in range(200):
            fixture.finisher.add(finished(n))
            await asyncio.sleep(0)
        await eventually(lambda: fixture.finisher.pending == 0)
    assert sorted(map(int, fixture.leases.recorded)) == list(range(200))


async def test_closing_the_finisher_records_the_remaining_results_at_once(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GATHER_S", 60.0)
    async with fixture.running():
        fixture.finisher.add(finished("a"))
        await asyncio.sleep(0)
    assert fixture.leases.recorded == ["a"]
    assert fixture.finisher.done


async def test_a_text_that_the_database_refuses_is_dropped_and_its_result_recorded(
    fixture: Fixture, caplog: pytest.LogCaptureFixture
) -> None:
    fixture.leases.refuses = lambda result: "\0" in (result.error or "") + (result.response or "")
    batch = [finished(n, "retry", f"error {n}", f"answer {n}") for n in range(30)]
    batch[7].error = "a\0b"
    batch[21].response = "c\0d"
    for result in batch:
        fixture.finisher.add(result)
    async with fixture.running():
        pass
    assert sorted(fixture.leases.recorded) == sorted(str(n) for n in range(30))
    assert fixture.leases.texts["7"] == ("error text refused by the database", None)
    assert fixture.leases.texts["21"] == ("error text refused by the database", None)
    assert fixture.leases.texts["8"] == ("error 8", "answer 8")  # the others keep theirs
    refused = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert {cast(Any, record).event_id for record in refused} == {"7", "21"}


@given(st.integers(1, 60), st.sets(st.integers(0, 59)), st.booleans())
def test_results_that_are_refused_for_good_hold_up_no_other_results(count: int, bad: set[int], encoding: bool) -> None:
    async def scenario() -> None:
        fixture = Fixture()
        fixture.leases.refuses = lambda result: int(result.event_id) in bad
        if encoding:
            fixture.leases.refusal = UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")
        for n in range(count):
            fixture.finisher.add(finished(n, error="text" if n % 2 else None))
        async with fixture.running():
            pass
        assert sorted(map(int, fixture.leases.recorded)) == [n for n in range(count) if n not in bad]
        assert fixture.finisher.pending == 0
        assert fixture.counted("events_stale_total") == len({n for n in bad if n < count})

    logging.disable(logging.CRITICAL)
    try:
        asyncio.run(scenario())
    finally:
        logging.disable(logging.NOTSET)


async def test_answers_are_counted_logged_and_retries_expected(
    fixture: Fixture, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    fixture.leases.answers = {
        "r": NotDelivered("r", "retried", 1234.5, 1),
        "d": NotDelivered("d", "dead", None, 1),
        "s": NotDelivered("s", "stale", None, 1),
    }
    for event_id, result in (("ok", "delivered"), ("r", "retry"), ("d", "fail"), ("s", "delivered")):
        error = None if result == "delivered" else f"HTTP 500 for {event_id}"
        fixture.finisher.add(finished(event_id, result, error, correlation_id=f"order {event_id}"))
    async with fixture.running():
        pass
    assert fixture.retries == [1234.5]
    for name in ("delivered", "retried", "dead", "stale"):
        assert fixture.counted(f"events_{name}_total") == 1, name
    said = {cast(Any, record).event_id: record for record in caplog.records}
    assert {event_id: cast(Any, record).correlation_id for event_id, record in said.items()} == {
        "r": "order r",
        "d": "order d",
        "s": "order s",
    }
    assert cast(Any, said["r"]).error == "HTTP 500 for r"
    assert said["s"].message == "lease was lost before its result was recorded"


@pytest.mark.parametrize("newest_first", [False, True])
async def test_of_two_results_of_one_event_the_late_one_is_counted_as_stale(
    fixture: Fixture, newest_first: bool
) -> None:
    """Its lease was lost for a while, and this dispatcher then claimed it once more."""
    fixture.leases.answers = {"e": NotDelivered("e", "stale", None, 1)}
    both = [finished("e", "retry", "late"), finished("e", attempt=2)]
    fixture.finisher.add(*(reversed(both) if newest_first else both))
    async with fixture.running():
        pass
    assert fixture.counted("events_delivered_total") == 1
    assert fixture.counted("events_stale_total") == 1


async def test_a_result_that_another_session_blocks_is_set_aside_and_recorded_when_it_lets_go(
    fixture: Fixture, caplog: pytest.LogCaptureFixture
) -> None:
    fixture.leases.held = {"1", "2"}
    async with fixture.running():
        fixture.finisher.add(*[finished(n) for n in range(2)])
        fixture.finisher.release([lease(n) for n in (2, 3)])
        await eventually(lambda: fixture.leases.recorded == ["0"] and fixture.leases.released == ["3"])
        await eventually(lambda: fixture.counted("results_set_aside") == 2)
        fixture.finisher.add(finished("more"))
        await eventually(lambda: fixture.leases.recorded == ["0", "more"])
        assert [vars(each).get("holders") for each in caplog.records] == ["pid 7 (psql)"]
        fixture.leases.held = set()
        await eventually(lambda: fixture.finisher.pending == 0)
    assert (fixture.leases.recorded, fixture.leases.released) == (["0", "more", "1"], ["3", "2"])
    assert fixture.counted("events_delivered_total") == 3


async def test_a_stop_waits_for_results_that_are_set_aside(fixture: Fixture) -> None:
    fixture.leases.held = {"1"}
    async with fixture.running():
        fixture.finisher.add(finished(1))
        await eventually(lambda: fixture.counted("results_set_aside") == 1)
        fixture.finisher.close()
        fixture.leases.held = set()
    assert fixture.finisher.done
    assert fixture.leases.recorded == ["1"]
