"""Measures this project beside two other job queues, by turns, on one PostgreSQL server. README.md says how.

An adapter (``graphile-worker.mjs``, ``pg-boss.mjs``) knows how its queue is installed, filled and worked off; this
program times it, and counts that every job ran once. This project is measured by its own ``orchestrator bench``.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import click
import psycopg
from psycopg import sql

from orchestrator.bench.processes import wait_until
from orchestrator.bench.workload import PAYLOAD, lateness
from orchestrator.dev.postgres import EmbeddedPostgres
from orchestrator.errors import OrchestratorError

PEERS = ("graphile-worker", "pg-boss")
EVENTS = {"drain": 300_000, "herd": 50_000}
"""The scenarios, and how many events each has unless told otherwise."""
WORKERS = 2
"""As many as `bench lifecycle` has clients, and `bench herd` dispatchers."""
compact = json.JSONEncoder(separators=(",", ":")).encode
BODY = {**json.loads(PAYLOAD), "_": ""}
BODY["_"] = " " * (len(PAYLOAD) - len(compact(BODY)))
"""As long as this project's payload, which ends with blanks that a peer would not keep."""
_LIMIT_S = 240.0
_POLL_S = 0.02
_HERD_LEAD_S = 4.0
_HERD_ENQUEUED_PER_S = 10_000  # every peer is faster

Measure = Callable[[str, str, int], dict[str, float]]
"""Runs a system in an empty database: its URL, the scenario, the number of events; returns figures by name."""


class Run(NamedTuple):
    system: str
    scenario: str
    events: int
    figures: dict[str, float]


def compared(
    runs: Iterable[Run], scenario: str
) -> Iterator[tuple[str, dict[str, float], dict[str, tuple[float, float, float]]]]:
    """For each figure: every system's median, and the first system's ratio to each other one.

    The ratio is the median, the least and the greatest of those of all rounds; the n-th runs are of one round.
    """
    figures: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        if run.scenario == scenario:
            for name, value in run.figures.items():
                figures.setdefault(name, {}).setdefault(run.system, []).append(value)
    for name, systems in figures.items():
        first, *others = systems
        ratios = {other: [a / b for a, b in zip(systems[first], systems[other], strict=False)] for other in others}
        yield (
            name,
            {system: statistics.median(values) for system, values in systems.items()},
            {other: (statistics.median(each), min(each), max(each)) for other, each in ratios.items() if each},
        )


def table(runs: Sequence[Run], scenario: str) -> str:
    """Markdown: the medians, and the first system's ratio to each other one, with its range over all rounds."""
    systems = list(dict.fromkeys(run.system for run in runs if run.scenario == scenario))
    headings = [scenario, *systems, *(f"{systems[0]} ÷ {other}" for other in systems[1:])]
    lines = [headings, ["---"] * len(headings)]
    for name, medians, ratios in compared(runs, scenario):
        ranges = [f"{ratio:.2f} ({least:.2f}–{most:.2f})" for ratio, least, most in ratios.values()]
        lines.append([name, *(f"{median:,.0f}" for median in medians.values()), *ranges])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def own(program: str) -> Measure:
    """How to measure an installation of this project: by its own benchmarks."""

    def measure(url: str, scenario: str, events: int) -> dict[str, float]:
        arguments = ["lifecycle"] if scenario == "drain" else ["herd", "--null", "--dispatchers", str(WORKERS)]
        result = _answer([program, "bench", *arguments, "--events", str(events), "--database-url", url, "--json"])
        if wrong := {name: result[name] for name in ("lost", "duplicated", "early") if result.get(name)}:
            raise OrchestratorError(f"{program}: not every event was delivered once and on time: {wrong}")
        if scenario == "herd":
            return _lateness(result["lateness_ms"])
        return life(result["submit_per_s"], result["claim_finish_per_s"], result["wal_bytes_per_event"])

    return measure


def peer(name: str, packages: Path) -> Measure:
    """How to measure a peer that is installed in that folder: by its adapter."""
    node = packages.resolve() / "node_modules" / "node" / "bin" / "node"
    adapter = Path(__file__).with_name(f"{name}.mjs")

    def measure(url: str, scenario: str, events: int) -> dict[str, float]:
        def command(role: str, at_ms: float | None = None) -> list[str]:
            given = {"url": url, "events": events, "workers": WORKERS, "payload": BODY, "at": at_ms}
            return [
                str(node) if node.exists() else "node",
                str(adapter),
                str(packages.resolve()),
                role,
                json.dumps(given),
            ]

        installed = _answer(command("install"))
        with psycopg.connect(url, autocommit=True) as watching, ExitStack() as running:
            watching.execute(
                "set enable_seqscan = off"
            )  # which would read every job that is done to find one that is not
            workers = [running.enter_context(_worker(command("work"))) for _ in range(WORKERS)]
            wal = _wal(watching)
            if scenario == "herd":
                at_s = _start(workers) + _HERD_LEAD_S + events / _HERD_ENQUEUED_PER_S
                _answer(command("enqueue", 1000 * at_s))
                if time.time() > at_s:
                    raise OrchestratorError(f"{name}: jobs were due before all of them were enqueued")
            else:
                enqueue_s = _answer(command("enqueue"))["seconds"]
                watching.execute("analyze")
                at_s = _start(workers)
            done_s = _done(watching, installed["done"], name)
            wal_bytes = _wal(watching) - wal
            started = [start for worker in workers for start in _stopped(worker)]
            check_each_once(name, events, started, _value(watching, installed["wrong"]))
            late_s = [unix_ms / 1000 - at_s for _, unix_ms in started]
            if scenario == "herd" and min(late_s) < 0:
                raise OrchestratorError(f"{name}: a job began {-min(late_s):.3f} s early")
            if scenario == "herd":
                return _lateness(lateness(late_s))
            return life(events / enqueue_s, events / (done_s - at_s), wal_bytes / events)

    return measure


def version(packages: Path, name: str) -> str:
    """The installed one."""
    return str(json.loads((packages / "node_modules" / name / "package.json").read_text())["version"])


def check_each_once(name: str, events: int, started: Sequence[tuple[str, float]], wrong: int) -> None:
    """Raises OrchestratorError unless each job began once, and the database shows `wrong` ones: none."""
    counts = {"starts": len(started), "jobs": len({job for job, _ in started}), "not completed once": wrong}
    if list(counts.values()) != [events, events, 0]:
        raise OrchestratorError(f"{name}: not each of {events} jobs ran once: {counts}")


def life(enqueue_per_s: float, drain_per_s: float, wal_bytes: float) -> dict[str, float]:
    """The figures of `drain`; a whole life is that of a job which is first enqueued and then drained."""
    return {
        "enqueue_per_s": enqueue_per_s,
        "drain_per_s": drain_per_s,
        "whole_life_per_s": 1 / (1 / enqueue_per_s + 1 / drain_per_s),
        "wal_bytes_per_job": wal_bytes,
    }


def _lateness(figures: dict[str, Any]) -> dict[str, float]:
    return {"p50_start_ms": figures["p50"], "p99_start_ms": figures["p99"], "last_start_ms": figures["max"]}


def _answer(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=_LIMIT_S,
        # Else a checkout in the working directory would stand in for the version that is measured.
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    if done.returncode != 0:
        raise OrchestratorError(f"this failed with status {done.returncode}: {' '.join(command[:4])} …")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@contextmanager
def _worker(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(_LIMIT_S, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()


def _start(workers: Sequence[subprocess.Popen[str]]) -> float:
    """Lets all workers begin at once, when all of them can; returns when, in Unix seconds."""
    for worker in workers:
        _line(worker)
    at_s = time.time()
    for worker in workers:
        if worker.stdin:
            worker.stdin.write("start\n")
            worker.stdin.flush()
    return at_s


def _stopped(worker: subprocess.Popen[str]) -> list[tuple[str, float]]:
    """Asks a worker to end; returns id and start (Unix ms) of each job that it had."""
    if worker.stdin:
        worker.stdin.close()
    started: list[tuple[str, float]] = _line(worker)
    return started


def _line(worker: subprocess.Popen[str]) -> Any:
    if worker.stdout is None or not (line := worker.stdout.readline()):
        raise OrchestratorError("a worker ended without an answer")
    return json.loads(line)


def _done(connection: psycopg.Connection, query: str, name: str) -> float:
    """When the database first showed all jobs completed; looking takes a sixth of the time at most."""
    looked_s = 0.0

    def is_done() -> bool:
        nonlocal looked_s
        time.sleep(5 * looked_s)
        began_s = time.perf_counter()
        done = _value(connection, query)
        looked_s = time.perf_counter() - began_s
        return bool(done)

    wait_until(is_done, f"draining {name}", _LIMIT_S, _POLL_S)
    return time.time()


def _wal(connection: psycopg.Connection) -> int:
    return _value(connection, "select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')")


def _value(connection: psycopg.Connection, query: str) -> int:
    row = connection.execute(query.encode()).fetchone()
    return int(row[0]) if row else 0


@contextmanager
def new_database(server_url: str) -> Iterator[str]:
    """An empty database after a checkpoint, dropped afterwards."""
    name = sql.Identifier(f"compared_{os.getpid()}")
    with psycopg.connect(server_url, autocommit=True) as server:
        server.execute(sql.SQL("create database {}").format(name))
        try:
            server.execute("checkpoint")
            yield urlunsplit(urlsplit(server_url)._replace(path=f"/compared_{os.getpid()}"))
        finally:
            server.execute(sql.SQL("drop database {} with (force)").format(name))


@click.command()
@click.option("--packages", type=click.Path(path_type=Path), required=True, help="Where npm has installed the peers.")
@click.option("--scenario", type=click.Choice(list(EVENTS)), multiple=True, help="One scenario.  [default: both]")
@click.option("--events", type=click.IntRange(min=1), help="Number of events.  [default: 300,000; herd: 50,000]")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--orchestrator", "programs", metavar="[NAME=]PROGRAM", multiple=True,
    help="This project's command; repeat it to compare versions.  [default: that of this environment]",
)  # fmt: skip
@click.option("--database-url", help="A server, as a superuser.  [default: an embedded one, removed afterwards]")
@click.option("--results", type=click.Path(path_type=Path), help="File of JSON lines; new runs are added to it.")
def main(
    packages: Path,
    scenario: tuple[str, ...],
    events: int | None,
    rounds: int,
    programs: tuple[str, ...],
    database_url: str | None,
    results: Path | None,
) -> None:
    """Measure this project beside graphile-worker and pg-boss, by turns, on one server."""
    if absent := [name for name in (*PEERS, "pg") if not (packages / "node_modules" / name).is_dir()]:
        raise click.ClickException(f"not installed: npm install --prefix {packages} {' '.join(absent)}")
    if not (packages / "node_modules" / "node").is_dir() and shutil.which("node") is None:
        raise click.ClickException(f"there is no Node: npm install --prefix {packages} node@22")
    named = [program.rpartition("=") for program in programs or [str(Path(sys.executable).with_name("orchestrator"))]]
    systems = {name or "orchestrator": own(program) for name, _, program in named}
    systems |= {f"{name} {version(packages, name)}": peer(name, packages) for name in PEERS}
    runs: list[Run] = []
    if results and results.exists():
        runs = [Run(**json.loads(line)) for line in results.read_text().splitlines()]
    with ExitStack() as running:
        url = database_url or running.enter_context(EmbeddedPostgres.temporary()).url()
        notes = running.enter_context((results or Path(os.devnull)).open("a", buffering=1))
        for each in scenario or EVENTS:
            for n in range(rounds):
                for system in list(systems)[:: -1 if n % 2 else 1]:
                    with new_database(url) as empty:
                        count = events or EVENTS[each]
                        runs.append(Run(system, each, count, systems[system](empty, each, count)))
                    notes.write(json.dumps(runs[-1]._asdict()) + "\n")
    for each in scenario or EVENTS:
        click.echo(f"\n{table(runs, each)}")


if __name__ == "__main__":
    main()
