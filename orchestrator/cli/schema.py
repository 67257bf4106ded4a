"""``migrate`` and ``maintain``: the schema and the upkeep of the database."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from orchestrator.cli.support import (
    console,
    duration,
    environ,
    exit_with,
    json_option,
    plain,
    print_json,
    settings,
)

if TYPE_CHECKING:
    from orchestrator.database.maintenance import Upkeep


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 if files are pending.")
@json_option
def migrate(check: bool, as_json: bool) -> None:
    """Create the schema of the database, or upgrade it.

    Safe to run at any time and from many replicas at once: it works in one transaction under a lock, and does nothing
    if the schema is up to date. The user needs the rights to create a schema and roles.

    It records CUSTOMER_NAME in a database that has no customer yet, and refuses a database of another customer.
    """
    from orchestrator.database import migrate as migrations
    from orchestrator.database import translated
    from orchestrator.database.maintenance import Retention

    ours = settings()
    with translated():
        if check:
            pending = migrations.check(ours.database_url)
            if as_json:
                print_json({"pending": pending})
            elif pending:
                _list("pending; run: orchestrator migrate", pending)
            else:
                console().print("The database is up to date.")
            exit_with(not pending)
            return
        told = Retention.given(ours, environ())
        report = migrations.migrate(
            ours.database_url, days_ahead=told.partition_days_ahead, retention=told, customer=ours.named_customer
        )
    if as_json:
        print_json({"applied": report.applied, "partitions_created": report.partitions_created})
    elif report.applied:
        _list("applied", report.applied)
        console().print(f"{report.partitions_created} daily partitions created.")
    else:
        made = report.partitions_created
        console().print("The database is up to date." + (f" {made} daily partitions created." if made else ""))


def _list(heading: str, files: list[str]) -> None:
    console().print("\n  ".join([f"{len(files)} {'file' if len(files) == 1 else 'files'} {heading}", *files]))


@click.command()
@click.option("--once", is_flag=True, help="Do the work that is due now, report it, and end.")
@json_option
def maintain(once: bool, as_json: bool) -> None:
    """Maintain the database only.

    Every minute, and again at once while work is left, it makes partitions, moves events from the horizon into them,
    archives and drops days past CLEANUP_RETENTION_DAYS, and folds statistics. `orchestrator run` does all this itself.
    Start this command beside `api` and `dispatch`, call it from cron with --once, or let pg_cron do the same work
    (ops/pg_cron.sql).

    With --once or --json it exits with 1 if a step failed. Retention settings that are not in its environment stay as
    they are in the database.
    """
    if not once and not as_json:
        from orchestrator.cli.serve import serve_role

        serve_role("maintain")
        return
    import asyncio

    from orchestrator.database.maintenance import Retention
    from orchestrator.maintenance.upkeep import maintain_once

    ours = settings()
    told, archived = asyncio.run(maintain_once(ours, Retention.given(ours, environ())))
    if as_json:
        print_json(
            {"skipped": told.skipped}
            if told.skipped is not None
            else {
                "runs": told.runs,
                "took_ms": told.took_ms,
                "more": told.more,
                **told.did,
                "archived": archived,
                "problems": [problem._asdict() for problem in told.problems],
            }
        )
    else:
        _show(told, archived)
    exit_with(not told.problems)


def _show(told: Upkeep, archived: list[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    out = console()
    if told.skipped is not None:
        out.print(f"Skipped: {told.skipped}.")
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right", style="bold")
    for name, count in sorted(told.did.items()):
        table.add_row(name.replace("_", " "), f"{count:,}", style=None if count else "dim")
    table.add_row("partitions archived", f"{len(archived):,}", style=None if archived else "dim")
    out.print(table)
    out.print(f"Done in {duration(told.took_ms / 1000)}" + ("; more work is left: run it again." if told.more else "."))
    for step, problem in told.problems:
        out.print(Text(f"✗ {step}: {plain(problem)}", style="bold red"))
