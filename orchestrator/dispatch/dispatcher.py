"""Claims events shortly before they are due, delivers each on time, and records the outcome.

One process runs a claimer, a listener, a finisher, and deliveries over HTTP and to Kafka. The claimer keeps up to
SCHEDULER_PREFETCH leased events in memory. It finds due events by polling; notifications only make it poll sooner. The
database enforces rate limits, circuit breakers and pauses: a claim returns only events that may be attempted, and says
when to claim again. While the database is away, deliveries go on and results wait; claiming resumes when it is back.
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
from orchestrator.dispatch.http.deliveries import HttpDeliveries, Sender
from orchestrator.dispatch.kafka_deliveries import KafkaDeliveries
from orchestrator.dispatch.lock_holders import LockHolders
from orchestrator.errors import Blocked, DatabaseUnavailable, OrchestratorError
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings
from orchestrator.tasks import end, within

_CLAIM_GAP_S = 0.01  # between claims that found less than a batch
_LOCKED_GAP_S = 0.1  # before claiming again events that are due but locked by another session; doubles up to
_LAST_LOCKED_GAP_S = 1.0
_LOCKED_OUT = 5  # consecutive claims that met locked events, before the log names who locks them
_CLAIM_AHEAD_S = 0.25  # an expected event is claimed this long before it is due
_AGAIN_WITHIN_S = 0.02  # after the moment that a claim named, at random, so that dispatchers do not claim in step
_HOLD = "hold "
_STOPPING_BACKOFF_S = 0.5
_BACKLOG_EVERY_S = 5.0  # between counts of the backlog while claims come back full; otherwise there is none
_FLOORS_EVERY_S = 1.0
_FLOORS_AGAIN_S = 60.0  # after a failure
_ENDING_S = 1.0  # that a cancelled claim or attempt has to end

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
        self._low = -1  # the claimer waits until no more events than this are held
        self._locked_gap_s = _LOCKED_GAP_S
        self._holders = LockHolders(
            "claims leave out destinations or ordering keys that another session's open transaction has locked"
        )
        self._recalled: set[int | None] = set()  # lanes recalled since the last claim began; None: all
        metrics.events_held.set_function(lambda: self._held)
        metrics.events_in_flight.set_function(lambda: self._http.in_flight + self._kafka.in_flight)

    async def run(self, stop: asyncio.Event) -> None:
        """Dispatches until `stop` is set: then claims no more, lets running attempts end, releases the rest.

        Waits for a database that is away. Raises OrchestratorError when it rejects the first claim, as it does without
        a schema or rights. After a first claim, it tries again for ever.
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
        # Without a claim there is nothing to record, but a first one may be under way.
        left_s = max(0.5, deadline_s - time.monotonic()) if self._has_claimed else _ENDING_S
        await asyncio.wait([recording], timeout=left_s)
        recording.cancel()  # ends both of its tasks as end() does
        await end(listening)
        if cut_short or self._finisher.pending:
            _log.warning(
                "stopped with unfinished work; leases that were not handed back will run out",
                extra={"attempts_cut_short": cut_short, "results_unrecorded": self._finisher.pending},
            )

    async def _connected(self) -> None:
        """Claims and finishes; connects again, with connection backoff, for as long as it takes."""
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
                    _log.exception("a call of the database failed unexpectedly")
                await self._back_off(logging.ERROR, "the database refuses to serve; trying again", str(error))

    async def _connect_once(self) -> None:
        """Claims and finishes on one pair of connections. Returns when everything is recorded after a stop."""
        async with AsyncExitStack() as connections:
            opening = Leases.open(self._settings, self._name, self._worker)
            leases = await within(ANSWER_S, connections.enter_async_context(opening))
            self._worker = leases.worker
            # Before claiming: a lease may have run out meanwhile, and a claim would deliver its event again.
            await self._finisher.flush(leases)
            self._claiming = not self._stopping.is_set()
            claiming = asyncio.create_task(self._claim(leases), name="claim")
            finishing = asyncio.create_task(self._finisher.run(leases), name="finish")
            raising = asyncio.create_task(self._raise_floors(leases), name="raise floors")
            try:
                await asyncio.wait((claiming, finishing), return_when=asyncio.FIRST_EXCEPTION)
                if not claiming.done():
                    # A cancelled claim leaves its events leased until the leases run out.
                    self._stop_claiming()
                    await asyncio.wait([claiming], timeout=_ENDING_S)
            finally:
                await end(claiming, finishing, raising)
            failures = [task.exception() for task in (claiming, finishing) if not task.cancelled()]
            for failure in failures:
                if failure is not None:
                    raise failure
            await self._finisher.flush(leases)  # events of a claim that was under way at the stop

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
            self._recalled = set()
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
        if recalled := self._recalled:  # perhaps after the claim had read its lanes
            self._finisher.release([event for event in events if None in recalled or event.lane in recalled])
            events = [event for event in events if None not in recalled and event.lane not in recalled]
        self._http.due.put([event for event in events if event.delivery_type != "KAFKA"])
        self._kafka.due.put([event for event in events if event.delivery_type == "KAFKA"])
        self._http.stalls.sweep()
        self._kafka.stalls.sweep()

    async def _raise_floors(self, leases: Leases) -> None:
        """Raises lane floors once a second while claims return events; without them claims are only slower."""
        while True:
            await self._given.wait()
            self._given.clear()
            try:
                async with asyncio.timeout(ANSWER_S):
                    await leases.raise_floors()
                await asyncio.sleep(_FLOORS_EVERY_S)
            except Blocked as error:  # passes when the other session's transaction ends
                _log.debug("raising lane floors waits for another session", extra={"error": str(error)})
                await asyncio.sleep(_FLOORS_EVERY_S)
            except (OrchestratorError, TimeoutError) as error:
                _log.warning("lane floors cannot be raised; claims may become slower", extra={"error": str(error)})
                await asyncio.sleep(_FLOORS_AGAIN_S)
            except Exception:
                _log.exception("raising lane floors failed unexpectedly; claims may become slower")
                await asyncio.sleep(_FLOORS_AGAIN_S)

    async def _lanes_to_skip(self, leases: Leases) -> set[int]:
        """Lanes that the next claim leaves out, since their events would only fill the memory.

        A stalled destination gets a dedicated lane, so that this leaves out no other.
        """
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
        """Only a claim proves that the database is back: one that is read-only, or full, accepts connections, too."""
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
                # An event that is due already was locked by another session, or has just come.
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
        """Claims soon: what the last claim left out may now be claimed."""
        self._wake_at(float("-inf"))

    def _note_freed(self) -> None:
        """Claims without the usual gap: events may have waited for a result that was just recorded."""
        self._freed = True
        self._wake.set()

    def _on_notified(self, payload: str) -> None:
        if payload.startswith(_HOLD):
            lane = payload.removeprefix(_HOLD)
            self._recall(None if lane == "*" else int(lane))
        else:
            self._expect(float(payload))

    def _recall(self, lane: int | None) -> None:
        """Hands back the events of a lane, or with None of all lanes, whose attempts have not begun."""
        self._recalled.add(lane)
        self._finisher.release(self._http.due.remove(lane) + self._kafka.due.remove(lane))
        self._note_taken()

    def _expect(self, due_at: float) -> None:
        """Wakes the claimer in time for an event that is due at `due_at`; many such events share one claim."""
        self._wake_at(self._ahead_of(due_at))

    def _ahead_of(self, due_at: float) -> float:
        return due_at - min(self._settings.lookahead_s, _CLAIM_AHEAD_S)

    def _wake_at(self, database_s: float) -> None:
        """Wakes the claimer no later than this Unix time by the database's clock."""
        if database_s < self._wake_due:
            self._wake_due = database_s
            self._wake.set()
