"""Checks of what holds deliveries back: pauses, open breakers, and rate limits that are too low for the backlog."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from orchestrator.database.connection import BlockingConnection
from orchestrator.doctor.finding import Finding, counted, guarded, listed, ok, warning

_SHOWN = 3


def pause_and_limit_findings(connection: BlockingConnection) -> Iterator[Finding]:
    yield from guarded("pauses", lambda: _pauses(connection))
    yield from guarded("breakers", lambda: _breakers(connection))
    yield from guarded("rates", lambda: _rates(connection))


def _pauses(connection: BlockingConnection) -> Iterator[Finding]:
    row = connection.execute("select paused_at, destinations_paused from orchestrator.standstills()").fetchone()
    assert row is not None
    since, count = row
    if since is not None:
        yield warning("pauses", f"everything is paused since {_moment(since)}", "to continue: orchestrator resume")
    if count:
        rows = connection.execute(
            "select name, paused_at from orchestrator.lane where name is not null and paused_at is not null"
            " order by paused_at limit %s",
            (_SHOWN,),
        ).fetchall()
        names = listed([f"{name} since {_moment(at)}" for name, at in rows], count)
        yield warning(
            "pauses",
            f"{counted(count, 'destination')} paused: {names}",
            "to continue: orchestrator destinations resume NAME",
        )
    if since is None and not count:
        yield ok("pauses", "nothing is paused")


def _breakers(connection: BlockingConnection) -> Iterator[Finding]:
    rows = connection.execute(
        "select name, opened_at, count(*) over () from orchestrator.lane"
        " where name is not null and breaker <> 'closed' order by opened_at limit %s",
        (_SHOWN,),
    ).fetchall()
    if not rows:
        yield ok("breakers", "no breaker is open")
        return
    count = rows[0][2]
    names = listed([f"{name} since {_moment(at)}" for name, at, _ in rows], count)
    yield warning(
        "breakers",
        f"open for {counted(count, 'destination')}, because attempts fail: {names}",
        "fix the receiver; a trial follows by itself, or at once: orchestrator destinations close-breaker NAME",
    )


def _rates(connection: BlockingConnection) -> Iterator[Finding]:
    rows = connection.execute(
        "select f.destination, f.backlog, d.rate_per_second, count(*) over ()"
        " from orchestrator.backlog_forecast('1 s', '1 s') f join orchestrator.destination d on d.name = f.destination"
        " where d.rate_per_second is not null and f.drained_at > orchestrator.now() + interval '1 hour'"
        " order by f.drained_at desc limit %s",
        (_SHOWN,),
    ).fetchall()
    if not rows:
        yield ok("rates", "no backlog will take more than an hour at its destination's rate")
        return
    shown = [f"{name} ({counted(backlog, 'event')} at {rate:g} a second)" for name, backlog, rate, _ in rows]
    yield warning(
        "rates",
        f"overdue events will take more than an hour: {listed(shown, rows[0][3])}",
        "see orchestrator forecast; if the receiver can take more: orchestrator destinations set NAME --rate N",
    )


def _moment(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
