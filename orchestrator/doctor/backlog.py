"""Checks of the work: the backlog, leases that ran out, and dispatchers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from orchestrator.database.connection import BlockingConnection
from orchestrator.doctor.finding import Finding, counted, guarded, ok, problem, warning

_LATE_S = 10.0
_VERY_LATE_S = 120.0


def backlog_findings(connection: BlockingConnection) -> Iterator[Finding]:
    yield from guarded("dispatchers", lambda: _dispatchers(connection))
    yield from guarded("leases", lambda: _leases(connection))


def _dispatchers(connection: BlockingConnection) -> Iterator[Finding]:
    row = connection.execute("select orchestrator.statistics()::text").fetchone()
    assert row is not None
    statistics = json.loads(row[0])
    listening = connection.execute(
        "select count(*) from pg_stat_activity where datname = current_database()"
        " and application_name ~ '(^| )orchestrator listen$'"
    ).fetchone()
    count = listening[0] if listening else 0
    live = statistics["scheduled"] + statistics["retrying"] + statistics["in_flight"]
    if connection.pooled:
        yield ok("dispatchers", f"the pooler hides how many are connected; {counted(live, 'event')} to deliver")
    elif count:
        yield ok("dispatchers", f"{count} connected, {counted(live, 'event')} to deliver")
    elif live:
        yield warning(
            "dispatchers",
            f"no dispatcher is connected, but there is work: {counted(live, 'event')}",
            "start one: orchestrator run, or orchestrator dispatch",
        )
    else:
        yield ok("dispatchers", "no dispatcher is connected, and there is no event to deliver")
    yield _backlog(statistics, count or connection.pooled)


def _backlog(statistics: dict[str, Any], dispatchers: int | bool) -> Finding:
    if not statistics["oldest_due_at"]:
        return ok("backlog", "no due event waits to be claimed")
    now, oldest = (datetime.fromisoformat(statistics[key]) for key in ("at", "oldest_due_at"))
    late_s = (now - oldest).total_seconds()
    shown = f"{counted(statistics['backlog'], 'event')} due and not claimed, the oldest for {late_s:.0f} s"
    if late_s < _LATE_S:
        return ok("backlog", shown)
    if statistics["paused_at"]:
        return warning("backlog", shown, "everything is paused; to continue: orchestrator resume")
    if statistics["destinations_paused"] or statistics["breakers_open"]:
        mend = "some destinations are paused or fail; see orchestrator destinations list"
        return warning("backlog", shown, mend)
    mend = (
        "start more dispatchers, or raise SCHEDULER_BATCH_SIZE and HTTP_MAX_CONNECTIONS; slow receivers hold "
        "connections up to HTTP_TIMEOUT_SECONDS"
        if dispatchers
        else "start a dispatcher: orchestrator run, or orchestrator dispatch"
    )
    return (problem if late_s > _VERY_LATE_S else warning)("backlog", shown, mend)


def _leases(connection: BlockingConnection) -> Iterator[Finding]:
    row = connection.execute(
        "select count(*) from orchestrator.timer where lease_until < orchestrator.now() - interval '1 minute'"
    ).fetchone()
    count = row[0] if row else 0
    if count:
        yield warning(
            "leases",
            f"{counted(count, 'lease')} ran out over a minute ago, and no dispatcher claimed the events again",
            "start a dispatcher: orchestrator run, or orchestrator dispatch",
        )
    else:
        yield ok("leases", "no event waits for a new claim after its lease ran out")
