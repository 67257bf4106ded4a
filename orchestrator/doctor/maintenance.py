"""Checks of maintenance: its last run, dead letters, retention, and partitions that wait for the archive."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.database.connection import BlockingConnection
from orchestrator.database.maintenance import CONDITION, Condition
from orchestrator.doctor.finding import Finding, counted, guarded, ok, problem, warning
from orchestrator.settings import Settings

_RARE_S = 2 * 3600.0
_FORGOTTEN_S = 86_400.0
_SHOWN = 3
_COUNTED = 10_000
_EVERY = (
    "make sure that orchestrator run or maintain is running, or that cron or pg_cron (ops/pg_cron.sql) does the work"
)


def maintenance_findings(connection: BlockingConnection, settings: Settings) -> Iterator[Finding]:
    yield from guarded("maintenance", lambda: _maintenance(connection))
    yield from guarded("retention", lambda: _retention(connection, settings))
    yield from guarded("archive", lambda: _archive(connection))


def _maintenance(connection: BlockingConnection) -> Iterator[Finding]:
    row = connection.execute(CONDITION).fetchone()
    assert row is not None
    found = Condition(*row)
    if found.age_s is None:
        yield problem("maintenance", "maintenance has never run", _EVERY)
    elif found.age_s > _RARE_S:
        level = problem if found.age_s > _FORGOTTEN_S else warning
        yield level("maintenance", f"maintenance last ran {found.age_s / 3600:.0f} hours ago", _EVERY)
    else:
        yield ok("maintenance", f"maintenance last ran {max(0.0, found.age_s):.0f} s ago")
    for each in found.problems:
        yield warning(
            "maintenance",
            f"step {each['step']} failed in that run: {each['problem']}",
            "each run tries it again; the table maintenance_run says how often it has failed",
        )
    yield ok("horizon", f"about {counted(found.horizon, 'event')} due after the last partition")
    yield _dead_letters(found)


def _dead_letters(found: Condition) -> Finding:
    if not found.dead_letters:
        return ok("dead letters", "there are no dead letters")
    what = f"{_at_least(found.dead_letters)} ran out of attempts"
    if found.expiring:
        what += f"; retention drops {_at_least(found.expiring)} of them within a day"
    return warning("dead letters", what, "to see why: orchestrator dead-letters list; then redrive or purge them")


def _at_least(count: int) -> str:
    return counted(count, "event") if count < _COUNTED else f"{_COUNTED:,} events or more"


def _retention(connection: BlockingConnection, settings: Settings) -> Iterator[Finding]:
    row = connection.execute(
        "select retention_days, partition_days_ahead, max_schedule_ahead_days, partitioned_by from orchestrator.control"
    ).fetchone()
    assert row is not None
    *told, partitioned_by = row
    names = ("CLEANUP_RETENTION_DAYS", "PARTITION_DAYS_AHEAD", "MAX_SCHEDULE_AHEAD_DAYS")
    ours = (settings.retention_days, settings.partition_days_ahead, settings.max_schedule_ahead_days)
    other = [
        f"{name} is {here} here and {there} in the database"
        for name, here, there in zip(names, ours, told, strict=True)
        if here != there
    ]
    if other:
        yield warning(
            "retention",
            f"the database has other values: {', '.join(other)}",
            "set the same values everywhere; the process that maintains the database stores its own when it starts",
        )
    else:
        yield ok("retention", f"events are kept for {counted(told[0], 'day')}; partitions are made by {partitioned_by}")


def _archive(connection: BlockingConnection) -> Iterator[Finding]:
    rows = connection.execute(
        "select r.name, count(*) over () from orchestrator.retired_partition r, orchestrator.control c"
        " where c.archive and r.archived_at is null and r.detached_at < orchestrator.now() - interval '1 day'"
        " order by r.name limit %s",
        (_SHOWN,),
    ).fetchall()
    if not rows:
        yield ok("archive", "no partition has waited longer than a day to be archived")
        return
    names = ", ".join(name for name, _ in rows) + (", …" if rows[0][1] > len(rows) else "")
    yield warning(
        "archive",
        f"{counted(rows[0][1], 'partition')} past retention not archived yet: {names}",
        "see the log of the process that maintains the database; it needs an ARCHIVE_DIRECTORY with free space",
    )
