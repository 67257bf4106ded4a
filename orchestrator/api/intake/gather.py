"""Turns many concurrent submissions of one event each into few calls of the database.

There is no timer: a flusher that is free lets the event loop turn three times, then takes all that waits. So a lone
request is not held up, clients that were answered together are taken together when they come again, and the batches
grow by themselves when requests arrive faster than the database commits.

A submission that waits for another session's open transaction, as one whose id somebody has kept and not committed, is
set aside: all others of its batch are kept at once, and it is tried again until it is known, or for BLOCKED_S.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from orchestrator.api.problems import Problem, as_problem, blocked, unavailable
from orchestrator.database import Database, Submitted, submit_all, submit_free
from orchestrator.events.submission import Submission
from orchestrator.tasks import end, within

FLUSHERS = 2
MAX_BATCH = 1000
MAX_WAITING = 10_000
FLUSH_TIMEOUT_S = 15.0
DEADLINE_S = 2 * FLUSH_TIMEOUT_S
BLOCKED_S = 5.0
_TURNS = 3  # of the event loop: answers go out, requests come in, and their submissions are read
_FIRST_PAUSE_S = 0.1
_LAST_PAUSE_S = 0.5
_CAREFUL_S = 1.0  # after one was set aside: batches wait for nobody

_Waiting = tuple[Submission, asyncio.Future[Submitted], float]
"""What is to be kept, who waits for it, and since when."""


_UNKNOWN = (
    f"Not known to be kept after {FLUSH_TIMEOUT_S:.0f} seconds. Submitting it again with the same source, "
    "external_job_id, scheduled_at and ordering_key is safe: it is kept once."
)


class Gatherer:
    """Made by `gathering`; `submit` may be called from any number of tasks at once."""

    def __init__(self, database: Database, on_aside: Callable[[int], None]) -> None:
        self._database = database
        self._on_aside = on_aside
        self._aside: dict[str, list[_Waiting]] = {}
        self._aside_given = asyncio.Event()
        self._careful_until_s = 0.0
        self._waiting: deque[_Waiting] = deque()
        self._idle: deque[asyncio.Future[None]] = deque()
        self._closing = False

    async def submit(self, submission: Submission) -> Submitted:
        """Answers when the event is committed. Raises a problem: 503 when the database is away or overloaded."""
        if self._closing or len(self._waiting) + len(self._aside) >= MAX_WAITING:
            raise unavailable("More submissions wait than can be kept up with. Try again shortly.")
        done: asyncio.Future[Submitted] = asyncio.get_running_loop().create_future()
        waiting = submission, done, time.monotonic()
        if submission.id in self._aside:
            self._set_aside(waiting)
        else:
            self._waiting.append(waiting)
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
            for _ in range(_TURNS):
                await asyncio.sleep(0)
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
            submit = submit_free if time.monotonic() < self._careful_until_s else submit_all
            submitting = submit(self._database, [submission for submission, _, _ in batch])
            results = await within(FLUSH_TIMEOUT_S, submitting)
        except TimeoutError:
            self._fail(batch, unavailable(_UNKNOWN))
        except Exception as error:  # told and logged once; each request answers for itself, the flusher goes on
            self._fail(batch, as_problem(error))
        else:
            for waiting, result in zip(batch, results, strict=True):
                done = waiting[1]
                if result.result == "blocked":
                    self._set_aside(waiting)
                elif not done.done():
                    done.set_result(result)

    def _set_aside(self, waiting: _Waiting) -> None:
        self._careful_until_s = time.monotonic() + _CAREFUL_S
        self._aside.setdefault(waiting[0].id, []).append(waiting)
        self._aside_given.set()
        self._on_aside(1)

    async def try_aside_for_ever(self) -> None:
        """Tries what is set aside, each id once a round; tells those that have waited for BLOCKED_S."""
        pause_s = _FIRST_PAUSE_S
        while True:
            await self._aside_given.wait()
            await asyncio.sleep(pause_s)
            pause_s = min(_LAST_PAUSE_S, 2 * pause_s)
            await self._try_aside()
            if not self._aside:
                self._aside_given.clear()
                pause_s = _FIRST_PAUSE_S

    async def _try_aside(self) -> None:
        self._give_up()
        firsts = [several[0] for several in self._aside.values()]
        if not firsts:
            return
        self._careful_until_s = time.monotonic() + _CAREFUL_S
        try:
            submitting = submit_free(self._database, [submission for submission, _, _ in firsts])
            results = await within(FLUSH_TIMEOUT_S, submitting)
        except TimeoutError:
            self._fail(firsts, unavailable(_UNKNOWN))
        except Exception as error:
            self._fail(firsts, as_problem(error))
        else:
            for (submission, _, _), result in zip(firsts, results, strict=True):
                if result.result != "blocked":
                    self._settle(self._aside.pop(submission.id), result)

    def _settle(self, several: Sequence[_Waiting], result: Submitted) -> None:
        for n, (_, done, _) in enumerate(several):
            if not done.done():
                again = n > 0 and result.result == "accepted"
                done.set_result(result._replace(result="duplicate") if again else result)

    def _give_up(self) -> None:
        oldest = time.monotonic() - BLOCKED_S
        for event_id, several in list(self._aside.items()):
            self._fail([waiting for waiting in several if waiting[2] < oldest], blocked("Nothing was kept"))
            left = [waiting for waiting in several if not waiting[1].done()]
            if left:
                self._aside[event_id] = left
            else:
                del self._aside[event_id]

    async def end(self, trying: asyncio.Task[None]) -> None:
        """A last try for what is set aside."""
        await end(trying)
        await self._try_aside()
        self._fail([waiting for several in self._aside.values() for waiting in several], blocked("Nothing was kept"))

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
async def gathering(
    database: Database, on_aside: Callable[[int], None] = lambda count: None
) -> AsyncIterator[Gatherer]:
    """A gatherer with its flushers; what was submitted before the end is flushed at the end."""
    gatherer = Gatherer(database, on_aside)
    flushers = [asyncio.create_task(gatherer.flush_for_ever()) for _ in range(FLUSHERS)]
    aside = asyncio.create_task(gatherer.try_aside_for_ever())
    try:
        yield gatherer
    finally:
        gatherer.close()
        _, late = await asyncio.wait(flushers, timeout=DEADLINE_S)
        for flusher in late:
            flusher.cancel()
        await asyncio.gather(*flushers, return_exceptions=True)
        await gatherer.end(aside)


async def submit_patiently(
    database: Database, submissions: Sequence[Submission], on_aside: Callable[[int], None] = lambda count: None
) -> list[Submitted]:
    """As `submit_all`, but what is blocked is tried again for BLOCKED_S. Raises a problem, 503, when it still is."""
    results = await submit_all(database, submissions)
    ends_s, pause_s = time.monotonic() + BLOCKED_S, _FIRST_PAUSE_S
    on_aside(sum(result.result == "blocked" for result in results))
    while aside := [n for n, result in enumerate(results) if result.result == "blocked"]:
        if time.monotonic() > ends_s:
            raise blocked(f"{len(results) - len(aside)} of {len(results)} were kept, the others were not")
        await asyncio.sleep(pause_s)
        pause_s = min(_LAST_PAUSE_S, 2 * pause_s)
        for n, result in zip(aside, await submit_free(database, [submissions[n] for n in aside]), strict=True):
            results[n] = result
    return results
