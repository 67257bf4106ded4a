"""A flow of events in real time, through dispatchers whose deliveries do nothing, with maintenance each minute."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from orchestrator.bench.delivery import dispatching
from orchestrator.bench.workload import lateness
from orchestrator.database.maintenance import Maintenance
from orchestrator.settings import Settings
from orchestrator.tasks import end

_MAINTAIN_EVERY_S = 60.0
_PERIOD_S = 60.0
_PERIODS = 5
"""Minimum number of periods in the report of a flow."""


class Claim(NamedTuple):
    """When a claim ended, in Unix seconds, and how long its dispatcher waited for it."""

    at_s: float
    seconds: float


class Fleet:
    """Null dispatchers, and the claims that they note."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]], notes: Path) -> None:
        self.processes = processes
        self._notes = notes

    def claims(self) -> list[Claim]:
        """All claims so far, including those that found nothing."""
        lines = [line for file in self._notes.iterdir() for line in file.read_text().splitlines(keepends=True)]
        noted = (line.split() for line in lines if line.endswith("\n"))
        return [Claim(float(at_s), float(seconds)) for at_s, seconds in noted]


@contextmanager
def null_fleet(database_url: str, count: int, *, floors: bool = True, fail_every: int = 0) -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="orchestrator-bench-") as notes:
        arguments = ["orchestrator.bench.null_dispatcher", f"--claims={notes}", f"--fail-every={fail_every}"]
        if not floors:
            arguments.append("--no-floors")
        with dispatching(database_url, count, arguments) as processes:
            yield Fleet(processes, Path(notes))


async def maintaining(
    settings: Settings, flow: Coroutine[Any, Any, None], watch: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    """While the flow lasts, runs maintenance each minute, as the product does, and `watch`, which never ends."""

    async def maintain() -> None:
        async with Maintenance.open(settings) as maintenance:
            while True:
                await maintenance.run_on()
                await asyncio.sleep(_MAINTAIN_EVERY_S)

    tasks = [asyncio.create_task(each) for each in (flow, maintain(), watch())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await end(*tasks)


def period_s(seconds: float) -> float:
    """The length of a period: a minute, or less if the flow takes less than five."""
    return min(_PERIOD_S, seconds / _PERIODS)


def by_period(claims: Sequence[Claim], began_s: float, seconds: float) -> list[dict[str, float | None]]:
    """The number of claims in each period, and their percentiles in milliseconds."""
    length_s = period_s(seconds)
    taken: list[list[float]] = [[] for _ in range(round(seconds / length_s))]
    for claim in claims:
        number = int((claim.at_s - began_s) // length_s)
        if 0 <= number < len(taken):
            taken[number].append(claim.seconds)
    return [{"claims": len(each), **lateness(each)} for each in taken]


def delivered_by_period(database_url: str, began_s: float, seconds: float) -> list[dict[str, float]]:
    """Events delivered a second in each period, and how late their attempts began, in milliseconds."""
    length_s = period_s(seconds)
    with psycopg.connect(database_url) as connection:
        rows = connection.execute(
            """select floor((extract(epoch from finished_at)::float8 - %(began)s) / %(length)s)::integer, count(*)
                 , percentile_disc(array[0.5, 0.99])
                     within group (order by extract(epoch from started_at - due_at)::float8 * 1000)
            from orchestrator.outcomes where result = 'delivered' group by 1""",
            {"began": began_s, "length": length_s},
        ).fetchall()
    found = {number: (count, late) for number, count, late in rows}
    return [
        {
            "delivered_per_s": round(found[number][0] / length_s, 1),
            "late_ms_p50": round(found[number][1][0], 3),
            "late_ms_p99": round(found[number][1][1], 3),
        }
        if number in found
        else {"delivered_per_s": 0.0}
        for number in range(round(seconds / length_s))
    ]


def tell(line: str) -> None:
    """Progress, to standard error."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
