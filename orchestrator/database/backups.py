"""Backups, as the scripts in ops/backup recorded them and as PostgreSQL archives WAL."""

from __future__ import annotations

from typing import LiteralString, NamedTuple

from orchestrator.database.gateway import Database


class Backup(NamedTuple):
    """What is known of one kind: logical, base, verify or wal.

    `last_success_s` is Unix time, None if there is no good one of this cluster. `age_s` is its age by the database's
    clock. `problem` says why the last run failed.
    """

    kind: str
    last_success_s: float | None
    age_s: float | None
    problem: str | None


async def backups(database: Database) -> list[Backup]:
    """All kinds. Raises DatabaseUnavailable, and OrchestratorError when the login may not ask."""
    return [Backup(*row) for row in await database.rows(BACKUPS)]


BACKUPS: LiteralString = """
select b.kind, extract(epoch from b.last_success)::float8
     , extract(epoch from clock_timestamp() - b.last_success)::float8, b.problem
from orchestrator.backups() b
"""
