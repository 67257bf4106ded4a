"""Gathering single submissions into few calls, with a database that does what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, cast

import pytest

from orchestrator.api.intake import gather
from orchestrator.api.intake.gather import FLUSHERS, gathering
from orchestrator.api.problems import Problem
from orchestrator.database import Database, Submitted, submit_all
from orchestrator.errors import Blocked, DatabaseUnavailable, ValidationError
from orchestrator.events.submission import Submission
from tests.support.waiting import eventually

AT = datetime(2030, 1, 31, tzinfo=UTC)


class FakeDatabase:
    """Notes each call and answers when `gate` is open; refuses a call that holds any id of `poison`."""

    def __init__(self, *poison: str) -> None:
        self.calls: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.poison = set(poison)
        self.error: Callable[[], Exception] | None = None
        self.held: set[str] = set()
        """Ids that another session has kept and not committed."""

    async def submit_hastily(self, submissions: Sequence[Submission]) -> list[Submitted] | None:
        try:
            return await self.submit(submissions)
        except Blocked:
            return None

    async def submit(self, submissions: Sequence[Submission]) -> list[Submitted]:
        ids = [submission.id for submission in submissions]
        self.calls.append(ids)
        await self.gate.wait()
        if self.error:
            raise self.error()
        if self.poison & set(ids):
            raise ValidationError("payload", "refused by PostgreSQL")
        if self.held & set(ids):
            raise Blocked("another session's open transaction holds what is needed")
        return [Submitted(id_, "accepted", None, None) for id_ in ids]


def as_database(fake: FakeDatabase) -> Database:
    return cast(Database, fake)


def submission(name: str) -> Submission:
    return Submission(name, AT, "s", None, "HTTP", "http://a/", b"1", None, 3, None)


def _was_called(fake: FakeDatabase, times: int) -> bool:
    return len(fake.calls) == times


async def occupy_flushers(fake: FakeDatabase, gatherer: gather.Gatherer) -> list[asyncio.Task[Submitted]]:
    """Keeps every flusher busy until the gate is opened."""
    fake.gate.clear()
    tasks = []
    for n in range(FLUSHERS):
        tasks.append(asyncio.create_task(gatherer.submit(submission(f"first-{n}"))))
        await eventually(partial(_was_called, fake, times=n + 1))
    return tasks


async def test_a_lone_submission_is_flushed_at_once() -> None:
    fake = FakeDatabase()
    async with gathering(as_database(fake)) as gatherer:
        assert await gatherer.submit(submission("a")) == Submitted("a", "accepted")
    assert fake.calls == [["a"]]


async def test_clients_that_come_again_when_they_are_answered_are_taken_together() -> None:
    fake = FakeDatabase()

    async def client(n: int) -> None:
        for times in range(2):
            for _ in range(n % 3):  # its answer goes out and its next request comes in, a little after others
                await asyncio.sleep(0)
            await gatherer.submit(submission(f"{n}-{times}"))

    async with gathering(as_database(fake)) as gatherer, asyncio.TaskGroup() as clients:
        for n in range(6):
            clients.create_task(client(n))
    assert [len(call) for call in fake.calls] == [6, 6]


async def test_submissions_that_wait_go_in_one_call_and_each_gets_its_own_answer() -> None:
    fake = FakeDatabase()
    async with gathering(as_database(fake)) as gatherer:
        first = await occupy_flushers(fake, gatherer)
        later = [asyncio.create_task(gatherer.submit(submission(f"later-{n}"))) for n in range(20)]
        await asyncio.sleep(0)
        fake.gate.set()
        results = await asyncio.gather(*first, *later)
    assert fake.calls[FLUSHERS:] == [[f"later-{n}" for n in range(20)]]
    assert [result.id for result in results[FLUSHERS:]] == [f"later-{n}" for n in range(20)]


async def test_a_value_that_only_the_database_refuses_fails_alone() -> None:
    fake = FakeDatabase("7", "12")
    results = await submit_all(as_database(fake), [submission(str(n)) for n in range(20)])
    assert [result.id for result in results] == [str(n) for n in range(20)]
    assert {result.id for result in results if result.result == "refused"} == {"7", "12"}
    assert {(result.field, result.reason) for result in results if result.result == "refused"} == {
        ("payload", "refused by PostgreSQL")
    }


@pytest.mark.parametrize(
    ("error", "kind"), [(DatabaseUnavailable("away"), "unavailable"), (RuntimeError("bug"), "internal")]
)
async def test_when_a_call_fails_every_waiter_is_told_and_the_next_call_is_made(error: Exception, kind: str) -> None:
    fake = FakeDatabase()
    async with gathering(as_database(fake)) as gatherer:
        first = await occupy_flushers(fake, gatherer)
        later = [asyncio.create_task(gatherer.submit(submission(f"later-{n}"))) for n in range(5)]
        await asyncio.sleep(0)
        fake.error = lambda: error
        fake.gate.set()
        failures: list[Any] = await asyncio.gather(*first, *later, return_exceptions=True)
        assert [failure.kind for failure in failures] == [kind] * len(failures)
        assert len({id(failure) for failure in failures}) == len(failures)
        fake.error = None
        assert (await gatherer.submit(submission("after"))).result == "accepted"


async def test_the_queue_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "MAX_WAITING", 3)
    fake = FakeDatabase()
    async with gathering(as_database(fake)) as gatherer:
        first = await occupy_flushers(fake, gatherer)
        later = [asyncio.create_task(gatherer.submit(submission(str(n)))) for n in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Problem) as caught:
            await gatherer.submit(submission("one too many"))
        assert caught.value.kind == "unavailable"
        assert "Retry-After" in caught.value.headers
        fake.gate.set()
        assert len(await asyncio.gather(*first, *later)) == FLUSHERS + 3


async def test_a_submission_whose_request_gave_up_before_its_turn_is_not_kept() -> None:
    fake = FakeDatabase()
    async with gathering(as_database(fake)) as gatherer:
        first = await occupy_flushers(fake, gatherer)
        given_up = asyncio.create_task(gatherer.submit(submission("given up")))
        stays = asyncio.create_task(gatherer.submit(submission("stays")))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        fake.gate.set()
        await asyncio.gather(*first, stays)
    assert fake.calls[FLUSHERS:] == [["stays"]]


async def test_a_call_that_takes_too_long_is_given_up_and_reported_as_of_unknown_outcome(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gather, "FLUSH_TIMEOUT_S", 0.01)
    fake = FakeDatabase()
    fake.gate.clear()
    async with gathering(as_database(fake)) as gatherer:
        with pytest.raises(Problem, match="Not known to be kept") as caught:
            await gatherer.submit(submission("a"))
        assert caught.value.status == 503


async def test_a_submission_that_waited_too_long_for_its_turn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDatabase()
    async with gathering(as_database(fake)) as gatherer:
        first = await occupy_flushers(fake, gatherer)
        later = asyncio.create_task(gatherer.submit(submission("later")))
        await asyncio.sleep(0)
        monkeypatch.setattr(gather, "DEADLINE_S", -1.0)
        fake.gate.set()
        await asyncio.gather(*first)
        with pytest.raises(Problem, match="does not keep up"):
            await later
    assert len(fake.calls) == FLUSHERS


async def test_waiting_submissions_are_flushed_at_the_end_and_no_more_are_taken() -> None:
    fake = FakeDatabase()
    async with gathering(as_database(fake)) as gatherer:
        first = await occupy_flushers(fake, gatherer)
        later = asyncio.create_task(gatherer.submit(submission("later")))
        await asyncio.sleep(0)
        gatherer.close()
        with pytest.raises(Problem):
            await gatherer.submit(submission("too late"))
        fake.gate.set()
    assert [task.result().id for task in (*first, later)][-1] == "later"


async def test_a_blocked_submission_is_set_aside_and_each_request_for_it_is_answered_once_its_outcome_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gather, "_FIRST_PAUSE_S", 0.01)
    fake = FakeDatabase()
    fake.held = {"later-3"}
    told: list[int] = []
    async with gathering(as_database(fake), told.append) as gatherer:
        first = await occupy_flushers(fake, gatherer)
        later = [asyncio.create_task(gatherer.submit(submission(f"later-{n}"))) for n in range(20)]
        await asyncio.sleep(0)
        fake.gate.set()
        blocked = later.pop(3)
        results = await asyncio.gather(*first, *later)
        assert {result.result for result in results} == {"accepted"}
        again = asyncio.create_task(gatherer.submit(submission("later-3")))
        await eventually(lambda: len(told) == 2)
        assert not blocked.done()
        fake.held = set()
        assert ((await blocked).result, (await again).result) == ("accepted", "duplicate")


async def test_a_submission_that_stays_blocked_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(gather, "BLOCKED_S", 0.05)
    fake = FakeDatabase()
    fake.held = {"a"}
    async with gathering(as_database(fake)) as gatherer:
        with pytest.raises(Problem, match="Nothing was kept") as caught:
            await gatherer.submit(submission("a"))
        assert caught.value.headers["Retry-After"] == "5"
        assert (await gatherer.submit(submission("b"))).result == "accepted"
