"""``demo``: events go through the whole system, and the receiver counts them."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from orchestrator.cli.support import console, environ, exit_with, json_option, print_json

if TYPE_CHECKING:
    from orchestrator.dev.demo import Progress
    from orchestrator.dev.demo_result import Result

_INTERRUPTED = 130


@click.command()
@click.option(
    "--events", type=click.IntRange(1, 1_000_000), default=10_000, show_default=True, help="Number of events."
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 600),
    default=10.0,
    show_default=True,
    help="Time over which the half that is not due at one instant is spread.",
)
@click.option("--dispatchers", type=click.IntRange(1, 16), default=2, show_default=True, help="Dispatcher processes.")
@click.option(
    "--database-url",
    help="Database to use; the events stay in it. [default: an embedded server, which is removed afterwards]",
)
@json_option
def demo(events: int, seconds: float, dispatchers: int, database_url: str | None, as_json: bool) -> None:
    """Send events through the whole system and count what arrives.

    Starts PostgreSQL, a Kafka broker, two APIs, an ingester, dispatchers and a receiver of webhooks, each in a process
    of its own. Submits events over REST, half of them through Kafka and half of them due at the same instant, and
    compares the deliveries with the submissions.
    Exits with 1 if an event was lost, repeated or early. Lateness is the time from scheduled_at to the arrival at the
    receiver; events/s is the rate at which the half due at one instant was delivered.
    """
    from orchestrator.dev.demo import Plan, demonstrate

    try:
        with _progress(events) as show:
            result = demonstrate(Plan(events, seconds, dispatchers, database_url), environ(), show)
    except (asyncio.CancelledError, KeyboardInterrupt):
        click.echo("Interrupted; all processes that it started are stopped.", err=True)
        click.get_current_context().exit(_INTERRUPTED)
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        _print(result)
    exit_with(result.flawless)


@contextmanager
def _progress(events: int) -> Iterator[Callable[[Progress], None]]:
    """Shows the progress on standard error; on a pipe, each stage once."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    err = console(stderr=True)
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bars(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        submitted = bars.add_task("submitted", total=events, note="")
        delivered = bars.add_task("delivered", total=events, note="")
        stage = ""

        def show(progress: Progress) -> None:
            nonlocal stage
            if progress.stage != stage:
                stage = progress.stage
                err.print(f"{stage} …")
            note = ""
            if progress.herd_at is not None and (left_s := progress.herd_at - time.time()) > 0:
                note = f"{events - events // 2:,} of them due in {left_s:.0f} s"
            bars.update(submitted, completed=progress.submitted)
            bars.update(delivered, completed=progress.delivered, note=note)

        yield show


def _print(result: Result) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for name, count, about in (
        ("submitted", result.submitted, f"over REST, in batches; {result.through_kafka:,} of them through Kafka"),
        ("delivered", result.delivered, "signed, and verified by the receiver"),
        ("lost", result.lost, ""),
        ("duplicated", result.duplicated, ""),
        ("early", result.early, "arrived before scheduled_at"),
    ):
        wrong = count if name in ("lost", "duplicated", "early") else 0
        table.add_row(name, f"{count:,}", about, style="bold red" if wrong else None)
    late = result.lateness_ms
    for name, value in (("p50", late.p50), ("p99", late.p99), ("max", late.max)):
        table.add_row(f"lateness {name}", f"{value:,.1f} ms", "from scheduled_at to arrival" if name == "p50" else "")
    herd = result.submitted - result.submitted // 2
    table.add_row("events/s", f"{result.events_per_s:,.0f}", f"while the {herd:,} due at one instant were delivered")
    out = console()
    out.print(table)
    out.print(
        "[green]Every event arrived once, and none early.[/]"
        if result.flawless
        else "[bold red]Events were lost, repeated or early.[/]"
    )
