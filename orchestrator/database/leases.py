"""A dispatcher's view of the database, on connections of its own: neither a claim nor a finish waits for a pool.

Fencing: a result counts only with the attempt number of its lease.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager
from operator import attrgetter
from typing import LiteralString, NamedTuple

import msgspec
from psycopg.rows import TupleRow

from orchestrator.database.connection import HOLDERS, Connection, connect, translated
from orchestrator.database.delivered import delivered_arguments, is_plain
from orchestrator.settings import Settings

NOTIFY_CHANNEL = "orchestrator_due"
_LEAST_PLAIN = 8  # fewer results cost more to encode for finish_delivered() than it saves
_EXPIRED = 11  # the column `lane`, which in the row of the claim itself counts leases that had run out
_PATIENCE = "100ms"  # claims and other finishes hold their locks for less


class Claimed(msgspec.Struct, gc=False):
    """A leased event. Times but `scheduled_at` are Unix seconds by the database's clock; JSON stays text.

    `key` is that of a record to Kafka: the event's ordering_key, or else its external_job_id. No attempt begins
    before `start_at`, its slot under a rate, nor at `expires_at` or later. `lane` is the queue it came from. `timer`,
    where its timer stands, and `waited` are handed back with the result.
    """

    claimed_at: float
    event_id: str
    attempt: int
    due_at: float
    start_at: float
    lease_until: float
    scheduled_at: str
    delivery_type: str
    destination: str | None
    key: str | None
    headers: str | None
    payload: str
    lane: int
    timer: str | None = None
    options: str | None = None
    waited: str | None = None
    expires_at: float | None = None
    correlation_id: str | None = None
    traceparent: str | None = None


class Finished(msgspec.Struct, gc=False):
    """The result of an attempt: ``delivered``, ``retry`` or ``fail``; times in Unix seconds by the database's clock.

    `timer` is where the claim left it, None: unknown. `correlation_id` is for the log alone.
    """

    event_id: str
    attempt: int
    result: str
    status_code: int | None
    started_at: float
    finished_at: float
    error: str | None
    response: str | None
    retry_after_s: float | None
    claimed_at: float
    waited: str | None = None
    correlation_id: str | None = None
    scheduled_at: str = ""
    due_at: float = 0.0
    timer: str | None = None


class NotDelivered(NamedTuple):
    """What `Leases.finish` made of a result: ``retried`` (due again at `due_at`), ``dead`` or ``stale``.

    ``blocked``, by `Leases.finish_free` alone: another session has the event; nothing was recorded.
    """

    event_id: str
    result: str
    due_at: float | None
    attempt: int


class Claims(NamedTuple):
    """What a claim gave. Times are Unix seconds by the database's clock.

    `database_s` was read before claiming. `again_at` says when limits, breakers or moves make another claim
    worthwhile; None: nothing but the caller's own poll. `locked_out`: how many claims in a row have left out lanes or
    ordering keys that another session has locked. `expired`: how many events had been leased before, without a result.
    """

    database_s: float
    events: list[Claimed]
    again_at: float | None
    locked_out: int = 0
    expired: int = 0


class Leases:
    """Claiming, finishing and releasing, on two connections, so that neither waits for the other."""

    def __init__(self, claiming: Connection, finishing: Connection, worker: int) -> None:
        self._claiming = claiming
        self._finishing = finishing
        self.worker = worker

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, worker_name: str, worker: int | None) -> AsyncGenerator[Leases, None]:
        """Connects; registers the process as a worker unless it has a number already."""
        async with (
            await connect(settings, "dispatch") as claiming,
            await connect(settings, "dispatch", lock_timeout=_PATIENCE) as finishing,
        ):
            if worker is None:
                with translated():
                    row = await (
                        await claiming.execute("select orchestrator.register_worker(%s)", (worker_name,))
                    ).fetchone()
                worker = row[0] if row else 0
            yield cls(claiming, finishing, worker)

    async def claim(
        self,
        batch: int,
        *,
        lease_s: float,
        lookahead_s: float,
        skip: Collection[int] = (),
        max_parallel: int | None = None,
    ) -> Claims:
        """Leases up to `batch` events due within `lookahead_s`, none from the lanes to `skip`.

        `max_parallel` bounds destinations with a lane of their own that say nothing themselves.
        """
        lanes = _array([str(lane) for lane in sorted(skip)])
        with translated():
            cursor = await self._claiming.execute(
                _CLAIM, (batch, self.worker, lease_s, lookahead_s, lanes, max_parallel)
            )
            rows = await cursor.fetchall()
        claim = rows.pop()
        _, locked_out, database_s, again_at, lease_until, *_ = claim
        events = [Claimed(database_s, *row) for row in rows]
        for event in events:  # most rows hold nothing where they are like the others
            event.start_at = event.start_at or event.due_at
            event.lease_until = event.lease_until or lease_until
        return Claims(database_s, events, again_at, locked_out or 0, claim[_EXPIRED] or 0)

    async def ensure_dedicated_lane(self, delivery_type: str, destination: str | None) -> int | None:
        """The dedicated lane of a destination, made unless there is one; None: too many were made this way."""
        with translated():
            row = await (await self._claiming.execute(_OWN_LANE, (delivery_type, destination))).fetchone()
        return row[0] if row else None

    async def next_due_at(self) -> tuple[float, float | None, float | None]:
        """The time now, when the next event that nobody holds is due, and when the next lease ends, in Unix seconds."""
        with translated():
            [times] = await (await self._claiming.execute(_NEXT_DUE)).fetchall()
        return times

    async def raise_floors(self) -> None:
        """Raises lane floors, so that later claims skip finished timers.

        On the connection that finishes, so that no claim waits for it.
        """
        with translated():
            await self._finishing.execute("select orchestrator.raise_floors()")

    async def backlog(self) -> int:
        """Events that are due and not claimed, counted up to 10,000 a lane; on the same connection as above."""
        with translated():
            row = await (await self._finishing.execute("select orchestrator.backlog()")).fetchone()
        return row[0] if row else 0

    async def finish(self, results: Sequence[Finished]) -> list[NotDelivered]:
        """Records results; answers those not delivered. Raises ValidationError for a text the database refuses.

        Raises Blocked, and has recorded nothing, when another session's open transaction holds any of the events, or
        a row that must change with them.
        """
        ordered = sorted(results, key=_event_id)
        plain = [result for result in ordered if is_plain(result)]
        if len(plain) >= _LEAST_PLAIN and (arguments := delivered_arguments(plain)) is not None:
            with translated():
                cursor = await self._finishing.execute(FINISH_DELIVERED, (*arguments, self.worker))
                row = await cursor.fetchone()
            missed = set(row[0] or ()) if row else set()
            if not missed and len(plain) == len(ordered):
                return []
            ordered = [result for result in ordered if result.event_id in missed or not is_plain(result)]
        return await self._record(_FINISH, ordered) if ordered else []

    async def finish_free(self, results: Sequence[Finished]) -> list[NotDelivered]:
        """As `finish`, without waiting: what another session holds is answered as blocked."""
        return await self._record(_FINISH_FREE, sorted(results, key=_event_id))

    async def _record(self, query: LiteralString, ordered: Sequence[Finished]) -> list[NotDelivered]:
        with translated():
            cursor = await self._finishing.execute(
                query,
                (
                    _array([r.event_id for r in ordered]),
                    _array([str(r.attempt) for r in ordered]),
                    _array([r.result for r in ordered]),
                    _array([str(r.status_code if r.status_code is not None else "null") for r in ordered]),
                    _array([repr(r.started_at) for r in ordered]),
                    _array([repr(r.finished_at) for r in ordered]),
                    [r.error for r in ordered] if any(r.error for r in ordered) else None,
                    [r.response for r in ordered] if any(r.response for r in ordered) else None,
                    _array([str(r.retry_after_s if r.retry_after_s is not None else "null") for r in ordered]),
                    self.worker,
                    _array([repr(r.claimed_at) for r in ordered]),
                    [r.waited for r in ordered] if any(r.waited for r in ordered) else None,
                ),
            )
            return [NotDelivered(*row) for row in await cursor.fetchall()]

    async def release(self, leases: Sequence[Claimed]) -> int:
        """Hands leases back unused; returns how many were still held. Raises Blocked as `finish`."""
        [(released,)] = await self._hand_back(_RELEASE, leases)
        return int(released)

    async def release_free(self, leases: Sequence[Claimed]) -> tuple[int, set[str]]:
        """As `release`, without waiting; names the events that another session holds, too."""
        [(released, blocked)] = await self._hand_back(_RELEASE_FREE, leases)
        return int(released), set(blocked)

    async def _hand_back(self, query: LiteralString, leases: Sequence[Claimed]) -> list[TupleRow]:
        ordered = sorted(leases, key=_event_id)
        ids, attempts = [lease.event_id for lease in ordered], [str(lease.attempt) for lease in ordered]
        with translated():
            return await (await self._finishing.execute(query, (_array(ids), _array(attempts)))).fetchall()

    async def holders(self) -> str:
        """The sessions whose open transactions may be in the way, for an operator."""
        with translated():
            row = await (await self._finishing.execute(HOLDERS)).fetchone()
        return row[0] if row else ""


_event_id = attrgetter("event_id")


def _array(values: list[str]) -> str:
    """A PostgreSQL array literal of values that need no quotes: a tenth of the cost of adapting a list."""
    return "{" + ",".join(values) + "}"


_CLAIM: LiteralString = """
select * from orchestrator.claim_for_dispatch(
  %s, %s, make_interval(secs => %s), make_interval(secs => %s), %s::integer[], %s::integer)
"""
_NEXT_DUE: LiteralString = """
select date_part('epoch', orchestrator.now()), date_part('epoch', orchestrator.next_due_at())
     , date_part('epoch', orchestrator.next_lease_end())
"""
_OWN_LANE: LiteralString = "select orchestrator.ensure_dedicated_lane(orchestrator.destination_name(%s, %s), false)"
FINISH_DELIVERED: LiteralString = """
select orchestrator.finish_delivered(
  %s::uuid[], %s::tid[], %s::integer[], %s::smallint[], %s::float8[], %s::integer[], %s::float8, %s::integer[],
  %s::integer[], %s::integer[], %s::integer, %s::smallint[], %s)::text[]
"""
_FINISH: LiteralString = """
select event_id, result, extract(epoch from due_at)::float8, attempt from orchestrator.finish_events(
  %s::uuid[], %s::integer[], %s::text[], %s::integer[], %s::float8[], %s::float8[], %s::text[], %s::text[],
  %s::float8[], %s, %s::float8[], %s::text[])
"""
_FINISH_FREE: LiteralString = """
select event_id, result, extract(epoch from due_at)::float8, attempt from orchestrator.finish_free_events(
  %s::uuid[], %s::integer[], %s::text[], %s::integer[], %s::float8[], %s::float8[], %s::text[], %s::text[],
  %s::float8[], %s, %s::float8[], %s::text[])
"""
_RELEASE: LiteralString = "select orchestrator.release_events(%s::uuid[], %s::integer[])"
_RELEASE_FREE: LiteralString = """
select coalesce(released, 0), blocked::text[] from orchestrator.release_free_events(%s::uuid[], %s::integer[])
"""
