"""Checks of the numbers that metrics tell of the database: dead timers, sessions, and whether they can be told."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.database.connection import BlockingConnection
from orchestrator.database.vital_signs import VITAL_SIGNS, VitalSigns
from orchestrator.doctor.finding import Finding, counted, guarded, ok, warning

_MANY_DEAD = 200_000
_SHARE = 0.9  # of max_connections


def vital_sign_findings(connection: BlockingConnection) -> Iterator[Finding]:
    yield from guarded("timers", lambda: _vital_signs(connection))
    yield from guarded("statistics", lambda: _visibility(connection))


def _vital_signs(connection: BlockingConnection) -> Iterator[Finding]:
    row = connection.execute(VITAL_SIGNS).fetchone()
    assert row is not None
    found = VitalSigns(*row)
    yield _timers(found)
    yield _sessions(found)


def _timers(found: VitalSigns) -> Finding:
    shown = f"about {counted(found.timers, 'live row')} and {found.dead_timers:,} dead ones"
    if found.dead_timers > max(_MANY_DEAD, found.timers):
        return warning(
            "timers",
            f"the table timer has {shown}: claims slow down",
            "see what holds vacuum back, above; then: vacuum (analyze) orchestrator.timer",
        )
    return ok("timers", shown)


def _sessions(found: VitalSigns) -> Finding:
    shown = f"{found.connections} of {found.max_connections} connections of the server are in use"
    if found.connections > _SHARE * found.max_connections:
        return warning("sessions", shown, "end idle sessions, use a pooler, or raise max_connections")
    return ok("sessions", shown)


def _visibility(connection: BlockingConnection) -> Iterator[Finding]:
    row = connection.execute(
        "select r.rolname, pg_has_role(r.oid, 'pg_read_all_stats', 'usage')"
        " from pg_namespace n join pg_roles r on r.oid = n.nspowner where n.nspname = 'orchestrator'"
    ).fetchone()
    assert row is not None
    owner, sees_all = row
    if sees_all:
        yield ok("statistics", f"{owner}, who owns the schema, sees the sessions of all users")
    else:
        yield warning(
            "statistics",
            f"{owner}, who owns the schema, does not see the sessions of other users; metrics of old "
            "transactions and of lock holders leave them out",
            f"as a superuser: grant pg_read_all_stats to {owner}",
        )
