"""The laws that every history must keep, whatever was killed, paused or repeated on the way.

`violations` reads only the tables and calls no function of the product: it must not share their mistakes. The laws have
the numbers of the design. Law 5 is about ingestion from Kafka: `assert_exact` of tests/support/ingesting.py.

1. Every acknowledged submission either has exactly one end or still waits, and none vanishes. It is kept in one place,
   event or horizon. A rescheduled event and its successor name each other.
2. No event has more attempts than its max_retries + 1; each redrive allows the same number again.
3. No attempt starts before the event is due, and the first attempt is due by the end of the spread.
4. No attempt starts after the event was cancelled, rescheduled or had expired.
6. No attempt has two outcomes, and each outcome belongs to a lease that was given.
7. An event waits for other events of its ordering key only while one of them must go first.
8. Every waiting event is where claims look for it, not below a floor. An event counted as under way is leased.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString, NamedTuple

import psycopg


class Arrival(NamedTuple):
    """An attempt as its receiver saw it."""

    event_id: str
    attempt: int
    at: datetime


_OUTCOMES: LiteralString = """
with outcome as (
  select event_id, scheduled_at, due_at, started_at, finished_at, worker, attempt, result, successor
  from orchestrator.outcome
  union all
  select b.ids[n], uuid_extract_timestamp(b.ids[n]) + make_interval(secs => coalesce(b.scheduled_us[n], 0) / 1e6)
    , b.due_at + make_interval(secs => coalesce(b.due_us[n], 0) / 1e6)
    , b.claimed_at + make_interval(secs => b.started_us[n] / 1e6)
    , b.claimed_at + make_interval(secs => b.finished_us[n] / 1e6), b.worker, 1, 'delivered', null
  from orchestrator.delivered_batch b cross join lateral generate_series(1, cardinality(b.ids)) n)
"""
"""Every outcome, one a row: the queries below begin with it."""

_LAWS: Sequence[tuple[str, LiteralString]] = (
    (
        "law 1: event {} has {} timers and {} ends, {} of them redriven; expected one of either",
        """select id, timers, ends, redriven
        from (
          select e.id, count(distinct t.event_id) as timers, count(*) filter (where o.result = 'redriven') as redriven
            , count(*) filter (where o.result in ('delivered', 'dead', 'cancelled', 'rescheduled', 'expired')) as ends
          from orchestrator.event e
          left join orchestrator.timer t on t.event_id = e.id
          left join outcome o on o.event_id = e.id
          group by e.id) n
        where timers + ends - redriven <> 1""",
    ),
    (
        "law 1: event {} is in event and in horizon",
        "select id from orchestrator.event join orchestrator.horizon using (id, scheduled_at)",
    ),
    (
        "law 1: event {} was rescheduled to {}, which does not come from it",
        """select r.id, r.successor
        from (
          select event_id as id, successor from outcome where result = 'rescheduled'
          union all select id, successor from orchestrator.horizon where ended_as = 'rescheduled') r
        where not exists (select from orchestrator.event n where n.id = r.successor and n.predecessor = r.id)
          and not exists (select from orchestrator.horizon n where n.id = r.successor and n.predecessor = r.id)
          -- unless its day is past retention
          and to_char(uuid_extract_timestamp(r.successor) at time zone 'UTC', 'YYYYMMDD') in (
            select right(c.relname, 8) from pg_inherits i join pg_class c on c.oid = i.inhrelid
            where i.inhparent = 'orchestrator.event'::regclass)""",
    ),
    (
        "law 1: event {} comes from {}, which was not rescheduled to it",
        """select n.id, n.predecessor
        from (
          select id, predecessor from orchestrator.event union all select id, predecessor from orchestrator.horizon) n
        where n.predecessor is not null
          and not exists (
            select from outcome o where o.event_id = n.predecessor and o.successor = n.id)
          and not exists (
            select from orchestrator.horizon h where h.id = n.predecessor and h.successor = n.id)
          and to_char(uuid_extract_timestamp(n.predecessor) at time zone 'UTC', 'YYYYMMDD') in (
            select right(c.relname, 8) from pg_inherits i join pg_class c on c.oid = i.inhrelid
            where i.inhparent = 'orchestrator.outcome'::regclass)""",
    ),
    (
        "law 1: timer {} belongs to no event",
        """select t.event_id from orchestrator.timer t
        where not exists (
          select from orchestrator.event e where e.id = t.event_id and e.scheduled_at = t.scheduled_at)""",
    ),
    (
        "law 1: an outcome of {} belongs to no event",
        """select o.event_id from outcome o
        where not exists (
          select from orchestrator.event e where e.id = o.event_id and e.scheduled_at = o.scheduled_at)""",
    ),
    (
        "law 1: event {} is shown as {}",
        "select id, status from orchestrator.event_status where status = 'lost'",
    ),
    (
        "law 1: the outcome dead and the dead letter of event {} disagree",
        """select coalesce(o.event_id, d.event_id) from orchestrator.dead_letter d
        full join (
          select event_id, attempt from outcome where result = 'dead'
          except select event_id, attempt from outcome where result = 'redriven') o using (event_id)
        where o.event_id is null or d.event_id is null or o.attempt <> d.attempts""",
    ),
    (
        "law 2: event {} has {} attempts; its max_retries is {}",
        """select e.id, count(*), e.max_retries from orchestrator.event e
        join outcome o on o.event_id = e.id and o.result not in ('cancelled', 'rescheduled', 'expired')
        group by e.id, e.max_retries
        having count(*) filter (where o.result <> 'redriven')
          > (e.max_retries + 1) * (1 + count(*) filter (where o.result = 'redriven'))""",
    ),
    (
        "law 3: attempt {1} of event {0} started at {2}, {3} before it was due",
        """select o.event_id, o.attempt, o.started_at, greatest(o.due_at, e.scheduled_at) - o.started_at
        from outcome o join orchestrator.event e on e.id = o.event_id
        where o.started_at < greatest(o.due_at, e.scheduled_at)""",
    ),
    (
        "law 3: event {} is due at {}, before its time {}",
        "select event_id, due_at, scheduled_at from orchestrator.timer where due_at < scheduled_at",
    ),
    (
        "law 3: event {} is due at {}, after its time and the whole of its spread",
        """select t.event_id, t.due_at from orchestrator.timer t join orchestrator.event e on e.id = t.event_id
        where t.attempt = 0 and e.spread is not null
          and t.due_at > greatest(e.created_at, e.scheduled_at + e.spread)""",
    ),
    (
        "law 4: attempt {1} of event {0} was made after it was {2}",
        """select o.event_id, o.attempt, c.result
        from outcome o join outcome c using (event_id)
        where c.result in ('cancelled', 'rescheduled', 'expired') and o.attempt > c.attempt""",
    ),
    (
        "law 6: attempt {1} of event {0} has {2} outcomes",
        """select event_id, attempt, count(*) from outcome
        where result not in ('cancelled', 'rescheduled', 'expired', 'redriven')
        group by 1, 2 having count(*) > 1""",
    ),
    (
        "law 6: event {} has an outcome of attempt {} after its end",
        """select o.event_id, o.attempt from outcome o join outcome e using (event_id)
        where e.result in ('delivered', 'dead') and o.result <> 'redriven'
          and (o.attempt > e.attempt or o.attempt = e.attempt and o.result <> e.result)
          and not exists (
            select from outcome r
            where r.event_id = e.event_id and r.attempt = e.attempt and r.result = 'redriven')""",
    ),
    (
        "law 6: event {} has an outcome of attempt {}, and only {} leases were given",
        """select o.event_id, o.attempt, t.attempt
        from outcome o join orchestrator.timer t using (event_id)
        where o.attempt > t.attempt
          or o.attempt = t.attempt and o.result <> 'redriven' and t.lease_until is not null""",
    ),
    (
        "law 7: event {} waits for other events of its ordering key, and none of them must go first",
        """select t.event_id from orchestrator.timer t
        where t.lane < 0
          and not exists (
            select from orchestrator.timer b
            where b.ordering = t.ordering and b.event_id <> t.event_id
              and ((b.scheduled_at, b.event_id) < (t.scheduled_at, t.event_id) or b.lane >= 0))
          and not exists (select from orchestrator.dead_letter d where d.blocks = t.ordering)""",
    ),
    (
        "law 8: event {} waits in lane {} with priority {}, where no claim looks",
        """select t.event_id, t.lane, t.priority from orchestrator.timer t cross join orchestrator.control c
        where t.lane not in (
            select l.lane from orchestrator.lane l union all select -1 - l.lane from orchestrator.lane l)
          or t.lane < 0 and t.ordering is null or t.priority <> all (c.priorities)""",
    ),
    (
        "law 8: event {} is due at {}, below the floor of lane {}",
        """select t.event_id, t.due_at, t.lane from orchestrator.timer t cross join orchestrator.control c
        join orchestrator.lane l on t.lane in (l.lane, -1 - l.lane)
        where c.rerouted_by is null
          and t.due_at < case when l.lane < 64 then c.floors[l.lane + 1] else greatest(l.floor, c.own_floor) end""",
    ),
    (
        "law 8: event {} is counted as under way in lane {} or for key {}, and is not leased",
        """select event_id, slot, busy from orchestrator.timer
        where coalesce(slot, busy) is not null and lease_until is null or busy <> ordering""",
    ),
)

_LAWS_OF_TIME: Sequence[tuple[str, LiteralString]] = (
    (
        "law 4: attempt {1} of event {0} started after it was {2}",
        """select o.event_id, o.attempt, c.result
        from outcome o join outcome c using (event_id)
        where c.result in ('cancelled', 'rescheduled', 'expired') and o.started_at > c.finished_at""",
    ),
)
"""These laws compare times of different calls: they hold only while the clock goes forward."""


def violations(
    connection: psycopg.Connection[Any],
    *,
    acknowledged: Iterable[str] = (),
    arrivals: Sequence[Arrival] | None = None,
    finished: bool = False,
    clock_slack: timedelta = timedelta(0),
    clock_goes_forward: bool = True,
) -> list[str]:
    """A sentence for each breach of a law; empty when every law holds.

    `acknowledged` ids must all exist. `arrivals` are all requests that reached the receivers; their clock may differ
    from the clock of the database by `clock_slack`. With `finished`, no event may still wait.
    """
    laws = [*_LAWS, *_LAWS_OF_TIME] if clock_goes_forward else _LAWS
    found = [law.format(*row) for law, query in laws for row in connection.execute(_OUTCOMES + query).fetchall()]
    kept = {
        str(uid)
        for (uid,) in connection.execute(
            "select id from orchestrator.event union all select id from orchestrator.horizon"
        ).fetchall()
    }
    found += [f"law 1: event {uid} was acknowledged and does not exist" for uid in acknowledged if str(uid) not in kept]
    if finished:
        waiting = connection.execute(
            """select event_id from orchestrator.timer
            union all select id from orchestrator.horizon where ended_at is null"""
        ).fetchall()
        found += [f"law 1: event {uid} has come to no end" for (uid,) in waiting]
    if arrivals is not None:
        found += _of_arrivals(connection, arrivals, clock_slack)
    return found


def _of_arrivals(connection: psycopg.Connection[Any], arrivals: Sequence[Arrival], slack: timedelta) -> list[str]:
    scheduled = {
        str(uid): (at, retries)
        for uid, at, retries in connection.execute(
            "select id, scheduled_at, max_retries from orchestrator.event"
        ).fetchall()
    }
    ends = {
        str(uid): (result, at)
        for uid, result, at in connection.execute(
            _OUTCOMES
            + """select event_id, result, finished_at from outcome
            where result in ('delivered', 'cancelled', 'rescheduled', 'expired')"""
        ).fetchall()
    }
    found = []
    seen: set[tuple[str, int]] = set()
    for arrival in arrivals:
        if arrival.event_id not in scheduled:
            found.append(f"law 1: {arrival.event_id} arrived, which was never submitted")
            continue
        due_at, _ = scheduled[arrival.event_id]
        if arrival.at < due_at - slack:
            found.append(f"law 3: {arrival.event_id} arrived {due_at - arrival.at} early")
        if (arrival.event_id, arrival.attempt) in seen:
            found.append(f"law 6: attempt {arrival.attempt} of {arrival.event_id} arrived twice")
        seen.add((arrival.event_id, arrival.attempt))
        result, ended_at = ends.get(arrival.event_id, ("", datetime.max.replace(tzinfo=UTC) - slack))
        if result not in ("", "delivered") and arrival.at > ended_at + slack:
            found.append(f"law 4: {arrival.event_id} arrived {arrival.at - ended_at} after it was {result}")
    arrived = {uid for uid, _ in seen}
    for uid, (result, _) in ends.items():
        if result == "delivered" and uid not in arrived:
            found.append(f"law 1: {uid} was recorded as delivered and never arrived")
    return found
