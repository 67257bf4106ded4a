"""What the benchmarks submit, when, and how they judge the deliveries."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TypeVar

from orchestrator.events.ids import event_id
from orchestrator.events.submission import Submission

T = TypeVar("T")

_EVERY_S = 0.05

# 261 bytes, as in the measurements that the targets were set by.
PAYLOAD = (
    b'{"order":{"id":"7c9f2f0e-3b1d-4a55-9c54-0d3f1f0a6a11","status":"confirmed","currency":"EUR","total":12999,'
    b'"lines":[{"sku":"A-1001","quantity":2,"price":4999},{"sku":"B-2002","quantity":1,"price":3001}]},'
    b'"customer":{"id":"c-48151623","locale":"de-DE"}}'
).ljust(261)


def submissions(
    count: int,
    destination: Callable[[int], str],
    scheduled_at: Callable[[int], datetime],
    run: str,
    delivery_type: str = "HTTP",
) -> Iterator[Submission]:
    """`count` events with distinct ids; `destination` and `scheduled_at` map each number to a value."""
    for n in range(count):
        at, external_job_id = scheduled_at(n), f"{run}-{n}"
        identity = event_id("bench", external_job_id, at)
        yield Submission(identity, at, "bench", external_job_id, delivery_type, destination(n), PAYLOAD, None, 3, None)


async def paced(per_s: float, events: int, send: Callable[[int, int], Awaitable[object]]) -> None:
    """Calls `send` with a first number and a count, on time even if earlier calls are still running.

    Returns when all calls have; the first error of a call ends all others.
    """
    share = max(1, round(per_s * _EVERY_S))
    began_s = time.monotonic()

    async def call(first: int, count: int) -> None:
        await send(first, count)

    async with asyncio.TaskGroup() as sending:
        for n in range(0, events, share):
            await asyncio.sleep(max(0.0, began_s + n / per_s - time.monotonic()))
            sending.create_task(call(n, min(share, events - n)))


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of that size; the last list may be shorter."""
    left = iter(items)
    while chunk := list(itertools.islice(left, size)):
        yield chunk


def new_run() -> str:
    """A prefix for external ids that no earlier run in the same database has used."""
    return f"{random.getrandbits(40):010x}"


def judged(due: Mapping[str, float], arrivals: Iterable[tuple[str, float]]) -> dict[str, object]:
    """Compares arrivals (event id, Unix time) with due times (event id → Unix time).

    Counts lost, duplicated and early events, and reports the lateness. Arrivals of other events do not count.
    """
    counts: Counter[str] = Counter()
    lateness_s: list[float] = []
    for identity, at in arrivals:
        if identity in due:
            counts[identity] += 1
            lateness_s.append(at - due[identity])
    return {
        "delivered": len(counts),
        "lost": len(due) - len(counts),
        "duplicated": counts.total() - len(counts),
        "early": sum(late_s < 0 for late_s in lateness_s),
        "lateness_ms": lateness(lateness_s),
    }


def lateness(seconds: Sequence[float]) -> dict[str, float | None]:
    """The percentiles that every benchmark reports, in milliseconds; by nearest rank."""
    ordered = sorted(seconds)
    return {name: _percentile(ordered, share) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


def _percentile(ordered: Sequence[float], share: float) -> float | None:
    if not ordered:
        return None
    return round(1000 * ordered[max(0, math.ceil(share * len(ordered)) - 1)], 3)


def spread(start: datetime, seconds: float, count: int) -> Callable[[int], datetime]:
    """Times spread evenly over that many seconds from `start`."""
    return lambda n: start + timedelta(microseconds=int(n * seconds / count * 1_000_000))
