"""Calls whose reply is lost answer what they did, once: the database did it, and nobody heard of it."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple

import pytest

from orchestrator.database import Cancelled, Database, Filter, Rescheduled, Submitted
from orchestrator.database.bulk_calls import Sweeps
from orchestrator.database.destinations import Destinations
from orchestrator.database.maintenance import Retention
from orchestrator.database.migrate import migrate
from orchestrator.database.rejects import Rejects
from orchestrator.errors import DatabaseUnavailable, InDoubt
from orchestrator.events.parsing import parse_submission
from orchestrator.events.submission import Submission
from orchestrator.maintenance.upkeep import maintain_once
from tests.conftest import MakeSettings
from tests.support.cutting_proxy import CuttingProxy
from tests.support.ingesting import submission
from tests.support.sql_client import NOON, Client, results
from tests.support.waiting import eventually

LATER = (NOON + timedelta(days=2)).isoformat()
HERE = Filter(source="tests")
HOST_NAME = "receiver.example"


class World(NamedTuple):
    """What a case works on: the database by way of the proxy, and psql beside it."""

    database: Database
    client: Client
    settings: Any


Case = Callable[[World], Awaitable[None]]
CASES: dict[str, tuple[str, Case]] = {}


def case(*names: str, cut: str = "keep_answer") -> Callable[[Case], Case]:
    """Registers a test of these methods; the connection is cut at the statement with `cut` in it."""

    def register(work: Case) -> Case:
        for name in names:
            CASES[name] = cut, work
        return work

    return register


def dead(client: Client, count: int) -> list[str]:
    """Ids of events that have died."""
    client.at(NOON)
    ids = [client.schedule(external_job_id=f"dead-{n}") for n in range(count)]
    client.finish(results(client.claim(count), "fail", error="timeout: too slow"))
    client.rows("reset orchestrator.now")
    return ids


def parsed(world: World, **changes: Any) -> Submission:
    return parse_submission(submission(1, scheduled_at=LATER, **changes), world.settings)


@case("Database.submit", cut="COMMIT")
async def submits(world: World) -> None:
    before = parsed(world, external_job_id="before")
    world.client.schedule(source=before.source, external_job_id="before", scheduled_at=LATER)
    some = [parsed(world, external_job_id="new"), before, parsed(world, external_job_id="newer")]
    answers = [(answer.id, answer.result) for answer in await world.database.submit(some)]
    assert answers == [(some[0].id, "accepted"), (some[1].id, "duplicate"), (some[2].id, "accepted")]
    assert [answer.result for answer in await world.database.submit(some)] == ["duplicate"] * 3


@case("Database.submit_hastily", cut="COMMIT")
async def submits_without_waiting(world: World) -> None:
    some = [parsed(world, external_job_id=name) for name in ("new", "newer")]
    assert [answer.result for answer in await world.database.submit_hastily(some) or ()] == ["accepted"] * 2


@case("Database.cancel")
async def cancels(world: World) -> None:
    event_id = world.client.schedule()
    assert await world.database.cancel(event_id) == Cancelled(event_id, "cancelled", "cancelled")
    assert await world.database.cancel(event_id) == Cancelled(event_id, "already_cancelled", "cancelled")


@case("Database.cancel_external")
async def cancels_all_of_a_name(world: World) -> None:
    ids = [world.client.schedule(external_job_id="job", source=source) for source in ("a", "b")]
    answers = await world.database.cancel_external("job")
    assert {answer.id for answer in answers} == set(ids)
    assert {(answer.result, answer.status) for answer in answers} == {("cancelled", "cancelled")}


@case("Database.reschedule")
async def reschedules(world: World) -> None:
    event_id = world.client.schedule()
    answer = await world.database.reschedule(event_id, None, scheduled_at=LATER)
    assert answer is not None
    assert answer.successor is not None
    assert answer == Rescheduled(event_id, "rescheduled", "rescheduled", answer.successor, None, None)
    assert world.client.value("select count(*) from orchestrator.event") == 2


@case("Database.redrive")
async def redrives(world: World) -> None:
    [event_id] = dead(world.client, 1)
    assert await world.database.redrive(event_id) == "redriven"


@case("Database.create_api_key")
async def creates_a_key(world: World) -> None:
    await world.database.create_api_key("laptop", b"x" * 32, ["read"])
    assert world.client.column("select name from orchestrator.api_key") == ["laptop"]


@case("Database.revoke_api_key")
async def revokes_a_key(world: World) -> None:
    world.client.rows("select orchestrator.create_api_key('laptop', %s, '{read}')", b"x" * 32)
    assert await world.database.revoke_api_key("laptop")
    assert not await world.database.revoke_api_key("laptop")


@case("Sweeps.cancel")
async def cancels_by_filter(world: World) -> None:
    ids = [world.client.schedule() for _ in range(5)]
    swept = await Sweeps(world.database).cancel(HERE, limit=3)
    assert (swept.seen, swept.matched, swept.done, swept.in_flight) == (3, 3, 3, 0)
    assert swept.next_after is not None
    rest = await Sweeps(world.database).cancel(HERE, limit=3, after=swept.next_after)
    assert (rest.done, rest.next_after) == (2, None)
    assert {*swept.examples, *rest.examples} == set(ids)


@case("Sweeps.redrive")
async def redrives_by_filter(world: World) -> None:
    ids = dead(world.client, 3)
    swept = await Sweeps(world.database).redrive(HERE, limit=10, rate=1.0)
    assert (swept.seen, swept.matched, swept.done, sorted(swept.examples)) == (3, 3, 3, sorted(ids))
    assert swept.next_start_at is not None
    assert world.client.value("select %s::timestamptz > clock_timestamp()", swept.next_start_at)


@case("Sweeps.purge")
async def purges(world: World) -> None:
    ids = dead(world.client, 3)
    swept = await Sweeps(world.database).purge(HERE, limit=10)
    assert (swept.seen, swept.matched, swept.done, sorted(swept.examples)) == (3, 3, 3, sorted(ids))


@case("Destinations.configure")
async def configures(world: World) -> None:
    told = json.loads(await Destinations(world.database).configure("*.example", {"rate_per_second": 5.0}))
    assert (told["destination"]["name"], told["destination"]["rate_per_second"]) == ("*.example", 5.0)
    assert told["overlaps"] == []


@case("Destinations.delete")
async def deletes(world: World) -> None:
    world.client.rows("select * from orchestrator.configure_destination(%s, 5)", HOST_NAME)
    told = await Destinations(world.database).delete(HOST_NAME)
    assert told is not None
    assert json.loads(told)["name"] == HOST_NAME
    assert await Destinations(world.database).delete(HOST_NAME) is None


@case("Destinations.pause")
async def pauses(world: World) -> None:
    told = json.loads(await Destinations(world.database).pause(HOST_NAME))
    assert told["name"] == HOST_NAME
    assert "paused before" not in told["note"]


@case("Destinations.resume")
async def resumes(world: World) -> None:
    world.client.rows("select * from orchestrator.pause_destination(%s)", HOST_NAME)
    told = await Destinations(world.database).resume(HOST_NAME)
    assert told is not None
    assert json.loads(told)["resumed"] is True
    told = await Destinations(world.database).resume(HOST_NAME)
    assert told is not None
    assert json.loads(told)["resumed"] is False


@case("Destinations.close_breaker")
async def closes_a_breaker(world: World) -> None:
    world.client.rows("select * from orchestrator.configure_destination(%s, 5)", HOST_NAME)
    world.client.rows(
        "update orchestrator.lane set breaker = 'open', opened_at = now(), open_until = now() + interval '1 min'"
        " where name = %s",
        HOST_NAME,
    )
    told = await Destinations(world.database).close_breaker(HOST_NAME)
    assert told is not None
    assert json.loads(told)["closed"] is True


@case("Destinations.pause_all")
async def pauses_all(world: World) -> None:
    assert "paused before" not in json.loads(await Destinations(world.database).pause_all())["note"]
    assert "paused before" in json.loads(await Destinations(world.database).pause_all())["note"]


@case("Destinations.resume_all")
async def resumes_all(world: World) -> None:
    world.client.rows("select * from orchestrator.pause_all()")
    assert json.loads(await Destinations(world.database).resume_all())["resumed"] is True


@case("Rejects.resubmit", cut="COMMIT")
async def resubmits(world: World) -> None:
    world.client.rows(
        "select orchestrator.keep_rejects('t', '{1}', '{1}', array[''::bytea], array[''::bytea], '{f}', '{r}')"
    )
    number = world.client.value("select max(reject) from orchestrator.reject")
    made = parsed(world)
    assert await Rejects(world.database).resubmit(number, made) == Submitted(made.id, "accepted", status="scheduled")
    assert world.client.column("select event_id::text from orchestrator.reject") == [made.id]


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, "after") for name in CASES]
    + [
        (name, way) for name in ("Database.submit", "Sweeps.cancel", "Rejects.resubmit") for way in ("before", "during")
    ],
)
async def test_a_call_whose_reply_is_lost_answers_with_its_result(
    settings: MakeSettings, database_url: str, client: Client, name: str, way: str
) -> None:
    cut, work = CASES[name]
    async with CuttingProxy(database_url) as proxy:
        ours = settings(DATABASE_URL=proxy.url)
        async with Database(ours, role="test") as database:
            {"before": proxy.cut_before, "during": proxy.cut_during, "after": proxy.cut_after}[way](cut)
            await work(World(database, client, ours))
            assert proxy.cuts == 1


async def test_a_call_that_loses_several_replies_answers_with_its_result(
    settings: MakeSettings, database_url: str, client: Client
) -> None:
    ids = [client.schedule() for _ in range(5)]
    async with (
        CuttingProxy(database_url) as proxy,
        Database(settings(DATABASE_URL=proxy.url), role="test") as database,
    ):
        proxy.cut_after("keep_answer", "kept_answer")
        swept = await Sweeps(database).cancel(HERE, limit=10)
        assert (swept.done, set(swept.examples), proxy.cuts) == (5, set(ids), 2)


def methods(*classes: type) -> set[str]:
    return {
        f"{cls.__name__}.{name}"
        for cls in classes
        for name, _ in inspect.getmembers(cls, inspect.iscoroutinefunction)
        if not name.startswith("_")
    }


def test_every_method_that_changes_data_is_tested_with_a_lost_reply() -> None:
    asking = {
        *(
            "Database.rows",
            "Database.aged_rows",
            "Database.value",
            "Database.once",
            "Database.done_once",
            "Database.event",
            "Database.ready",
        ),
        *("Database.events_by_external_id", "Database.statistics", "Database.statistics_by", "Database.dead_letters"),
        *("Database.holders", "Database.api_key", "Database.count_api_keys", "Database.list_api_keys"),
        *("Destinations.page", "Destinations.get", "Destinations.governing", "Destinations.forecast"),
        *("Destinations.standstills", "Rejects.page", "Rejects.get"),
    }
    assert methods(Database, Sweeps, Destinations, Rejects) - asking == set(CASES)


async def test_a_change_whose_outcome_cannot_be_learned_is_reported_as_in_doubt(
    settings: MakeSettings, database_url: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.database.pool._TIMEOUT_S", 0.5)
    event_id = client.schedule()
    async with CuttingProxy(database_url) as proxy:
        ours = replace(settings(DATABASE_URL=proxy.url), pool_min_idle=0, pool_max_size=1)
        async with Database(ours, role="test") as database:
            await database.ready()
            proxy.cut_after("keep_answer")
            proxy.refuse()
            with pytest.raises(InDoubt, match="whether it was done is not known"):
                await database.cancel(event_id)
            with pytest.raises(DatabaseUnavailable) as away:
                await database.cancel(event_id)
            assert not isinstance(away.value, InDoubt)
    assert client.column("select result from orchestrator.outcomes") == ["cancelled"]


async def test_a_migration_whose_reply_is_lost_says_that_it_may_have_been_done(empty_database_url: str) -> None:
    async with CuttingProxy(empty_database_url) as proxy:
        proxy.cut_after("COMMIT")
        with pytest.raises(InDoubt, match="run it again, which changes nothing when all is up to date"):
            await asyncio.to_thread(migrate, proxy.url)
        assert (await asyncio.to_thread(migrate, proxy.url)).applied == []


async def test_maintenance_whose_reply_is_lost_says_that_it_may_have_been_done(
    settings: MakeSettings, database_url: str, client: Client
) -> None:
    runs = client.value("select count(*) from orchestrator.maintenance_run")
    async with CuttingProxy(database_url) as proxy:
        proxy.cut_after("run_maintenance")
        with pytest.raises(InDoubt, match="run it again, which is safe"):
            await maintain_once(settings(DATABASE_URL=proxy.url), Retention(None, None, None, None))
    await eventually(lambda: client.value("select count(*) from orchestrator.maintenance_run") == runs + 1)


async def test_kept_answers_are_forgotten_after_ten_minutes(client: Client) -> None:
    client.at(NOON)
    client.rows("select orchestrator.keep_answer('00000000-0000-4000-8000-000000000000', '[{\"n\": 1}]')")
    for minutes, left in ((9, 1), (11, 0)):
        client.at(NOON + timedelta(minutes=minutes))
        client.rows("select orchestrator.run_maintenance()")
        assert client.value("select count(*) from orchestrator.request") == left
