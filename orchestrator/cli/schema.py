"""``migrate`` and ``maintain``: what keeps the database fit."""

from __future__ import annotations

import click

from orchestrator.cli.support import console, exit_with, json_option, print_json, settings, with_database


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 when something is pending.")
@json_option
def migrate(check: bool, as_json: bool) -> None:
    """Bring the database up to this program's schema.

    Safe to run at any time and from many replicas at once: it is one transaction under a lock, and does nothing
    when all is up to date. The user needs the rights to create a schema and roles.
    """
    from orchestrator import migrate as migrations
    from orchestrator.database import translated

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
        report = migrations.migrate(ours.database_url, days_ahead=ours.partition_days_ahead)
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
@json_option
def maintain(as_json: bool) -> None:
    """Run the database's maintenance once.

    It makes partitions PARTITION_DAYS_AHEAD and folds statistics. `orchestrator run` does this every minute by
    itself; where only `api` and `dispatch` run, call this from cron, once an hour or more often.
    """
    done = with_database(lambda database, ours: database.run_maintenance(days_ahead=ours.partition_days_ahead))
    if as_json:
        print_json(done)
        return
    import json

    did = json.loads(done)
    if "skipped" in did:
        console().print(f"Skipped: {did['skipped']}.")
    else:
        console().print(", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in did.items()))
