"""One destination's trouble is not another's: slow and hanging receivers, and what is put on hold."""

from __future__ import annotations

import asyncio
import itertools
import math
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from orchestrator.database import Claims, Leases
from orchestrator.dispatch import dispatcher as module
from orchestrator.events.destination_name import destination_name
from orchestrator.settings import Settings
from tests.conftest import MakeSettings
from tests.integration.test_dispatcher import Gate
from tests.support.brokers import Kafka
from tests.support.dispatching import arrivals, assert_laws, dispatching, finished, soon, statuses
from tests.support.receiver import HANG, Answer, Receiver
from tests.support.sql_client import Client, event
from tests.support.topics import records
from tests.support.waiting import eventually

FEW = {"HTTP_MAX_CONNECTIONS": "20", "SCHEDULER_BATCH_SIZE": "50", "SCHEDULER_PREFETCH": "400"}
LEASED = "select count(*) from orchestrator.timer where lease_until is not null and event_id = any (%s::uuid[])"


@pytest.fixture
async def gate() -> Gate:
    return Gate()


def spread(client: Client, url: str, count: int, seconds: float) -> list[str]:
    """Events that fall due one after the other, from now on."""
    return [
        str(answer.id)
        for answer in client.submit(
            *[event(scheduled_at=soon(0.2 + n * seconds / count), destination=url) for n in range(count)]
        )
    ]


def lane(client: Client, url: str) -> int:
    return int(client.value("select orchestrator.lane_for(orchestrator.destination_name('HTTP', %s))", url))


@asynccontextmanager
async def receiver_in_lane_of(client: Client, other: Receiver) -> AsyncIterator[Receiver]:
    """Another receiver, whose destination shares its lane."""
    ports = client.column(
        """select p from generate_series(10000, 32000) p
        where orchestrator.lane_for('127.0.0.1:' || p) = %s and p <> %s order by random()""",
        lane(client, other.url()),
        other.port,
    )
    receiver = Receiver()
    for receiver.port in ports:
        with suppress(OSError), socket.create_server(("127.0.0.1", receiver.port)):
            break  # it is free
    async with receiver:
        yield receiver


@pytest.mark.parametrize("batch", [50, 200])
async def test_a_destination_that_hangs_does_not_stop_others_not_even_in_its_lane(
    settings: MakeSettings, client: Client, receiver: Receiver, batch: int
) -> None:
    """With batches of half the memory, none of it can be kept for what hangs."""
    hanging = receiver.script("/hanging", HANG)
    async with Receiver() as elsewhere, receiver_in_lane_of(client, receiver) as beside:
        stuck = client.schedule_many(1000, scheduled_at=soon(0), destination=hanging)
        ours = settings(**FEW | {"SCHEDULER_BATCH_SIZE": str(batch)}, SHUTDOWN_TIMEOUT_SECONDS="0.5")
        async with dispatching(ours) as running:
            others = spread(client, elsewhere.url(), 200, 4) + spread(client, beside.url(), 200, 4)
            await finished(client, others)
            assert len(receiver.requests) == 2  # its window, a tenth of the connections
            await eventually(lambda: client.value(LEASED, stuck) == 2)
            assert running.value("events_claimed_total") < len(others) + 2 * len(stuck)
            assert lane(client, hanging) >= 64
        assert arrivals(elsewhere.requests + beside.requests) == dict.fromkeys(others, 1)
        late = client.column(
            """select extract(epoch from started_at - due_at)::float8 from orchestrator.outcomes
            where event_id = any (%s::uuid[]) order by 1""",
            others,
        )
        assert late[len(late) // 2] < 0.2
        assert late[-1] < 2.0


async def test_deliveries_to_kafka_go_on_while_a_webhook_hangs(
    settings: MakeSettings, client: Client, receiver: Receiver, kafka: Kafka
) -> None:
    topic = kafka.unique("beside")
    await kafka.create_topic(topic, 1)
    stuck = client.schedule_many(1000, scheduled_at=soon(0), destination=receiver.script("/hanging", HANG))
    made = [event(delivery_type="KAFKA", destination=topic, scheduled_at=soon(2)) for _ in range(300)]
    others = [str(answer.id) for answer in client.submit(*made)]
    async with dispatching(settings(**FEW, **kafka.environ, SHUTDOWN_TIMEOUT_SECONDS="0.5")):
        await finished(client, others)
        await eventually(lambda: client.value(LEASED, stuck) == 2)
    assert len(await records(kafka.servers, topic)) == 300


async def test_events_of_a_hanging_destination_are_delivered_once_it_answers_again(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    url = receiver.script("/hooks", HANG, HANG, Answer(204))
    client.rows("insert into orchestrator.retry_policy (name, schedule, jitter) values ('quick', '{100 ms}', 0)")
    ids = client.schedule_many(300, scheduled_at=soon(0), destination=url, retry_policy="quick")
    async with dispatching(settings(**FEW, HTTP_TIMEOUT_SECONDS="2")) as running:
        await eventually(lambda: running.value("events_released_total") > 0)
        began_s = time.monotonic()
        await finished(client, ids)
        assert time.monotonic() - began_s < 8
    assert statuses(client, ids) == {"delivered": 300}
    assert_laws(client, receiver.requests, ids)


async def test_a_slow_destination_gets_as_many_events_as_its_window_takes_and_no_claim_in_vain(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    url = receiver.script("/slow", Answer(204, delay_s=1.1))
    ids = client.schedule_many(60, scheduled_at=soon(0), destination=url)
    began_s = time.monotonic()
    async with dispatching(settings(**FEW | {"HTTP_MAX_CONNECTIONS": "100"})) as running:
        await finished(client, ids, 30)
        assert time.monotonic() - began_s < 60 / 10 * 1.1 + 5  # ten at a time
        assert running.value("events_claimed_total") < 10 * len(ids)
    assert arrivals(receiver.requests) == dict.fromkeys(ids, 1)


async def test_a_lone_quick_destination_soon_has_nearly_all_connections(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    url = receiver.script("/hooks", *[Answer(204, delay_s=0.02)] * 200, HANG)
    client.schedule_many(400, scheduled_at=soon(0), destination=url)
    async with dispatching(settings(**FEW, SHUTDOWN_TIMEOUT_SECONDS="0.5")) as running:
        await receiver.wait_for(218)
        assert running.value("events_in_flight") == 18


async def test_the_bound_of_the_deployment_bounds_each_window(
    settings: MakeSettings, client: Client, gate: Gate
) -> None:
    ids = client.schedule_many(20, scheduled_at=soon(0))
    async with dispatching(settings(CUSTOMER_MAX_PARALLEL="3"), gate) as running:
        await eventually(lambda: gate.running == 3)
        gate.open()
        await finished(client, ids)
    assert gate.most == 3
    assert running.value("events_delivered_total") == 20


async def test_a_pause_hands_held_events_back_and_a_resume_lets_them_go(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    async with Receiver() as other, dispatching(settings()) as running:
        client.rows("select orchestrator.configure_destination(%s)", f"127.0.0.1:{receiver.port}")
        paused = client.schedule_many(50, scheduled_at=soon(1.2), destination=receiver.url())
        rest = client.schedule_many(5, scheduled_at=soon(1.2), destination=other.url())
        await eventually(lambda: running.value("events_held") == 55)
        client.rows("select orchestrator.pause_destination(%s)", f"127.0.0.1:{receiver.port}")
        await eventually(lambda: client.value(LEASED, paused) == 0)
        await finished(client, rest)
        assert receiver.requests == []
        client.rows("select orchestrator.resume_destination(%s)", f"127.0.0.1:{receiver.port}")
        await finished(client, paused)
    assert arrivals(receiver.requests) == dict.fromkeys(paused, 1)
    assert_laws(client, receiver.requests + other.requests, paused + rest)


async def test_pausing_everything_hands_all_held_events_back(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    async with dispatching(settings()) as running:
        ids = client.schedule_many(50, scheduled_at=soon(1.2), destination=receiver.url())
        await eventually(lambda: running.value("events_held") == 50)
        client.rows("select orchestrator.pause_all()")
        await eventually(lambda: client.value(LEASED, ids) == 0)
        await eventually(lambda: client.value("select now() > max(due_at) from orchestrator.timer"))
        client.rows("select orchestrator.resume_all()")
        await finished(client, ids)
        resumed_at = client.value("select extract(epoch from resumed_at)::float8 from orchestrator.control")
        assert receiver.requests[0].arrived_at >= resumed_at - 0.01
    assert arrivals(receiver.requests) == dict.fromkeys(ids, 1)


async def test_events_of_a_claim_that_was_under_way_at_a_hold_are_handed_back(
    settings: MakeSettings, client: Client, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    notify: list[Callable[[str], None]] = []

    async def listen(_settings: Settings, _channel: str, on_notified: Callable[[str], None], *_: object) -> None:
        notify.append(on_notified)
        await asyncio.Event().wait()

    claim = Leases.claim

    async def held_meanwhile(leases: Leases, batch: int, **more: Any) -> Claims:
        claims = await claim(leases, batch, **more)
        if claims.events and notify:
            notify.pop()(f"hold {claims.events[0].lane}")
        return claims

    monkeypatch.setattr(module, "listen", listen)
    monkeypatch.setattr(Leases, "claim", held_meanwhile)
    ids = client.schedule_many(20, scheduled_at=soon(0), destination=receiver.url())
    async with dispatching(settings()) as running:
        await finished(client, ids)
        assert running.value("events_released_total") == 20
        assert running.value("events_claimed_total") == 40
    assert arrivals(receiver.requests) == dict.fromkeys(ids, 1)


async def test_events_for_kafka_are_handed_back_as_well(settings: MakeSettings, client: Client, kafka: Kafka) -> None:
    topic = kafka.unique("paused")
    await kafka.create_topic(topic, 1)
    async with dispatching(settings(**kafka.environ)) as running:
        made = [event(delivery_type="KAFKA", destination=topic, scheduled_at=soon(1.2)) for _ in range(20)]
        ids = [str(answer.id) for answer in client.submit(*made)]
        await eventually(lambda: running.value("events_held") == 20)
        client.rows("select orchestrator.recall_lane(null)")
        await eventually(lambda: running.value("events_released_total") == 20)
        await finished(client, ids)
    assert len(await records(kafka.servers, topic)) == 20


async def test_holds_of_lanes_that_do_not_exist_do_no_harm(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    async with dispatching(settings()) as running:
        for payload in ("hold 99", "hold -1", "hold", "hold ", "hold x", "hold 1e9", "hold **", "hold 1 2"):
            client.rows("select pg_notify('orchestrator_due', %s)", payload)
        await finished(client, [client.schedule(scheduled_at=soon(0.2), destination=receiver.url())])
        assert not running.task.done()


async def test_a_slot_of_a_rate_that_passed_is_given_back_and_another_one_used(
    settings: MakeSettings, client: Client, gate: Gate
) -> None:
    client.rows("select orchestrator.configure_destination('slow.example.com', p_rate_per_second => 100, p_burst => 5)")
    ids = client.schedule_many(3, scheduled_at=soon(0), destination="https://slow.example.com/")
    async with dispatching(settings(HTTP_MAX_CONNECTIONS="1"), gate) as running:
        await eventually(lambda: gate.running == 1 and running.value("events_held") == 2)
        # Leased for the look-ahead and 60 s, when they might have started.
        left = "select extract(epoch from max(lease_until) - clock_timestamp())::float8 from orchestrator.timer"
        await eventually(lambda: client.value(left) < 61.6)  # half a second too late, whatever its clock lags
        gate.open()
        await finished(client, ids)
        assert running.value("event_slots_missed_total") == 2
    assert statuses(client, ids) == {"delivered": 3}
    assert client.value("select max(attempt) from orchestrator.outcomes") == 2  # the lease of the slot missed was one


async def test_a_bounded_destination_is_served_without_waiting_for_polls(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    client.rows("select orchestrator.configure_destination(%s, p_max_parallel => 1)", f"127.0.0.1:{receiver.port}")
    ids = client.schedule_many(40, scheduled_at=soon(0), destination=receiver.url())
    began_s = time.monotonic()
    async with dispatching(settings(SCHEDULER_POLL_INTERVAL_MS="10000")):
        await finished(client, ids)
    assert time.monotonic() - began_s < 8
    spans = client.rows("select started_at, finished_at from orchestrator.outcomes order by started_at")
    assert all(later[0] >= earlier[1] for earlier, later in itertools.pairwise(spans))


async def test_a_rate_is_used_fully_without_waiting_for_polls(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    client.rows("select orchestrator.configure_destination(%s, p_rate_per_second => 20)", f"127.0.0.1:{receiver.port}")
    ids = client.schedule_many(60, scheduled_at=soon(0), destination=receiver.url())
    async with dispatching(settings(SCHEDULER_POLL_INTERVAL_MS="10000")):
        await finished(client, ids)
    times = sorted(request.arrived_at for request in receiver.requests)
    assert len(times) == 60
    assert math.isclose(times[-1] - times[0], 59 / 20, rel_tol=0.2)


async def test_a_destination_has_the_name_that_the_database_gives_it(client: Client) -> None:
    urls = [
        f"{scheme}://{host}{port}{rest}"
        for scheme in ("http", "https")
        for host in ("Example.COM", "127.0.0.1", "[::1]", "[2001:DB8::80]", "a.b-c.example")
        for port in ("", ":80", ":443", ":8443", ":4430", ":1080")
        for rest in ("", "/", "/Path:80?x", "?Q=1:443", "/a/b//c")
    ]
    told = client.column("select orchestrator.destination_name('HTTP', u) from unnest(%s::text[]) u", urls)
    assert [destination_name("HTTP", url) for url in urls] == told
    for topic in (None, "Orders.v1"):
        named = client.value("select orchestrator.destination_name('KAFKA', %s)", topic)
        assert destination_name("KAFKA", topic) == named
