"""Records the results of attempts in batches, and hands unused leases back.

A result counts only for the attempt number that its lease was given: this fencing makes a result stale once another
dispatcher has claimed the event.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from orchestrator.database import Claimed, Finished, Leases, NotDelivered
from orchestrator.dispatch.lock_holders import LockHolders
from orchestrator.dispatch.spans import DeliverySpans
from orchestrator.errors import Blocked, ValidationError
from orchestrator.events.tracing import followed
from orchestrator.metrics import Metrics

ANSWER_S = 30.0
"""How long a call of the database may take; one that hangs is given up, and the connection with it."""
_MAX_BATCH = 1000
_GATHER_S = 0.025
_REFUSED = "error text refused by the database"
_CAREFUL_S = 1.0  # after another session held a batch up; nothing is waited for meanwhile
_FIRST_ASIDE_S = 0.05
_LAST_ASIDE_S = 0.5

_Record = Callable[[Sequence[Finished]], Awaitable[list[NotDelivered]]]

_log = logging.getLogger(__name__)


class Finisher:
    """Gathers results until there are 1,000, or for 25 ms, and records them with one call.

    Results that others wait for are recorded at once, and `on_freed` is called when they are.

    What it holds survives the loss of the database: `run` is called again with new connections and goes on. A
    batch whose reply was lost is sent again; the database answers a repeated result as done, not as stale.

    When another session's open transaction holds some events of a batch, the others are recorded; those are set aside
    and tried again at growing intervals. Nobody can claim them either until that transaction ends.
    """

    def __init__(
        self,
        metrics: Metrics,
        on_retry: Callable[[float], None],
        on_freed: Callable[[], None] = lambda: None,
        on_recorded: Callable[[], None] = lambda: None,
        spans: DeliverySpans | None = None,
    ) -> None:
        self._metrics = metrics
        self._on_retry = on_retry
        self._on_freed = on_freed
        self._on_recorded = on_recorded
        self._spans = spans
        self._results: list[Finished] = []
        self._unused: list[Claimed] = []
        self._ready = asyncio.Event()
        self._full = asyncio.Event()
        self._closing = False
        self._freeing = 0  # other events wait for one of this many results, the first
        self._aside: list[Finished] = []
        self._unused_aside: list[Claimed] = []
        self._aside_s = _FIRST_ASIDE_S
        self._taking_up: asyncio.TimerHandle | None = None
        self._careful_until_s = 0.0
        self._holders = LockHolders(
            "results are set aside and tried again while another session's open transaction holds their events"
        )
        metrics.results_set_aside.set_function(lambda: len(self._aside) + len(self._unused_aside))

    def add(self, *results: Finished, at_once: bool = False) -> None:
        self._results += results
        self._ready.set()
        if at_once:
            self._freeing = len(self._results)
            self._full.set()
        elif len(self._results) >= _MAX_BATCH:
            self._full.set()

    def release(self, leases: Sequence[Claimed]) -> None:
        """Hands back leases without an attempt."""
        self._unused.extend(leases)
        self._ready.set()

    @property
    def unrecorded(self) -> int:
        """Results that the next batches will record."""
        return len(self._results)

    @property
    def pending(self) -> int:
        return self._at_hand + len(self._aside) + len(self._unused_aside)

    @property
    def _at_hand(self) -> int:
        return len(self._results) + len(self._unused)

    @property
    def done(self) -> bool:
        """Closed, and everything recorded."""
        return self._closing and not self.pending

    def close(self) -> None:
        """Lets `run` return as soon as everything is recorded."""
        self._closing = True
        self._ready.set()
        self._full.set()

    async def run(self, leases: Leases) -> None:
        """Records until closed and empty. When it raises, it still holds every result that is not recorded."""
        while not self.done:
            await self._ready.wait()
            if not self._closing and not self._freeing and len(self._results) < _MAX_BATCH:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_GATHER_S):
                        await self._full.wait()
            self._full.clear()
            await self._record_batch(leases)
            if not self._at_hand:
                self._ready.clear()

    async def flush(self, leases: Leases) -> None:
        """Records all that it holds now, except what is set aside."""
        while self._at_hand:
            await self._record_batch(leases)

    async def _record_batch(self, leases: Leases) -> None:
        if self._results:
            batch = self._results[:_MAX_BATCH]
            began_s = time.monotonic()
            with self._metrics.finish_seconds.time():
                exceptions = await self._finish_all(leases, batch)
            took_s = time.monotonic() - began_s
            del self._results[: len(batch)]
            blocked = {_lease(exception) for exception in exceptions if exception.result == "blocked"}
            self._aside += [result for result in batch if _lease(result) in blocked]
            recorded = [result for result in batch if _lease(result) not in blocked]
            self._report(recorded, exceptions)
            if self._spans is not None:
                ends = {_lease(exception): exception.result for exception in exceptions}
                self._spans.recorded(recorded, ends, took_s)
            if self._freeing:
                self._freeing = max(0, self._freeing - len(batch))
                self._on_freed()
            self._on_recorded()
        if self._unused:
            unused = self._unused[:_MAX_BATCH]
            released, held = await self._release_all(leases, unused)
            del self._unused[: len(unused)]
            self._unused_aside += [lease for lease in unused if lease.event_id in held]
            self._metrics.events_released_total.inc(released)
        if self._aside or self._unused_aside:
            await self._note_aside(leases)
        else:
            self._aside_s = _FIRST_ASIDE_S

    async def _finish_all(self, leases: Leases, batch: Sequence[Finished]) -> list[NotDelivered]:
        """Records the results whose events no other session holds; the others are answered as blocked."""
        if not self._careful:
            try:
                return await self._finish(leases.finish, batch)
            except Blocked:
                self._be_careful()
        try:
            return await self._finish(leases.finish_free, batch)
        except Blocked:  # the whole table
            self._be_careful()
            return [NotDelivered(result.event_id, "blocked", None, result.attempt) for result in batch]

    async def _release_all(self, leases: Leases, unused: Sequence[Claimed]) -> tuple[int, set[str]]:
        try:
            async with asyncio.timeout(ANSWER_S):
                if not self._careful:
                    return await leases.release(unused), set()
                return await leases.release_free(unused)
        except Blocked:
            if self._careful:
                return 0, {lease.event_id for lease in unused}
            self._be_careful()
            return await self._release_all(leases, unused)

    @property
    def _careful(self) -> bool:
        return bool(self._aside or self._unused_aside) or time.monotonic() < self._careful_until_s

    def _be_careful(self) -> None:
        self._careful_until_s = time.monotonic() + _CAREFUL_S

    async def _note_aside(self, leases: Leases) -> None:
        """Schedules the next try for what is set aside, and logs who holds it up."""
        if self._taking_up is None:
            self._taking_up = asyncio.get_running_loop().call_later(self._aside_s, self._take_up)
            self._aside_s = min(_LAST_ASIDE_S, 2 * self._aside_s)
        await self._holders.tell(leases, results=len(self._aside) + len(self._unused_aside))

    def _take_up(self) -> None:
        self._taking_up = None
        self._careful_until_s = time.monotonic() + _CAREFUL_S
        self._results += self._aside
        self._unused += self._unused_aside
        self._aside, self._unused_aside = [], []
        self._ready.set()

    async def _finish(self, record: _Record, batch: Sequence[Finished]) -> list[NotDelivered]:
        """Records a batch. Bisecting finds a result that the database refuses, so that it holds up no other."""
        try:
            async with asyncio.timeout(ANSWER_S):
                return await record(batch)
        except (ValidationError, UnicodeError) as error:  # the latter before anything was sent
            if len(batch) > 1:
                middle = len(batch) // 2
                return await self._finish(record, batch[:middle]) + await self._finish(record, batch[middle:])
            (result,) = batch
            context: dict[str, object] = {"attempt": result.attempt, "error": str(error)}
            context |= followed(result.event_id, result.correlation_id, result.traceparent)
            if result.error in (None, _REFUSED) and not result.response:
                _log.error("the database refused a result; its lease runs out", extra=context)
                return [NotDelivered(result.event_id, "stale", None, result.attempt)]
            # A result without its text is worth more than none.
            _log.error("the database refused the text of a result; the result is recorded without it", extra=context)
            result.error, result.response = result.error and _REFUSED, None
            return await self._finish(record, batch)

    def _report(self, batch: Sequence[Finished], exceptions: Sequence[NotDelivered]) -> None:
        delivered = sum(result.result == "delivered" for result in batch)
        given = {_lease(result): result for result in batch} if exceptions else {}
        for exception in exceptions:
            if (attempt := given.get(_lease(exception))) is None:
                continue  # blocked, and set aside
            context: dict[str, object] = {}
            context |= followed(exception.event_id, attempt.correlation_id, attempt.traceparent)
            if attempt.error:
                context |= {"attempt": attempt.attempt, "error": attempt.error}
            if exception.result == "retried":
                self._metrics.events_retried_total.inc()
                _log.info("attempt failed, will be repeated", extra=context)
                if exception.due_at is not None:
                    self._on_retry(exception.due_at)
            elif exception.result == "dead":
                self._metrics.events_dead_total.inc()
                _log.warning("event is dead", extra=context)
            else:
                delivered -= attempt.result == "delivered"
                self._metrics.events_stale_total.inc()
                _log.warning("lease was lost before its result was recorded", extra=context)
        self._metrics.events_delivered_total.inc(delivered)


def _lease(of: Finished | NotDelivered) -> tuple[str, int]:
    return of.event_id, of.attempt
