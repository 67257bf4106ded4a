"""Records the results of attempts in batches, and hands unused leases back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from orchestrator.database import Claimed, Finished, Leases, NotDelivered
from orchestrator.errors import ValidationError
from orchestrator.metrics import Metrics

ANSWER_S = 30.0
"""How long a call of the database may take; one that hangs is given up, and the connection with it."""
_MAX_BATCH = 1000
_FULL_BATCH = 500
_GATHER_S = 0.025
_REFUSED = "error text refused by the database"

_log = logging.getLogger(__name__)


class Finisher:
    """Gathers results until there are 500, or for 25 ms, and records them with one call.

    Results that others wait for are recorded at once, and `on_freed` is called when they are.

    What it holds survives the loss of the database: `run` is called again with new connections and goes on. A
    batch whose reply was lost is sent again; the database answers a repeated result as done, not as stale.
    """

    def __init__(
        self, metrics: Metrics, on_retry: Callable[[float], None], on_freed: Callable[[], None] = lambda: None
    ) -> None:
        self._metrics = metrics
        self._on_retry = on_retry
        self._on_freed = on_freed
        self._results: list[Finished] = []
        self._unused: list[Claimed] = []
        self._ready = asyncio.Event()
        self._full = asyncio.Event()
        self._closing = False
        self._freeing = 0  # of the results, up to which others wait for

    def add(self, *results: Finished, at_once: bool = False) -> None:
        self._results += results
        self._ready.set()
        if at_once:
            self._freeing = len(self._results)
            self._full.set()
        elif len(self._results) >= _FULL_BATCH:
            self._full.set()

    def release(self, leases: Sequence[Claimed]) -> None:
        """Hands leases back that no attempt was made on."""
        self._unused.extend(leases)
        self._ready.set()

    @property
    def pending(self) -> int:
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
        """Records until closed and empty. Whatever it raises, it still holds what is unrecorded."""
        while not self.done:
            await self._ready.wait()
            if not self._closing and not self._freeing and len(self._results) < _FULL_BATCH:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_GATHER_S):
                        await self._full.wait()
            self._full.clear()
            await self._record_batch(leases)
            if not self._closing and not self.pending:
                self._ready.clear()

    async def flush(self, leases: Leases) -> None:
        """Records all that it holds now."""
        while self.pending:
            await self._record_batch(leases)

    async def _record_batch(self, leases: Leases) -> None:
        if self._results:
            batch = self._results[:_MAX_BATCH]
            with self._metrics.finish_seconds.time():
                exceptions = await self._finish(leases, batch)
            del self._results[: len(batch)]
            self._report(batch, exceptions)
            if self._freeing:
                self._freeing = max(0, self._freeing - len(batch))
                self._on_freed()
        if self._unused:
            unused = self._unused[:_MAX_BATCH]
            async with asyncio.timeout(ANSWER_S):
                released = await leases.release(unused)
            del self._unused[: len(unused)]
            self._metrics.events_released_total.inc(released)

    async def _finish(self, leases: Leases, batch: Sequence[Finished]) -> list[NotDelivered]:
        """Records; what the database refuses is found by bisecting, so that it holds up nothing else."""
        try:
            async with asyncio.timeout(ANSWER_S):
                return await leases.finish(batch)
        except (ValidationError, UnicodeError) as error:  # the latter before anything was sent
            if len(batch) > 1:
                middle = len(batch) // 2
                return await self._finish(leases, batch[:middle]) + await self._finish(leases, batch[middle:])
            (result,) = batch
            context = {"event_id": result.event_id, "attempt": result.attempt, "reason": str(error)}
            if result.error in (None, _REFUSED) and not result.response:
                _log.error("the database refused a result; its lease runs out", extra=context)
                return [NotDelivered(result.event_id, "stale", None)]
            # A result is worth more than the words about it.
            _log.error("the database refused the text of a result, which is recorded without", extra=context)
            result.error, result.response = result.error and _REFUSED, None
            return await self._finish(leases, batch)

    def _report(self, batch: Sequence[Finished], exceptions: Sequence[NotDelivered]) -> None:
        stale = {exception.event_id for exception in exceptions if exception.result == "stale"}
        delivered = sum(result.result == "delivered" and result.event_id not in stale for result in batch)
        self._metrics.events_delivered_total.inc(delivered)
        failed = {result.event_id: result for result in batch if result.error} if exceptions else {}
        for exception in exceptions:
            attempt = failed.get(exception.event_id)
            context = {"event_id": exception.event_id}
            if attempt:
                context |= {"attempt": str(attempt.attempt), "error": str(attempt.error)}
            if exception.result == "retried":
                self._metrics.events_retried_total.inc()
                _log.info("attempt failed, will be repeated", extra=context)
                if exception.due_at is not None:
                    self._on_retry(exception.due_at)
            elif exception.result == "dead":
                self._metrics.events_dead_total.inc()
                _log.warning("event is dead", extra=context)
            else:
                self._metrics.events_stale_total.inc()
                _log.warning("lease was lost before its result was recorded", extra=context)
