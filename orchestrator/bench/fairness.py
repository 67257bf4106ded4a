"""How much the herd of one destination, or one that hangs, slows the other destinations."""

from __future__ import annotations

import asyncio
import itertools
import time
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta

import psycopg

from orchestrator.bench.delivery import dispatching, submit
from orchestrator.bench.processes import Receiver, receiver, wait_until
from orchestrator.bench.workload import judged, new_run, spread, submissions

TRICKLING = 50
_TRICKLE_PER_S = 10
_TRICKLE_S = 30.0
_LEAD_S = 3.0
_SUBMIT_PER_S = 20_000
_LATE_S = 60.0
_DRAIN_S = 120.0

OTHERS = 10
_BACKLOG = 60_000
_HANGING = 100_000
_HANG_S = 10.0
_SETTINGS = {"HTTP_TIMEOUT_SECONDS": f"{_HANG_S:g}", "SHUTDOWN_TIMEOUT_SECONDS": "2"}


def run(database_url: str, events: int, dispatchers: int) -> dict[str, object]:
    """First beside a destination that never answers, then beside one with `events` due at one instant."""
    hang = _beside_a_hang(database_url, dispatchers)
    return {**_beside_a_hog(database_url, events, dispatchers), "hang": hang}


def _beside_a_hog(database_url: str, events: int, dispatchers: int) -> dict[str, object]:
    """The lateness of 50 destinations with 10 events a second each: alone, then beside the hog.

    The hog is the destination with the herd. It shares its lane with some of the 50, its mates; at the end `hog_left`
    of its events still waited.
    """
    with receiver() as target, dispatching(database_url, dispatchers, []):
        names = [target.name(host) for host in range(1, TRICKLING + 1)]
        hog, mates = _hog(database_url, target, names)
        alone_s = _trickle(database_url, names, datetime.now(UTC) + timedelta(seconds=_LEAD_S))
        arrivals = target.arrivals()
        alone, alone_mates = (judged(due_s, arrivals) for due_s in _of_all_and(mates, alone_s))

        herd_at = datetime.now(UTC) + timedelta(seconds=_LEAD_S + events / _SUBMIT_PER_S)
        herd = submissions(events, lambda n: f"http://{hog}/", lambda n: herd_at, new_run())
        herd_s = asyncio.run(submit(database_url, herd))
        beside_at = max(herd_at, datetime.now(UTC)) + timedelta(seconds=_LEAD_S)
        beside_s = _trickle(database_url, names, beside_at)
        arrivals = target.arrivals()
    beside, beside_mates = (judged(due_s, arrivals) for due_s in _of_all_and(mates, beside_s))
    herded = [at for event_id, at in arrivals if event_id in herd_s]
    trickled = bisect(herded, beside_at.timestamp() + _TRICKLE_S) - bisect(herded, beside_at.timestamp())
    return {
        "alone_lateness_ms": alone["lateness_ms"],
        "beside_hog_lateness_ms": beside["lateness_ms"],
        "lane_mates": len(mates),
        "mates_alone_lateness_ms": alone_mates["lateness_ms"],
        "mates_beside_hog_lateness_ms": beside_mates["lateness_ms"],
        "hog_per_s": round(trickled / _TRICKLE_S),
        "hog_left": events - len(herded),
        **{name: [alone[name], beside[name]] for name in ("early", "lost", "duplicated")},
    }


def _hog(database_url: str, target: Receiver, names: Sequence[str]) -> tuple[str, list[str]]:
    """A further destination in the shared lane that most of these are in, and the ones in that lane."""
    with psycopg.connect(database_url) as connection:

        def lane(name: str) -> int:
            row = connection.execute("select hashtextextended(%s, 0) & 63", (name,)).fetchone()
            return int(row[0]) if row else 0

        lanes = {name: lane(name) for name in names}
        [(fullest, _)] = Counter(lanes.values()).most_common(1)
        further = (target.name(host) for host in itertools.count(len(names) + 1) if host & 255)
        hog = next(name for name in further if lane(name) == fullest)
    return hog, [name for name in names if lanes[name] == fullest]


def _trickle(database_url: str, names: Sequence[str], at: datetime) -> dict[str, dict[str, float]]:
    """Submits 10 events a second for each destination and waits for the last; returns due times by destination."""
    count = int(_TRICKLE_S * _TRICKLE_PER_S) * len(names)
    due = spread(at, _TRICKLE_S, count)
    made = submissions(count, lambda n: f"http://{names[n % len(names)]}/", due, new_run())
    due_s = asyncio.run(submit(database_url, made))
    with psycopg.connect(database_url, autocommit=True) as watching:
        time.sleep(max(0.0, at.timestamp() + _TRICKLE_S - time.time()))
        wait_until(lambda: not _left(watching, due_s), f"delivering {count} events", _LATE_S, 0.2)
    return {name: dict(itertools.islice(due_s.items(), n, None, len(names))) for n, name in enumerate(names)}


def _left(connection: psycopg.Connection, event_ids: Iterable[str]) -> bool:
    row = connection.execute(
        "select exists (select from orchestrator.timer where event_id = any (%s::uuid[]))", (list(event_ids),)
    ).fetchone()
    return row is not None and bool(row[0])


def _of_all_and(mates: Sequence[str], due_s: Mapping[str, dict[str, float]]) -> Iterator[dict[str, float]]:
    for names in (due_s.keys(), mates):
        yield {event_id: at for name in names for event_id, at in due_s[name].items()}


def _beside_a_hang(database_url: str, dispatchers: int) -> dict[str, object]:
    """How fast 10 destinations get their backlog: alone, twice beside one that never answers, and alone again.

    All events are due at one instant. The time runs from that instant for at most 10 s, the timeout. Each run has new
    dispatchers and a new destination that hangs, which has no breaker yet.
    """
    with receiver() as target:
        phases = (0, _HANGING, _HANGING, 0)
        measured = [_phase(database_url, target, dispatchers, n, hanging) for n, hanging in enumerate(phases)]
    alone = [per_s for (per_s, _), hanging in zip(measured, phases, strict=True) if not hanging]
    beside = [per_s for (per_s, _), hanging in zip(measured, phases, strict=True) if hanging]
    return {
        "alone_per_s": [round(per_s) for per_s in alone],
        "beside_per_s": [round(per_s) for per_s in beside],
        "fall_percent": round(100 * (1 - sum(beside) / sum(alone)), 1),
        "hung": [hung for _, hung in measured if hung],
    }


def _phase(database_url: str, target: Receiver, dispatchers: int, number: int, hanging: int) -> tuple[float, int]:
    """The rate at which the other destinations got events, and how many attempts hung."""
    silent = target.name(OTHERS + 1 + number)
    with (
        dispatching(database_url, dispatchers, [], _SETTINGS),
        psycopg.connect(database_url, autocommit=True) as connection,
    ):
        at = datetime.now(UTC) + timedelta(seconds=_LEAD_S + (_BACKLOG + hanging) / _SUBMIT_PER_S)
        stuck = submissions(hanging, lambda n: f"http://{silent}/hang", lambda n: at, new_run())
        stuck_s = asyncio.run(submit(database_url, stuck))
        made = submissions(_BACKLOG, lambda n: f"http://{target.name(1 + n % OTHERS)}/", lambda n: at, new_run())
        due_s = asyncio.run(submit(database_url, made))
        wait_until(lambda: not _left(connection, due_s), f"delivering {_BACKLOG} events", _DRAIN_S, 0.5)
        time.sleep(max(0.0, at.timestamp() + _HANG_S - time.time()))
    with psycopg.connect(database_url, autocommit=True) as connection:  # events that will never be delivered
        connection.execute("delete from orchestrator.timer where event_id = any (%s::uuid[])", (list(stuck_s),))
    arrivals = target.arrivals()
    arrived = [moment for event_id, moment in arrivals if event_id in due_s]
    began_s = at.timestamp()
    ended_s = min(began_s + _HANG_S, arrived[-1])
    hung = sum(event_id in stuck_s for event_id, _ in arrivals)
    return bisect(arrived, ended_s) / (ended_s - began_s), hung
