"""Turns many concurrent submissions of one event each into few calls of the database.

There is no timer: a flusher that is free takes all that waits. So a lone request is not held up, and the batches
grow by themselves when requests arrive faster than the database commits.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from orchestrator.api.problems import Problem, as_problem, unavailable
from orchestrator.database import Database, Submitted, submit_all
from orchestrator.events import Submission

FLUSHERS = 2
MAX_BATCH = 1000
MAX_WAITING = 10_000
FLUSH_TIMEOUT_S = 15.0
DEADLINE_S = 2 * FLUSH_TIMEOUT_S

_Waiting = tuple[Submission, asyncio.Future[Submitted], float]
"""What is to be kept, who waits for it, and since when."""


_UNKNOWN = (
    f"Not known to be kept after {FLUSH_TIMEOUT_S:.0f} seconds. Submitting it again with the same source, "
    "external_job_id, scheduled_at and ordering_key is safe: it is kept once."
)


class Gatherer:
    """Made by `gathering`; `submit` may be called from any number of tasks at once."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: deque[_Waiting] = deque()
        self._idle: deque[asyncio.Future[None]] = deque()
        self._closing = False

    async def submit(self, submission: Submission) -> Submitted:
        """Answers when the event is committed. Raises a problem: 503 when the database is away or overloaded."""
        if self._closing or len(self._waiting) >= MAX_WAITING:
            raise unavailable("More submissions wait than can be kept up with. Try again shortly.")
        done: asyncio.Future[Submitted] = asyncio.get_running_loop().create_future()
        self._waiting.append((submission, done, time.monotonic()))
        self._wake_one()
        return await done

    def _wake_one(self) -> None:
        while self._idle:
            idle = self._idle.popleft()
            if not idle.done():
                idle.set_result(None)
                return

    async def flush_for_ever(self) -> None:
        while True:
            if not self._waiting:
                if self._closing:
                    return
                idle = asyncio.get_running_loop().create_future()
                self._idle.append(idle)
                await idle
                continue
            batch = self._take()
            if batch:
                await self._flush(batch)

    def _take(self) -> list[_Waiting]:
        # No request has a timer of its own: flushes end in time, and what waited too long is told so here.
        batch: list[_Waiting] = []
        oldest = time.monotonic() - DEADLINE_S
        while self._waiting and len(batch) < MAX_BATCH:
            _, done, since = waiting = self._waiting.popleft()
            if done.done():  # its request gave up
                continue
            if since < oldest:
                done.set_exception(unavailable("The database does not keep up. Try again shortly."))
            else:
                batch.append(waiting)
        return batch

    async def _flush(self, batch: list[_Waiting]) -> None:
        try:
            async with asyncio.timeout(FLUSH_TIMEOUT_S):
                results = await submit_all(self._database, [submission for submission, _, _ in batch])
        except TimeoutError:
            self._fail(batch, unavailable(_UNKNOWN))
        except Exception as error:  # told and logged once; each request answers for itself, the flusher goes on
            self._fail(batch, as_problem(error))
        else:
            for (_, done, _), result in zip(batch, results, strict=True):
                if not done.done():
                    done.set_result(result)

    def _fail(self, batch: list[_Waiting], problem: Problem) -> None:
        for _, done, _ in batch:
            if not done.done():
                done.set_exception(Problem(problem.kind, problem.detail, headers=problem.headers))

    def close(self) -> None:
        """Take no more; the flushers end when nothing waits."""
        self._closing = True
        while self._idle:
            self._wake_one()


@asynccontextmanager
async def gathering(database: Database) -> AsyncIterator[Gatherer]:
    """A gatherer with its flushers; what was submitted before the end is flushed at the end."""
    gatherer = Gatherer(database)
    flushers = [asyncio.create_task(gatherer.flush_for_ever()) for _ in range(FLUSHERS)]
    try:
        yield gatherer
    finally:
        gatherer.close()
        _, late = await asyncio.wait(flushers, timeout=DEADLINE_S)
        for flusher in late:
            flusher.cancel()
        await asyncio.gather(*flushers, return_exceptions=True)
