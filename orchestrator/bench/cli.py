"""``orchestrator bench``."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from orchestrator.bench import (
    api,
    backlog,
    claims,
    cost,
    delivery,
    fairness,
    held_snapshot,
    ingest,
    kafka_delivery,
    lifecycle,
    limits,
    pipeline,
    soak,
)
from orchestrator.bench.processes import database
from orchestrator.dev.postgres_tuning import memory_bytes

_EVENTS: dict[str, int | None] = {
    "lifecycle": 300_000,
    "deliver-http": 50_000,
    "steady": 60_000,
    "herd": 50_000,
    "api": 40_000,
    "ingest": 1_000_000,
    "deliver-kafka": 200_000,
    "pipeline": 200_000,
    "rate": 12_000,
    "parallel": 12_000,
    "fairness": 1_000_000,
    "claim": 250_000,
    "backlog": 10_000_000,
    "held-snapshot": None,
    "soak": None,
    "cost": 100_000,
}

_RATE_PER_S = 400.0
_FLOW_PER_S = 2000.0


@click.command()
@click.argument("scenario", type=click.Choice(list(_EVENTS)))
@click.option("--events", type=click.IntRange(min=1), help="Number of events; each scenario has its own default.")
@click.option(
    "--dispatchers",
    type=click.IntRange(1, 64),
    help="Dispatcher processes; default 2, for parallel 4, for rate first 1, then 4, then 16.",
)
@click.option("--ingesters", type=click.IntRange(1, 64), default=2, show_default=True, help="Ingester processes.")
@click.option(
    "--bad-every",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="ingest: one record in N is no valid submission; 0: none.",
)
@click.option(
    "--duplicate-every",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="ingest: one record in N repeats the one before; 0: none.",
)
@click.option(
    "--batch", type=click.IntRange(1, 10_000), default=1000, show_default=True, help="lifecycle: size of a claim."
)
@click.option("--null", is_flag=True, help="herd: with deliveries that do nothing.")
@click.option("--bare", is_flag=True, help="herd: with --null, then a second herd for the clients of lifecycle.")
@click.option(
    "--rate",
    type=click.FloatRange(1, 1e6),
    help="rate: the rate limit, 400 events/s by default; held-snapshot, soak: submitted events/s, 2,000.",
)
@click.option(
    "--burst", type=click.IntRange(1, 10**6), default=40, show_default=True, help="rate: the burst of the rate limit."
)
@click.option(
    "--minutes",
    type=click.FloatRange(0.1, 10_000),
    help="Duration; default 10 for held-snapshot, 30 for soak.",
)
@click.option("--no-floors", is_flag=True, help="held-snapshot: without lane floors, which keep claims fast.")
@click.option(
    "--database-url", help="Empty database to use. [default: an embedded server, which is removed afterwards]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def bench(
    scenario: str,
    events: int | None,
    dispatchers: int | None,
    ingesters: int,
    bad_every: int,
    duplicate_every: int,
    batch: int,
    null: bool,
    bare: bool,
    rate: float | None,
    burst: int,
    minutes: float | None,
    no_floors: bool,
    database_url: str | None,
    as_json: bool,
) -> None:
    """Measure SCENARIO on this machine, with all the servers it needs.

    \b
    lifecycle     SQL only: submit by COPY, claim, finish; 50 destinations
    deliver-http  a backlog of due events to a local receiver
    steady        1,000 events a second to a local receiver
    herd          events due at one instant to a local receiver
    api           single POSTs from 64 clients, then batches of 500
    ingest        submissions from a topic of 24 partitions into the database
    deliver-kafka a backlog of due events to a topic of 24 partitions
    pipeline      batches of 500 over REST, Kafka, database, Kafka
    rate          a backlog for a destination with a rate limit; most arrivals in any 10 s
    parallel      a backlog for a destination with max_parallel 20; most under way, also after a SIGKILL
    fairness      lateness of 50 destinations beside a herd; throughput beside a hanging destination
    claim         how long claims take, by the number of destinations
    backlog       how long claims take, by the number of live timers
    held-snapshot 2,000 events a second while an open transaction holds vacuum back
    soak          2,000 events a second with retries and cancels; growth of tables and indexes
    cost          WAL, CPU and buffers of one event, by step, relation and record

    Scenarios with Kafka use the broker of KAFKA_BOOTSTRAP_SERVERS, or start one.
    """
    count = events or _EVENTS[scenario] or 0
    flow_per_s = rate or _FLOW_PER_S
    fleet = dispatchers or 2
    runs: dict[str, Callable[[str], dict[str, object]]] = {
        "lifecycle": lambda url: lifecycle.run(url, count, batch),
        "deliver-http": lambda url: delivery.deliver_http(url, count, fleet),
        "steady": lambda url: delivery.steady(url, count, fleet),
        "herd": lambda url: (
            delivery.herd_null(url, count, fleet, bare=bare) if null else delivery.herd(url, count, fleet)
        ),
        "api": lambda url: api.run(url, count),
        "ingest": lambda url: ingest.run(url, count, ingesters, bad_every, duplicate_every),
        "deliver-kafka": lambda url: kafka_delivery.run(url, count, fleet),
        "pipeline": lambda url: pipeline.run(url, count, ingesters, fleet),
        "rate": lambda url: limits.rate(
            url, count, [dispatchers] if dispatchers else limits.FLEETS, rate or _RATE_PER_S, burst
        ),
        "parallel": lambda url: limits.parallel(url, count, dispatchers or 4),
        "fairness": lambda url: fairness.run(url, count, fleet),
        "claim": lambda url: claims.run(url, count),
        "backlog": lambda url: backlog.run(url, count),
        "held-snapshot": lambda url: held_snapshot.run(url, minutes or 10.0, flow_per_s, fleet, floors=not no_floors),
        "soak": lambda url: soak.run(url, minutes or 30.0, flow_per_s, fleet),
        "cost": lambda url: cost.run(url, count),
    }
    with database(database_url) as url:
        result = {"scenario": scenario, "events": count, **runs[scenario](url), "machine": machine()}
    if as_json:
        click.echo(json.dumps(result))
    else:
        table = Table("figure", "value", title=f"bench {scenario}")
        for name, value in result.items():
            table.add_row(name, json.dumps(value) if isinstance(value, dict) else str(value))
        Console().print(table)


def machine() -> dict[str, object]:
    """The machine of the measurement."""
    model = platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpu_info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes() / (1 << 30), 1),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }
