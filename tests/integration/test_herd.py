"""Herds: events that fall due at one instant are claimed before it, whatever happens meanwhile.

And the dispatcher that waits for them: whatever makes an event due sooner wakes it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from orchestrator.database import listening
from orchestrator.dispatch import claim_sizes
from orchestrator.dispatch.attempt import DELIVERED, Attempted
from orchestrator.dispatch.http.sender import Delivery
from tests.conftest import MakeSettings
from tests.support.dispatching import Running, dispatching, finished, soon
from tests.support.sql_client import Client, Lease, event, results
from tests.support.waiting import eventually

LEASED = "select count(*) from orchestrator.timer where lease_until is not null"
LATE = "select max(extract(epoch from started_at - due_at))::float8 from orchestrator.outcome"


class Null:
    """A sender that delivers at once, and remembers when."""

    def __init__(self) -> None:
        self.sent: dict[str, float] = {}

    async def send(self, delivery: Delivery) -> Attempted:
        assert delivery.event_id not in self.sent
        self.sent[delivery.event_id] = time.time()
        return Attempted(DELIVERED, 204)

    async def has_sent(self, event_id: str, timeout_s: float) -> None:
        await eventually(lambda: event_id in self.sent, timeout_s)


def herd(client: Client, count: int, at: datetime, **more: Any) -> list[str]:
    """Events to 50 destinations, due at one instant."""
    made = [event(scheduled_at=at, destination=f"https://herd-{n % 50}.example.com/", **more) for n in range(count)]
    return [str(answer.id) for answer in client.submit(*made)]


async def listens(client: Client, count: int = 1) -> None:
    sessions = "select count(*) from pg_stat_activity where query ~ '^listen ' and datname = current_database()"
    await eventually(lambda: client.value(sessions) == count)


async def holds(running: Running, count: int) -> None:
    await eventually(lambda: running.value("events_held") >= count)


async def test_a_herd_is_held_before_it_is_due_and_none_of_it_starts_early(
    settings: MakeSettings, client: Client
) -> None:
    null, due = Null(), soon(3)
    async with dispatching(settings(), null) as running:
        ids = herd(client, 3000, due)
        await holds(running, 3000)
        assert soon(0) < due
        assert running.value("claim_seconds_count") < 15  # they grow: in hundreds it would take thirty
        await finished(client, ids)
    assert sorted(null.sent) == sorted(ids)
    assert min(null.sent.values()) >= due.timestamp() - 0.001


async def test_a_herd_that_was_submitted_long_ago_is_found_by_looking(
    settings: MakeSettings, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    due = soon(4)
    ids = herd(client, 1500, due)
    async with dispatching(settings(SCHEDULER_POLL_INTERVAL_MS="10000"), Null()) as running:
        await holds(running, 1500)
        assert soon(0) < due
        await finished(client, ids)


async def test_two_dispatchers_share_a_herd(settings: MakeSettings, client: Client) -> None:
    null, due = Null(), soon(4)
    async with dispatching(settings(), null) as one, dispatching(settings(), null) as other:
        await listens(client, 2)
        ids = herd(client, 6000, due)
        await eventually(lambda: one.value("events_held") + other.value("events_held") == 6000)
        assert min(one.value("events_held"), other.value("events_held")) > 500
        await finished(client, ids)
    assert sorted(null.sent) == sorted(ids)


async def test_what_is_due_at_once_is_on_time_beside_a_memory_full_of_a_herd_that_is_not(
    settings: MakeSettings, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_sizes, "MOST_AHEAD", 1000)
    null, due = Null(), soon(4)
    async with dispatching(settings(SCHEDULER_BATCH_SIZE="20", SCHEDULER_LOOKAHEAD_MS="3000"), null) as running:
        await listens(client)
        ids = herd(client, 6000, due)
        await holds(running, 900)
        others = []
        while soon(0.8) < due:
            others.append(client.schedule(scheduled_at=soon(0.1), destination="https://other.example.com/"))
            await null.has_sent(others[-1], 2)
        assert others
        late = client.column(
            "select extract(epoch from started_at - due_at)::float8 from orchestrator.outcome"
            " where event_id = any (%s::uuid[])",
            others,
        )
        assert max(late) < 1
        assert running.value("events_held") <= 4000 + 1000  # two of the largest claims
        await finished(client, ids)
    assert min(null.sent[event_id] for event_id in ids) >= due.timestamp() - 0.001


async def test_payloads_bound_what_is_held_and_all_events_are_delivered(
    settings: MakeSettings, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_sizes, "_MOST_PAYLOAD", 100_000)
    null = Null()
    async with dispatching(settings(SCHEDULER_BATCH_SIZE="10"), null) as running:
        await listens(client)
        ids = herd(client, 400, soon(3), payload={"text": "x" * 1000})
        await holds(running, 60)
        await finished(client, ids)
        assert running.value("claim_seconds_count") > 8
    assert sorted(null.sent) == sorted(ids)


async def test_a_rate_does_not_fill_the_memory_with_slots_far_ahead(settings: MakeSettings, client: Client) -> None:
    client.rows("select orchestrator.configure_destination('herd-0.example.com', p_rate_per_second => 20)")
    null = Null()
    limited = client.schedule_many(2000, scheduled_at=soon(0), destination="https://herd-0.example.com/")
    async with dispatching(settings(), null) as running:
        await listens(client)
        await eventually(lambda: len(null.sent) > 5)
        for _ in range(5):
            assert running.value("events_held") <= 20 * 3.5
            other = client.schedule(scheduled_at=soon(0), destination="https://other.example.com/")
            await null.has_sent(other, 1)
    assert sum(event_id in null.sent for event_id in limited) < 400


async def test_a_pause_of_everything_hands_a_herd_back_and_a_resume_delivers_it_once(
    settings: MakeSettings, client: Client
) -> None:
    null = Null()
    async with dispatching(settings(), null) as running:
        await listens(client)
        ids = herd(client, 5000, soon(3))
        await holds(running, 5000)
        client.rows("select orchestrator.pause_all()")
        await eventually(lambda: running.value("events_released_total") == 5000)
        assert client.value(LEASED) == 0
        assert running.value("events_held") == 0
        client.rows("select orchestrator.resume_all()")
        await finished(client, ids)
    assert sorted(null.sent) == sorted(ids)
    assert client.value("select count(*) from orchestrator.outcome where result = 'delivered'") == 5000


async def test_a_stop_hands_a_herd_back_within_its_timeout(settings: MakeSettings, client: Client) -> None:
    async with dispatching(settings(SHUTDOWN_TIMEOUT_SECONDS="10"), Null()) as running:
        await listens(client)
        herd(client, 5000, soon(4))
        await holds(running, 5000)
        began_s = time.monotonic()
        await running.stop()
        assert time.monotonic() - began_s < 8
    assert client.value(LEASED) == 0


# What wakes a dispatcher that waits for its next poll


async def test_events_of_a_killed_dispatcher_start_when_their_leases_end(
    settings: MakeSettings, client: Client
) -> None:
    ids = herd(client, 20, soon(0))
    leases = client.claim(lease_s=4)
    assert len(leases) == 20
    ends_at = leases[0].lease_until.timestamp()
    null = Null()
    async with dispatching(settings(SCHEDULER_POLL_INTERVAL_MS="10000"), null):
        await finished(client, ids)
    assert ends_at - 0.001 <= min(null.sent.values())
    assert max(null.sent.values()) < ends_at + 1


async def test_it_claims_at_once_when_it_can_listen_again(
    settings: MakeSettings, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "_BACKOFF_S", 0.5)
    connect: Any = vars(listening)["connect"]
    hearing = asyncio.Event()

    async def deaf_at_first(*given: Any) -> Any:
        if not hearing.is_set():
            raise OSError("no listening")
        return await connect(*given)

    monkeypatch.setattr(listening, "connect", deaf_at_first)
    null = Null()
    async with dispatching(settings(SCHEDULER_POLL_INTERVAL_MS="10000"), null) as running:
        looked = running.value("claim_seconds_count")
        await eventually(lambda: client.value("select count(*) from pg_stat_activity where query ~ 'next_lease_end'"))
        event_id = client.schedule(scheduled_at=soon(0), destination="https://herd-0.example.com/")
        hearing.set()
        await null.has_sent(event_id, 4)
        assert running.value("claim_seconds_count") > looked


async def test_without_notifications_it_looks_once_a_second_unless_told_otherwise(
    settings: MakeSettings, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def deaf(*_: Any) -> Any:
        raise OSError("no listening")

    monkeypatch.setattr(listening, "connect", deaf)
    null = Null()
    async with dispatching(settings(), null):
        for _ in range(2):
            event_id = client.schedule(scheduled_at=soon(0), destination="https://herd-0.example.com/")
            await null.has_sent(event_id, 3)


def paused(client: Client) -> None:
    client.rows("select orchestrator.configure_destination('herd-0.example.com')")
    client.rows("select orchestrator.pause_destination('herd-0.example.com')")
    herd(client, 1, soon(0))


def paused_all(client: Client) -> None:
    client.rows("select orchestrator.pause_all()")
    herd(client, 1, soon(0))


def broken(client: Client) -> None:
    client.rows("select orchestrator.configure_destination('herd-0.example.com')")
    herd(client, 1, soon(0))
    client.rows(
        "update orchestrator.lane set breaker = 'open', open_until = now() + interval '1 hour'"
        " where name = 'herd-0.example.com'"
    )


def bounded(client: Client) -> None:
    """Its only slot is taken by another worker."""
    client.rows("select orchestrator.configure_destination('herd-0.example.com', p_max_parallel => 1)")
    client.schedule_many(2, scheduled_at=soon(0), destination="https://herd-0.example.com/")
    assert len(client.claim()) == 1


def ordered(client: Client) -> list[Lease]:
    """The first of a key is with another worker."""
    client.schedule_many(2, scheduled_at=soon(0), destination="https://herd-0.example.com/", ordering_key="a")
    leases = client.claim()
    assert len(leases) == 1
    return leases


def late(client: Client) -> None:
    herd(client, 1, soon(3600))


def dead(client: Client) -> None:
    herd(client, 1, soon(0))
    client.finish(results(client.claim(), "fail"))


def leased(client: Client) -> list[Lease]:
    herd(client, 1, soon(0))
    return client.claim()


def raised(client: Client) -> None:
    client.rows("select orchestrator.configure_destination('herd-0.example.com', p_max_parallel => 2)")


CHANGES: dict[str, tuple[Callable[[Client], Any], Callable[[Client, Any], Any]]] = {
    "submit": (lambda _: None, lambda client, _: herd(client, 1, soon(0))),
    "submit soon": (lambda _: None, lambda client, _: herd(client, 1, soon(5))),
    "resume": (paused, lambda client, _: client.rows("select orchestrator.resume_destination('herd-0.example.com')")),
    "resume all": (paused_all, lambda client, _: client.rows("select orchestrator.resume_all()")),
    "breaker": (broken, lambda client, _: client.rows("select orchestrator.close_breaker('herd-0.example.com')")),
    "limit": (bounded, lambda client, _: raised(client)),
    "ordering": (ordered, lambda client, leases: client.finish(results(leases))),
    "reschedule": (
        late,
        lambda client, _: client.rows(
            "select orchestrator.reschedule_event((select event_id from orchestrator.timer), now())"
        ),
    ),
    "redrive": (
        dead,
        lambda client, _: client.rows("select orchestrator.redrive_event((select id from orchestrator.event))"),
    ),
    "release": (leased, lambda client, leases: client.release(leases)),
}
"""What makes an event due → what comes before, and the change."""


@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_that_makes_an_event_due_wakes_it(settings: MakeSettings, client: Client, change: str) -> None:
    before, makes_due = CHANGES[change]
    made = before(client)
    null = Null()
    async with dispatching(settings(SCHEDULER_POLL_INTERVAL_MS="10000"), null):
        await listens(client)
        assert not null.sent
        began_s = time.monotonic()
        makes_due(client, made)
        await eventually(lambda: null.sent, 8)
        assert time.monotonic() - began_s < 6


async def test_the_backlog_is_counted_beside_claims_and_is_0_when_they_have_met_its_end(
    settings: MakeSettings, client: Client
) -> None:
    ids = herd(client, 400, soon(-1))
    ours = settings(SCHEDULER_BATCH_SIZE="20", SCHEDULER_PREFETCH="40", HTTP_MAX_CONNECTIONS="1")
    async with dispatching(ours, Slow()) as running:
        await eventually(lambda: 0 < running.value("events_backlog") <= 400)
        await finished(client, ids)
        await eventually(lambda: running.value("events_backlog") == 0)


class Slow:
    async def send(self, _delivery: Delivery) -> Attempted:
        await asyncio.sleep(0.005)
        return Attempted(DELIVERED, 204)
