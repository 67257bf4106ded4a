"""Dead letters: listing, redriving and purging them, by filter and at a rate."""

from __future__ import annotations

import itertools
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import psycopg
import pytest

from tests.sql.conftest import Connect
from tests.support.laws import violations
from tests.support.sql_client import NOON, Client, results, seconds
from tests.support.upkeep import maintain

MATCHED = [
    ({"source": "air"}, {"air refused", "air timeout"}),
    ({"destination": "b.example"}, {"land refused"}),
    ({"reason": "REFUSED"}, {"air refused", "land refused"}),
    ({"reason": "%"}, set()),
    ({"died_from": NOON + seconds(60)}, {"air timeout", "land refused"}),
    ({"died_until": NOON + seconds(60)}, {"air refused"}),
    ({"source": "air", "reason": "time", "died_from": NOON}, {"air timeout"}),
    ({"source": "sea"}, set()),
]  # fmt: skip


class Redriven(NamedTuple):
    seen: int
    matched: int
    redriven: int
    examples: list[str]
    next_after: str | None
    next_start_at: datetime


class Purged(NamedTuple):
    seen: int
    matched: int
    purged: int
    examples: list[str]
    next_after: str | None


def filters(
    source: str | None = None,
    destination: str | None = None,
    died_from: datetime | None = None,
    died_until: datetime | None = None,
    reason: str | None = None,
) -> list[Any]:
    return [source, destination, died_from, died_until, reason]


def redrive(
    client: Client,
    rate: float | None = None,
    dry_run: bool = False,
    limit: int | None = 10000,
    after: str | None = None,
    start_at: datetime | None = None,
    **given: Any,
) -> Redriven:
    [row] = client.rows(
        "select * from orchestrator.redrive_dead_letters(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
        *filters(**given), rate, dry_run, limit, after, start_at,
    )  # fmt: skip
    seen, matched, redriven, examples, next_after, next_start_at = row
    return Redriven(
        seen, matched, redriven, [str(uid) for uid in examples], next_after and str(next_after), next_start_at
    )


def purge(
    client: Client, dry_run: bool = False, limit: int | None = 10000, after: str | None = None, **given: Any
) -> Purged:
    [row] = client.rows(
        "select * from orchestrator.purge_dead_letters(%s, %s, %s, %s, %s, %s, %s, %s)",
        *filters(**given), dry_run, limit, after,
    )  # fmt: skip
    seen, matched, purged, examples, next_after = row
    return Purged(seen, matched, purged, [str(uid) for uid in examples], next_after and str(next_after))


def die(client: Client, error: str = "refused", **changes: Any) -> str:
    uid = client.schedule(**changes)
    [lease] = client.claim_on()
    client.finish(results([lease], "fail", error=error))
    return uid


def dead(client: Client) -> set[str]:
    return {str(uid) for uid in client.column("select event_id from orchestrator.dead_letter")}


def three(client: Client) -> dict[str, str]:
    """Dead letters by their source and reason, a minute apart."""
    ids = {"air refused": die(client, "Connection refused", source="air", destination="https://a.example/")}
    client.at(NOON + seconds(60))
    ids["air timeout"] = die(client, "timeout", source="air", destination="https://a.example/")
    ids["land refused"] = die(client, "refused: 409", source="land", destination="https://b.example/")
    return ids


@pytest.mark.parametrize(("given", "wanted"), MATCHED)
def test_a_filter_lists_redrives_and_purges_the_same(client: Client, given: dict[str, Any], wanted: set[str]) -> None:
    ids = three(client)
    expected = {ids[name] for name in wanted}
    shown = client.column(
        "select orchestrator.list_dead_letters(100, null, null, %s, %s, %s, %s, %s)", *filters(**given)
    )
    assert {row["id"] for row in shown} == expected
    for dry in (redrive(client, dry_run=True, **given), purge(client, dry_run=True, **given)):
        assert (dry.seen, dry.matched, dry[2], set(dry.examples)) == (3, len(expected), 0, expected)
    assert dead(client) == set(ids.values())
    told = redrive(client, **given)
    assert (told.matched, told.redriven, told.next_after) == (len(expected), len(expected), None)
    assert dead(client) == set(ids.values()) - expected
    assert {lease.event_id for lease in client.claim_on()} == expected
    assert violations(client.connection) == []


def test_a_listed_dead_letter_names_its_destination(client: Client) -> None:
    uid = die(client, destination="https://A.example:443/x?y", external_job_id="j")
    [shown] = client.column("select orchestrator.list_dead_letters()")
    assert shown == {
        "id": uid,
        "died_at": NOON.isoformat(),
        "attempts": 1,
        "reason": "refused",
        "source": "tests",
        "external_job_id": "j",
        "scheduled_at": NOON.isoformat(),
        "delivery_type": "HTTP",
        "destination": "https://A.example:443/x?y",
        "destination_name": "a.example",
    }


# Redriving


def test_redriven_events_have_fresh_attempts_and_keep_their_history(client: Client) -> None:
    uid = client.schedule(max_retries=1)
    for hour in range(2):
        client.at(NOON + timedelta(hours=hour))
        client.finish(results(client.claim(), "retry", error=f"error {hour}"))
    client.at(NOON + timedelta(hours=3))
    assert redrive(client).redriven == 1
    shown = client.get(uid)
    assert (shown["status"], shown["attempt"], shown["due_at"]) == (
        "retrying", 2, (NOON + timedelta(hours=3)).isoformat(),
    )  # fmt: skip
    for hour in range(4, 6):
        [lease] = client.claim()
        client.finish(results([lease], "retry"))
        client.at(NOON + timedelta(hours=hour))
    assert client.outcomes(uid) == [(1, "retried"), (2, "dead"), (2, "redriven"), (3, "retried"), (4, "dead")]
    assert client.totals() == {"accepted": 1, "retried": 2, "dead": 2, "redriven": 1}
    statistics = client.statistics()
    assert (statistics["live"], statistics["retrying"], statistics["dead_letters"]) == (0, 0, 1)
    assert violations(client.connection, acknowledged=[uid]) == []


@pytest.mark.parametrize("limit", [3, 4, 10000])
def test_a_rate_spaces_redriven_events_across_calls(client: Client, limit: int) -> None:
    ids = client.schedule_many(10)
    client.finish(results(client.claim(), "fail"))
    client.at(NOON + seconds(60))
    told = [redrive(client, rate=4, limit=limit)]
    while told[-1].next_after:
        client.at(NOON + seconds(60.2 + len(told) / 10))  # the walk takes its time, which the plan does not feel
        told.append(redrive(client, rate=4, limit=limit, after=told[-1].next_after, start_at=told[-1].next_start_at))
    assert sum(one.redriven for one in told) == 10
    assert told[-1].next_start_at == NOON + seconds(62.5)
    due: dict[str, datetime] = dict(client.rows("select event_id::text, due_at from orchestrator.timer"))
    assert [due[uid] for uid in sorted(ids)] == [NOON + seconds(60 + n / 4) for n in range(10)]


def test_a_start_in_the_past_is_now(client: Client) -> None:
    die(client)
    client.at(NOON + timedelta(hours=1))
    told = redrive(client, rate=0.5, start_at=NOON)
    assert client.column("select due_at from orchestrator.timer") == [NOON + timedelta(hours=1)]
    assert told.next_start_at == NOON + timedelta(hours=1, seconds=2)


def test_redriven_events_go_through_the_limits_of_their_destination(client: Client) -> None:
    client.schedule_many(10)
    client.finish(results(client.claim(), "fail"))
    client.rows("select orchestrator.configure_destination('receiver.example', p_max_parallel => 3)")
    assert redrive(client).redriven == 10
    assert len(client.claim_on()) == 3


def test_redriven_events_keep_their_place_in_their_ordering_key(client: Client) -> None:
    first = die(client, ordering_key="k")
    second = client.schedule(ordering_key="k", scheduled_at=NOON + seconds(1))
    redrive(client)
    client.at(NOON + seconds(1))
    leases = client.claim_on()
    assert [lease.event_id for lease in leases] == [first]
    client.finish(results(leases))
    assert [lease.event_id for lease in client.claim_on()] == [second]


def test_a_redriven_event_that_blocked_its_ordering_key_is_the_first_again(client: Client) -> None:
    client.rows("insert into orchestrator.retry_policy (name, dead_blocks) values ('strict', true)")
    keyed: dict[str, Any] = {"ordering_key": "k", "retry_policy": "strict"}
    first = die(client, **keyed)
    second = client.schedule(scheduled_at=NOON + seconds(1), **keyed)
    client.at(NOON + seconds(1))
    assert client.claim_on() == []
    redrive(client)
    leases = client.claim_on()
    assert [lease.event_id for lease in leases] == [first]
    client.finish(results(leases))
    assert [lease.event_id for lease in client.claim_on()] == [second]


def test_an_event_that_would_expire_before_its_redrive_stays_dead(client: Client) -> None:
    ids = [die(client, scheduled_at=NOON, expires_at=(NOON + seconds(120 + n)).isoformat()) for n in (0, 5)]
    client.at(NOON + seconds(115))
    told = redrive(client, rate=0.1)  # due at 115 and 125 s
    assert (told.matched, told.redriven) == (2, 1)
    assert sorted(client.status(uid) for uid in ids) == ["dead", "retrying"]
    client.at(NOON + seconds(125))
    [left] = dead(client)
    assert client.rows("select result, status from orchestrator.redrive_event(%s)", left) == [("expired", "dead")]
    assert redrive(client).redriven == 0
    assert client.statistics()["dead_letters"] == 1


def test_sessions_that_redrive_at_once_redrive_each_event_once(connect: Connect, threads: Any) -> None:
    clients = [connect() for _ in range(4)]
    clients[0].schedule_many(40)
    clients[0].finish(results(clients[0].claim(), "fail"))
    told = list(threads.map(lambda n: redrive(clients[n]), range(4)))
    assert sum(one.redriven for one in told) == 40
    assert clients[0].totals()["redriven"] == 40
    assert len(clients[0].claim_on()) == 40
    assert violations(clients[0].connection) == []


def test_a_rate_of_redriving_out_of_bounds_is_refused(client: Client) -> None:
    die(client)
    expected = "p_rate: expected more than 0 and at most 1000000"
    for rate in (0, -1, float("nan"), float("inf"), 1e7):
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=expected):
            redrive(client, rate=rate)
    assert len(dead(client)) == 1


def test_dispatchers_are_notified_of_redriven_events(connect: Connect) -> None:
    client, listener = connect(), connect()
    die(client)
    listener.rows("listen orchestrator_due")
    redrive(client)
    [told] = listener.connection.notifies(timeout=5, stop_after=1)
    assert float(told.payload) == NOON.timestamp()


# Purging


def test_purged_events_stay_and_cannot_be_redriven(client: Client) -> None:
    uid = die(client)
    assert purge(client, source="tests") == Purged(1, 1, 1, [uid], None)
    assert client.status(uid) == "dead"
    assert client.rows("select result, status from orchestrator.redrive_event(%s)", uid) == [("purged", "dead")]
    assert redrive(client).redriven == 0
    assert client.column("select orchestrator.list_dead_letters()") == []
    assert client.totals() == {"accepted": 1, "dead": 1, "purged": 1}
    assert (client.statistics()["live"], client.statistics()["dead_letters"]) == (0, 0)
    maintain(client)
    assert client.totals()["purged"] == 1


def test_purging_lets_the_ordering_key_go(client: Client) -> None:
    client.rows("insert into orchestrator.retry_policy (name, dead_blocks) values ('strict', true)")
    die(client, ordering_key="k", retry_policy="strict")
    behind = client.schedule(ordering_key="k")
    assert client.claim_on() == []
    purge(client, reason="refused")
    assert [lease.event_id for lease in client.claim_on()] == [behind]


@pytest.mark.parametrize("limit", [1, 4, 10000])
def test_a_walk_purges_all_matching_dead_letters_in_bounded_steps(client: Client, limit: int) -> None:
    client.schedule_many(7, source="air")
    client.schedule_many(4, source="land")
    client.finish(results(client.claim(), "fail"))
    told = [purge(client, source="air", limit=limit)]
    while told[-1].next_after:
        told.append(purge(client, source="air", limit=limit, after=told[-1].next_after))
    assert sum(one.purged for one in told) == 7
    assert max(one.seen for one in told) <= limit
    assert len(dead(client)) == 4


def test_purging_all_dead_letters_needs_a_filter_that_says_so(client: Client) -> None:
    die(client)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=r"^purge_dead_letters: give p_source"):
        purge(client)
    assert purge(client, died_until=NOON + seconds(1)).purged == 1


def test_a_limit_of_redriving_or_purging_out_of_bounds_is_refused(client: Client) -> None:
    for call, limit in itertools.product((redrive, purge), (0, 100_001, None)):
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_limit: expected 1 to 100000"):
            call(client, source="air", limit=limit)
