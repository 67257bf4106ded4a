"""Limits of a destination under several dispatchers: its rate limit and its max_parallel."""

from __future__ import annotations

import asyncio
import itertools
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta

import psycopg

from orchestrator.bench.delivery import dispatching, drained, submit
from orchestrator.bench.processes import Request, receiver, wait_until
from orchestrator.bench.workload import judged, new_run, spread, submissions
from orchestrator.errors import OrchestratorError

FLEETS = (1, 4, 16)
WINDOW_S = 10.0
_TOLERANCE = 1.05
_LEAD_S = 2.0
_TRICKLE_PER_S = 10

MAX_PARALLEL = 20
_ANSWER_S = 0.05
_LEASE_S = 11
_TIMEOUT_S = 3


def rate(database_url: str, events: int, fleets: Sequence[int], per_s: float, burst: int) -> dict[str, object]:
    """Drains `events` due at one instant at a destination with a rate limit, with one fleet size after another.

    Another destination without limits has 10 events a second meanwhile.
    """
    allowed = per_s * WINDOW_S * _TOLERANCE + burst
    asked = {"rate_per_s": per_s, "burst": burst, "allowed_in_10_s": round(allowed), "share_asked": 0.95}
    return asked | {f"dispatchers_{count}": _rate(database_url, events, count, per_s, burst) for count in fleets}


def _rate(database_url: str, events: int, dispatchers: int, per_s: float, burst: int) -> dict[str, object]:
    with receiver() as target, dispatching(database_url, dispatchers, []):
        limited, free = target.name(1), target.name(2)
        configure(database_url, limited, rate_per_second=per_s, burst=burst)
        at = datetime.now(UTC) + timedelta(seconds=_LEAD_S + events / 25_000)
        seconds = events / per_s
        trickle = int(seconds * _TRICKLE_PER_S)
        herd = submissions(events, lambda n: f"http://{limited}/", lambda n: at, new_run())
        due_s = asyncio.run(submit(database_url, herd))
        beside = submissions(trickle, lambda n: f"http://{free}/", spread(at, seconds, trickle), new_run())
        free_due_s = asyncio.run(submit(database_url, beside))
        drained(database_url, target, events + trickle, expected_s=seconds)
        arrivals = target.arrivals()
    times = [arrived for event_id, arrived in arrivals if event_id in due_s]
    # The burst comes on top of the rate, and is therefore left out of the share.
    share = (len(times) - burst) / (per_s * (times[-1] - times[0]))
    judgement = judged(due_s | free_due_s, arrivals)
    return {
        "most_in_10_s": most_within(times, WINDOW_S),
        "share_of_rate": round(share, 4),
        **{name: judgement[name] for name in ("early", "lost", "duplicated")},
        "beside_lateness_ms": judged(free_due_s, arrivals)["lateness_ms"],
    }


def most_within(times: Sequence[float], window_s: float) -> int:
    """The largest number of the times, which are in order, in any window of that length."""
    most = first = 0
    for last, at in enumerate(times):
        while at - times[first] >= window_s:
            first += 1
        most = max(most, last - first + 1)
    return most


def parallel(database_url: str, events: int, dispatchers: int) -> dict[str, object]:
    """A destination with max_parallel 20 answers in 50 ms; a third of the way, one of its dispatchers is killed.

    `full_again_s` is how long after that 20 requests were under way at once again. Until its leases have run out, those
    of the killed dispatcher, `killed_held`, count as under way.
    """
    settings = {"SCHEDULER_LEASE_SECONDS": str(_LEASE_S), "HTTP_TIMEOUT_SECONDS": str(_TIMEOUT_S)}
    with receiver() as target, dispatching(database_url, dispatchers, [], settings) as processes:
        name = target.name(1)
        configure(database_url, name, max_parallel=MAX_PARALLEL)
        at = datetime.now(UTC) + timedelta(seconds=_LEAD_S + events / 25_000)
        path = f"wait-{1000 * _ANSWER_S:.0f}"
        made = submissions(events, lambda n: f"http://{name}/{path}/", lambda n: at, new_run())
        due_s = asyncio.run(submit(database_url, made))
        seconds = events * _ANSWER_S / MAX_PARALLEL
        wait_until(lambda: target.count() >= events // 3, "the first third of the events", 60.0 + seconds)
        held, killed_s = _kill_one(database_url, processes)
        finished_s = drained(database_url, target, events, expected_s=seconds)
        requests = target.requests()
    return {
        "seconds": round(finished_s - at.timestamp(), 3),
        "max_parallel": MAX_PARALLEL,
        "most_under_way": most_under_way(requests),
        "mean_under_way": round(mean_under_way(requests, requests[0].arrived, killed_s), 2),
        "lease_s": _LEASE_S,
        "killed_held": held,
        "full_again_s": _full_again_s(requests, killed_s),
        **judged(due_s, ((each.event_id, each.arrived) for each in requests)),
    }


def _kill_one(database_url: str, processes: Sequence[subprocess.Popen[bytes]]) -> tuple[int, float]:
    """Kills the first dispatcher that has attempts under way; returns how many it had, and when."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        for process in itertools.islice(itertools.cycle(processes), 1000):
            process.send_signal(signal.SIGSTOP)
            row = connection.execute(
                "select count(*) from orchestrator.timer t join orchestrator.worker w using (worker)"
                " where w.name like %s and t.lease_until > clock_timestamp()",
                (f"%:{process.pid}",),
            ).fetchone()
            if row and row[0]:
                process.kill()
                process.wait()
                return int(row[0]), time.time()
            process.send_signal(signal.SIGCONT)
            time.sleep(0.01)
    raise OrchestratorError("bench: no dispatcher had an attempt under way")


def under_way(requests: Iterable[Request]) -> Iterator[tuple[float, int]]:
    """Each time at which a request began or ended at the receiver, and how many were under way from then on."""
    begun = ((each.arrived, 1) for each in requests)
    ended = ((each.ended, -1) for each in requests)
    changes = sorted(itertools.chain(begun, ended))  # at the same instant, an end counts before a begin
    counts = itertools.accumulate(change for _, change in changes)
    return zip((at for at, _ in changes), counts, strict=True)


def most_under_way(requests: Sequence[Request]) -> int:
    return max((count for _, count in under_way(requests)), default=0)


def mean_under_way(requests: Iterable[Request], start: float, end: float) -> float:
    """How many requests were under way on average between two times."""
    busy_s = sum(max(0.0, min(end, each.ended) - max(start, each.arrived)) for each in requests)
    return busy_s / (end - start)


def _full_again_s(requests: Sequence[Request], since_s: float) -> float | None:
    """None if the bound was never reached again."""
    full = (at - since_s for at, count in under_way(requests) if at > since_s and count >= MAX_PARALLEL)
    return next((round(after_s, 3) for after_s in full), None)


def configure(
    database_url: str,
    *names: str,
    rate_per_second: float | None = None,
    burst: int = 1,
    max_parallel: int | None = None,
) -> None:
    """Gives destinations limits."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        for name in names:
            connection.execute(
                "select orchestrator.configure_destination(%s, p_rate_per_second => %s, p_burst => %s,"
                " p_max_parallel => %s)",
                (name, rate_per_second, burst, max_parallel),
            )
