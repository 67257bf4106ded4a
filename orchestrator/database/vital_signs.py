"""What metrics and doctor ask about the state of the database."""

from __future__ import annotations

from typing import LiteralString, NamedTuple

from orchestrator.database.gateway import Database

DUE_SOON = {"1m": "1 min", "10m": "10 min", "1h": "1 hour"}
"""How far ahead it counts what falls due: the value of the label, and the interval."""


class VitalSigns(NamedTuple):
    """One row of orchestrator.vital_signs(). What holds vacuum back is 0 when nothing does."""

    oldest_due_s: float
    xmin_s: float
    xmin_transactions: int
    timers: int
    dead_timers: int
    timer_bytes: int
    timer_index_bytes: int
    connections: int
    max_connections: int


class HeldDestination(NamedTuple):
    """A destination that is ``paused``, or held by its ``breaker``, and for how long."""

    name: str
    reason: str
    held_s: float


class Outlook(NamedTuple):
    """How many events fall due soon, by the keys of DUE_SOON, and the size of the database."""

    due: dict[str, int]
    database_bytes: int


VITAL_SIGNS: LiteralString = "select * from orchestrator.vital_signs()"
_HELD: LiteralString = "select name, reason, seconds from orchestrator.held_destinations()"
_OUTLOOK: LiteralString = """
select array(select orchestrator.due_soon(w::interval) from unnest(%s::text[]) with ordinality as u (w, n) order by n)
     , pg_database_size(current_database())
"""


async def vital_signs(database: Database) -> VitalSigns:
    """Raises what `Pool` does, as the others here."""
    [row] = await database.rows(VITAL_SIGNS)
    return VitalSigns(*row)


async def held_destinations(database: Database) -> list[HeldDestination]:
    """Those held longest, up to 50."""
    return [HeldDestination(*row) for row in await database.rows(_HELD)]


async def outlook(database: Database) -> Outlook:
    [[counts, database_bytes]] = await database.rows(_OUTLOOK, list(DUE_SOON.values()))
    return Outlook(dict(zip(DUE_SOON, counts, strict=True)), database_bytes)
