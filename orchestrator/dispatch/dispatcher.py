"""Claims events shortly before they are due, delivers each on time, and records what came of it.

One process runs a claimer, a listener, a finisher, and deliveries over HTTP and to Kafka. The claimer keeps up to
SCHEDULER_PREFETCH leased events in memory; polling finds what is due, notifications only make it look sooner. Limits,
breakers and pauses are the database's to decide: a claim gives what may be attempted, and says when to claim again.
When the database goes away, deliveries go on, results wait, and claiming resumes with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import time
from contextlib import AsyncExitStack, suppress

from orchestrator.backoff import backoff_s
from orchestrator.database import NOTIFY_CHANNEL, Claims, Leases
from orchestrator.database.listening import listen
from orchestrator.dispatch.clock import DatabaseClock
from orchestrator.dispatch.finisher import ANSWER_S, Finisher
from orchestrator.dispatch.holders import Holders
from orchestrator.dispatch.http.deliveries import HttpDeliveries, Sender
from orchestrator.dispatch.kafka_deliveries import KafkaDeliveries
from orchestrator.errors import Blocked, DatabaseUnavailable, OrchestratorError
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings
from orchestrator.tasks import end, within

_CLAIM_GAP_S = 0.01  # between claims that found less than a batch
_LOCKED_GAP_S = 0.1  # before looking again for what is due but was not to be had, doubling up to
_LAST_LOCKED_GAP_S = 1.0
_LOCKED_OUT = 5  # claims in turn, before it is told that another session is in the way
_CLAIM_AHEAD_S = 0.25  # how long before it is due an expected event is claimed
_AGAIN_WITHIN_S = 0.02  # after the moment that a claim named, at random, so that dispatchers do not claim in step
_HOLD = "hold "
_STOPPING_BACKOFF_S = 0.5
_BACKLOG_EVERY_S = 5.0  # between counts of the backlog while claims come back full; else it is known to be nothing
_FLOORS_EVERY_S = 1.0
_FLOORS_AGAIN_S = 60.0  # after a failure
_ENDING_S = 1.0  # for a claim or an attempt to end when it is no longer wanted

_log = logging.getLogger(__name__)


class Dispatcher:
    """One per process. `run` works until `stop` is set, then ends within SHUTDOWN_TIMEOUT_SECONDS."""

    def __init__(self, settings: Settings, metrics: Metrics, sender: Sender) -> None:
        self._settings = settings
        self._metrics = metrics
        self._clock = DatabaseClock()
        self._finisher = Finisher(metrics, self._expect, self._note_freed)
        common = settings, metrics, self._clock, self._finisher, self._note_taken, self._note_room
        self._http = HttpDeliveries(*common, sender)
        self._kafka = KafkaDeliveries(*common)
        self._name = f"{settings.deployment} {socket.gethostname()}:{os.getpid()}"
        self._worker: int | None = None
        self._stopping = asyncio.Event()
        self._claiming = False
        self._has_claimed = False
        self._failures = 0  # to connect, since the last claim
        self._backlog_read_s = 0.0
        self._given = asyncio.Event()
        self._room = asyncio.Event()
        self._wake = asyncio.Event()
        self._wake_due = float("inf")
        self._freed = False
        self._low = -1  # the number held at which a claim is waited for
        self._locked_gap_s = _LOCKED_GAP_S
        self._holders = Holders(
            "claims leave out destinations or ordering keys that another session's open transaction has"
        )
        self._on_hold: set[int | None] = set()  # lanes put on hold since the last claim began; None: all
        metrics.events_held.set_function(lambda: self._held)
        metrics.events_in_flight.set_function(lambda: self._http.in_flight + self._kafka.in_flight)

    async def run(self, stop: asyncio.Event) -> None:
        """Dispatches until `stop` is set: then claims no more, lets running attempts end, releases the rest.

        A database that is away is waited for. Raises OrchestratorError when it refuses the first claim, for want
        of a schema or of rights; what once has worked is tried again for ever.
        """
        async with asyncio.TaskGroup() as tasks:
            recording = tasks.create_task(self._connected(), name="claim and finish")
            listening = tasks.create_task(listen(self._settings, NOTIFY_CHANNEL, self._on_notified), name="listen")
            deliveries = [tasks.create_task(self._http.run()), tasks.create_task(self._kafka.run())]
            await stop.wait()
            await self._stop(recording, listening, deliveries)

    async def _stop(
        self, recording: asyncio.Task[None], listening: asyncio.Task[None], deliveries: list[asyncio.Task[None]]
    ) -> None:
        timeout_s = self._settings.shutdown_timeout_s
        deadline_s = time.monotonic() + timeout_s
        self._stopping.set()
        self._stop_claiming()
        self._finisher.release(self._http.close() + self._kafka.close())
        _, running = await asyncio.wait(deliveries, timeout=0.8 * timeout_s)
        cut_short = self._http.in_flight + self._kafka.in_flight
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=_ENDING_S)
        self._finisher.close()
        # Without a claim there is nothing to record, but perhaps one on its way.
        left_s = max(0.5, deadline_s - time.monotonic()) if self._has_claimed else _ENDING_S
        await asyncio.wait([recording], timeout=left_s)
        recording.cancel()  # ends both of its tasks as end() does
        await end(listening)
        if cut_short or self._finisher.pending:
            _log.warning(
                "stopped with work unfinished; leases that could not be handed back run out by themselves",
                extra={"attempts_cut_short": cut_short, "results_unrecorded": self._finisher.pending},
            )

    async def _connected(self) -> None:
        """Claims and finishes; connects again, with backoff, for as long as it takes."""
        while not self._finisher.done:
            try:
                await self._connect_once()
            except (DatabaseUnavailable, TimeoutError) as error:
                message = str(error) or f"no answer within {ANSWER_S:g} s"
                await self._back_off(logging.WARNING, "the database is away; trying again", message)
            except Exception as error:
                if not self._has_claimed:
                    raise
                if not isinstance(error, OrchestratorError):
                    _log.exception("a call of the database failed in a way not foreseen")
                await self._back_off(logging.ERROR, "the database refuses to serve; trying again", str(error))

    async def _connect_once(self) -> None:
        """Claims and finishes on one pair of connections. Returns when everything is recorded after a stop."""
        async with AsyncExitStack() as connections:
            opening = Leases.open(self._settings, self._name, self._worker)
            leases = await within(ANSWER_S, connections.enter_async_context(opening))
            self._worker = leases.worker
            # Before claiming: a lease may have run out meanwhile, and a claim would have its event delivered again.
            await self._finisher.flush(leases)
            self._claiming = not self._stopping.is_set()
            claiming = asyncio.create_task(self._claim(leases), name="claim")
            finishing = asyncio.create_task(self._finisher.run(leases), name="finish")
            raising = asyncio.create_task(self._raise_floors(leases), name="raise floors")
            try:
                await asyncio.wait((claiming, finishing), return_when=asyncio.FIRST_EXCEPTION)
                if not claiming.done():
                    # What a cancelled claim had leased would be delivered only when the lease has run out.
                    self._stop_claiming()
                    await asyncio.wait([claiming], timeout=_ENDING_S)
            finally:
                await end(claiming, finishing, raising)
            failures = [task.exception() for task in (claiming, finishing) if not task.cancelled()]
            for failure in failures:
                if failure is not None:
                    raise failure
            await self._finisher.flush(leases)  # what a claim brought that was under way at the stop

    async def _back_off(self, level: int, message: str, error: str) -> None:
        self._failures += 1
        wait_s = backoff_s(self._failures)
        waiting = {"error": error, "retry_in_s": round(wait_s, 3), "results_waiting": self._finisher.pending}
        _log.log(level, message, extra=waiting)
        if self._stopping.is_set():
            await asyncio.sleep(min(wait_s, _STOPPING_BACKOFF_S))
        else:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._stopping.wait()

    async def _claim(self, leases: Leases) -> None:
        settings, batch = self._settings, self._settings.batch_size
        while self._claiming:
            if self._held > settings.prefetch - batch:
                self._low = settings.prefetch - batch
                self._room.clear()
                await self._room.wait()
                continue
            async with asyncio.timeout(ANSWER_S):
                skip = await self._lanes_to_skip(leases)
            self._wake.clear()
            self._wake_due = float("inf")
            self._freed = False
            self._on_hold = set()
            sent_s = time.monotonic()
            async with asyncio.timeout(ANSWER_S):
                claims = await leases.claim(
                    batch,
                    lease_s=settings.lease_s,
                    lookahead_s=settings.lookahead_s,
                    skip=skip,
                    max_parallel=settings.customer_max_parallel,
                )
            received_s = time.monotonic()
            self._clock.sample(claims.database_s, sent_s, received_s)
            self._metrics.claim_seconds.observe(received_s - sent_s)
            self._note_claimed()
            if self._stopping.is_set():
                self._finisher.release(claims.events)
                return
            self._take_in(claims)
            if claims.locked_out >= _LOCKED_OUT:
                await self._holders.tell(leases)
            short = len(claims.events) < batch
            if short and not skip and claims.again_at is None:
                self._metrics.events_backlog.set(0)
            elif received_s > self._backlog_read_s + _BACKLOG_EVERY_S:
                self._backlog_read_s = received_s
                async with asyncio.timeout(ANSWER_S):
                    self._metrics.events_backlog.set(await leases.backlog())
            if short:
                await self._rest(leases)

    def _take_in(self, claims: Claims) -> None:
        self._metrics.events_claimed_total.inc(len(claims.events))
        if claims.events:
            self._given.set()
            self._locked_gap_s = _LOCKED_GAP_S
        if claims.again_at is not None:
            at_once = claims.again_at <= claims.database_s
            self._wake_at(claims.again_at if at_once else claims.again_at + random.uniform(0.0, _AGAIN_WITHIN_S))
        events = claims.events
        if held := self._on_hold:  # by somebody whom the claim may not have seen yet
            self._finisher.release([event for event in events if None in held or event.lane in held])
            events = [event for event in events if None not in held and event.lane not in held]
        self._http.due.put([event for event in events if event.delivery_type != "KAFKA"])
        self._kafka.due.put([event for event in events if event.delivery_type == "KAFKA"])
        self._http.stalls.sweep()
        self._kafka.stalls.sweep()

    async def _raise_floors(self, leases: Leases) -> None:
        """Once a second while claims give something. Claims that have to look further are slower, and no worse."""
        while True:
            await self._given.wait()
            self._given.clear()
            try:
                async with asyncio.timeout(ANSWER_S):
                    await leases.raise_floors()
                await asyncio.sleep(_FLOORS_EVERY_S)
            except Blocked as error:  # passes when the other session's transaction ends
                _log.debug("floors wait for another session", extra={"error": str(error)})
                await asyncio.sleep(_FLOORS_EVERY_S)
            except (OrchestratorError, TimeoutError) as error:
                _log.warning("floors cannot be raised, and claims may become slower", extra={"error": str(error)})
                await asyncio.sleep(_FLOORS_AGAIN_S)
            except Exception:
                _log.exception("floors cannot be raised, in a way not foreseen; claims may become slower")
                await asyncio.sleep(_FLOORS_AGAIN_S)

    async def _lanes_to_skip(self, leases: Leases) -> set[int]:
        """Lanes whose events would only fill the memory; stalled destinations get one of their own for this."""
        lanes: set[int] = set()
        batch, half = self._settings.batch_size, self._settings.prefetch // 2
        for stalls in (self._http.stalls, self._kafka.stalls):
            for queue in stalls.without_dedicated_lane():
                queue.lane = await leases.ensure_dedicated_lane(queue.delivery_type, queue.destination) or 0
            lanes |= stalls.lanes(half)
        low = max(batch, half - 2 * batch)
        if lanes and self._held > low:
            self._low = low
        return lanes

    def _note_claimed(self) -> None:
        """Only a claim proves the database: one that is read-only, or full, accepts connections all the same."""
        self._has_claimed = True
        if self._failures:
            self._failures = 0
            self._metrics.database_reconnects_total.inc()
            _log.warning("the database is back")

    def _stop_claiming(self) -> None:
        self._claiming = False
        self._wake.set()
        self._room.set()

    async def _rest(self, leases: Leases) -> None:
        """Waits for the next poll, or until an event that no claim has seen may be due sooner."""
        poll_s = self._settings.poll_interval_s * random.uniform(1.0, 1.05)
        if self._settings.lookahead_s < poll_s:
            async with asyncio.timeout(ANSWER_S):
                next_due = await leases.next_due_at()
            if next_due is not None:
                # What is due already was locked by another, or came just now.
                wake_at, now = self._ahead_of(next_due), self._clock.now()
                self._wake_at(max(wake_at, now + self._locked_gap_s))
                self._locked_gap_s = min(_LAST_LOCKED_GAP_S, 2 * self._locked_gap_s) if wake_at < now else _LOCKED_GAP_S
        ends_s = time.monotonic() + poll_s
        earliest_s = time.monotonic() + _CLAIM_GAP_S
        while (now_s := time.monotonic()) < ends_s and self._claiming and not self._freed:
            until_due_s = self._wake_due - self._clock.now()
            if until_due_s <= 0 and now_s >= earliest_s:
                return
            wait_s = min(ends_s - now_s, max(until_due_s, earliest_s - now_s))
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            self._wake.clear()

    @property
    def _held(self) -> int:
        """Events that wait in memory for their attempt."""
        return len(self._http.due) + len(self._kafka.due)

    def _note_taken(self) -> None:
        if self._low >= 0 and self._held <= self._low:
            self._low = -1
            self._room.set()
            self._note_room()

    def _note_room(self) -> None:
        """What a claim has left out may be claimed now."""
        self._wake_at(float("-inf"))

    def _note_freed(self) -> None:
        """What waits for a result that was recorded just now is claimed without the usual gap."""
        self._freed = True
        self._wake.set()

    def _on_notified(self, payload: str) -> None:
        if payload.startswith(_HOLD):
            lane = payload.removeprefix(_HOLD)
            self._hold(None if lane == "*" else int(lane))
        else:
            self._expect(float(payload))

    def _hold(self, lane: int | None) -> None:
        """Hands back at once what has not begun of a lane, or with None of all."""
        self._on_hold.add(lane)
        self._finisher.release(self._http.due.remove(lane) + self._kafka.due.remove(lane))
        self._note_taken()

    def _expect(self, due_at: float) -> None:
        """Has the claimer look in time for an event that is due at `due_at`, yet not at once for each of many."""
        self._wake_at(self._ahead_of(due_at))

    def _ahead_of(self, due_at: float) -> float:
        return due_at - min(self._settings.lookahead_s, _CLAIM_AHEAD_S)

    def _wake_at(self, database_s: float) -> None:
        """Has the claimer look again no later than this Unix time by the database's clock."""
        if database_s < self._wake_due:
            self._wake_due = database_s
            self._wake.set()
