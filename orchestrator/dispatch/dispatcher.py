"""Claims events shortly before they are due, delivers each on time, and records the outcome.

One process runs a claimer, a listener, a finisher, and deliveries over HTTP and to Kafka. The claimer keeps leased
events in memory, and begins to claim a herd before it is due ([claim_sizes.py](claim_sizes.py)). Notifications tell it
when to claim; without one it looks once a poll whether any event is due. The database enforces rate limits, circuit
breakers and pauses: a claim returns only events that may be attempted, and says when to claim again. While the database
is away, deliveries go on and results wait; claiming resumes when it is back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import socket
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress

from orchestrator.backoff import backoff_s
from orchestrator.database import NOTIFY_CHANNEL, Claims, Leases
from orchestrator.database.listening import listen
from orchestrator.dispatch.claim_sizes import ClaimSizes
from orchestrator.dispatch.clock import DatabaseClock
from orchestrator.dispatch.finisher import ANSWER_S, Finisher
from orchestrator.dispatch.http.deliveries import HttpDeliveries, Sender
from orchestrator.dispatch.kafka_deliveries import KafkaDeliveries
from orchestrator.dispatch.lock_holders import LockHolders
from orchestrator.dispatch.wake import Wake
from orchestrator.errors import Blocked, DatabaseUnavailable, OrchestratorError
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings
from orchestrator.tasks import end, within

_LOCKED_GAP_S = 0.1  # before claiming again events that are due but locked by another session; doubles up to
_LAST_LOCKED_GAP_S = 1.0
_LOCKED_OUT = 5  # consecutive claims that met locked events, before the log names who locks them
_POLL_S = 10.0  # no more than notify_within() in SQL
_DEAF_POLL_S = 1.0  # while no notification can come
_QUIET_S = 1.0  # after a claim, before it looks whether any event is due
_NARROW_S = 0.2  # between claims of what is due at once while there is no room for others; less than ahead_s
_AGAIN_WITHIN_S = 0.02  # after the moment that a claim named, at random, so that dispatchers do not claim in step
_HOLD = "hold "
_STOPPING_BACKOFF_S = 0.5
_BACKLOG_EVERY_S = 5.0  # between counts of the backlog while claims come back full; otherwise there is none
_BACKLOG_SHARE = 50  # of the time goes into counting, at most one part
_FLOORS_EVERY_S = 1.0
_ASIDE_AGAIN_S = 60.0  # after a failure
_ENDING_S = 1.0  # that a cancelled claim or attempt has to end

_log = logging.getLogger(__name__)


class Dispatcher:
    """One per process. `run` works until `stop` is set, then ends within SHUTDOWN_TIMEOUT_SECONDS."""

    def __init__(self, settings: Settings, metrics: Metrics, sender: Sender) -> None:
        self._settings = settings
        self._metrics = metrics
        self._clock = DatabaseClock()
        self._sizes = ClaimSizes(settings)
        self._wake = Wake(self._clock, settings.lookahead_s)
        self._finisher = Finisher(metrics, self._wake.expect, self._wake.at_once, self._note_taken)
        common = settings, metrics, self._clock, self._finisher, self._note_taken, self._wake.soon
        self._http = HttpDeliveries(*common, sender)
        self._kafka = KafkaDeliveries(*common)
        self._name = f"{settings.deployment} {socket.gethostname()}:{os.getpid()}"
        self._worker: int | None = None
        self._stopping = asyncio.Event()
        self._claiming = False
        self._has_claimed = False
        self._failures = 0  # to connect, since the last claim
        self._listening = False
        self._given = asyncio.Event()
        self._backlogged = asyncio.Event()
        self._room = asyncio.Event()
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
            hearing = listen(self._settings, NOTIFY_CHANNEL, self._on_notified, self._note_listening)
            listening = tasks.create_task(hearing, name="listen")
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
            counting = asyncio.create_task(self._count_backlog(leases), name="count the backlog")
            try:
                await asyncio.wait((claiming, finishing), return_when=asyncio.FIRST_EXCEPTION)
                if not claiming.done():
                    # A cancelled claim leaves its events leased until the leases run out.
                    self._stop_claiming()
                    await asyncio.wait([claiming], timeout=_ENDING_S)
            finally:
                await end(claiming, finishing, raising, counting)
            failures = [task.exception() for task in (claiming, finishing) if not task.cancelled()]
            for failure in failures:
                if failure is not None:
                    raise failure
            await self._finisher.flush(leases)  # events of a claim that was under way at the stop

    async def _back_off(self, level: int, message: str, error: str) -> None:
        self._failures += 1
        self._metrics.events_backlog.set(math.nan)
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
        settings, sizes = self._settings, self._sizes
        while self._claiming:
            lookahead_s, narrow = settings.lookahead_s, not await self._has_room()
            asked = sizes.size
            if narrow:
                now = self._clock.now()
                asked = sizes.narrow_size(self._held, self._held_payload, now)
                if not (asked and self._claiming):
                    continue
                lookahead_s = self._wake.ahead_s if sizes.ahead(now) else lookahead_s
            async with asyncio.timeout(ANSWER_S):
                skip = await self._lanes_to_skip(leases)
            self._wake.reset()
            self._recalled = set()
            sent_s = time.monotonic()
            async with asyncio.timeout(ANSWER_S):
                claims = await leases.claim(
                    asked,
                    lease_s=settings.lease_s,
                    lookahead_s=lookahead_s,
                    skip=skip,
                    max_parallel=settings.customer_max_parallel,
                )
            received_s = time.monotonic()
            self._clock.sample(claims.database_s, sent_s, received_s)
            self._metrics.claim_seconds.observe(received_s - sent_s)
            self._note_claimed(claims)
            if self._stopping.is_set():
                self._finisher.release(claims.events)
                return
            self._take_in(claims)
            if narrow:
                sizes.note_narrow(claims.events, self._held)
            else:
                sizes.note(asked, claims.events, self._held, self._clock.now())
            if claims.locked_out >= _LOCKED_OUT:
                await self._holders.tell(leases)
            if len(claims.events) == asked:
                self._backlogged.set()
            elif not narrow:
                if not skip and claims.again_at is None:
                    self._backlogged.clear()
                    self._metrics.events_backlog.set(0)
                await self._rest(leases)

    async def _has_room(self) -> bool:
        """Whether there is room for the next claim, by the time that a narrow one would be due."""
        for waits in (True, False):
            low = self._sizes.room(self._held, self._held_payload)
            if self._unfinished <= low:
                return True
            if waits:
                self._low = low
                self._room.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_NARROW_S):
                        await self._room.wait()
        return False

    def _take_in(self, claims: Claims) -> None:
        self._metrics.events_claimed_total.inc(len(claims.events))
        if claims.expired:
            self._metrics.leases_expired_total.inc(claims.expired)
        if claims.events:
            self._given.set()
            self._locked_gap_s = _LOCKED_GAP_S
        if claims.again_at is not None:
            at_once = claims.again_at <= claims.database_s
            self._wake.at(claims.again_at if at_once else claims.again_at + random.uniform(0.0, _AGAIN_WITHIN_S))
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
            done = await self._aside(leases.raise_floors(), "lane floors cannot be raised; claims may become slower")
            await asyncio.sleep(_FLOORS_EVERY_S if done else _ASIDE_AGAIN_S)

    async def _count_backlog(self, leases: Leases) -> None:
        """Counts the backlog every now and then while claims come back full."""

        async def count() -> None:
            backlog = await leases.backlog()
            if self._backlogged.is_set():  # else a claim has met its end meanwhile
                self._metrics.events_backlog.set(backlog)

        while True:
            await self._backlogged.wait()
            began_s = time.monotonic()
            done = await self._aside(count(), "the backlog cannot be counted")
            took_s = time.monotonic() - began_s
            await asyncio.sleep(max(_BACKLOG_EVERY_S, _BACKLOG_SHARE * took_s) if done else _ASIDE_AGAIN_S)

    @staticmethod
    async def _aside(call: Coroutine[None, None, None], failure: str) -> bool:
        """Makes a call that claims and finishes can do without; whether to make the next one as usual."""
        try:
            async with asyncio.timeout(ANSWER_S):
                await call
        except Blocked as error:  # passes when the other session's transaction ends
            _log.debug("waiting for another session: %s", failure, extra={"error": str(error)})
        except (OrchestratorError, TimeoutError) as error:
            _log.warning(failure, extra={"error": str(error)})
            return False
        except Exception:
            _log.exception("failed unexpectedly: %s", failure)
            return False
        return True

    async def _lanes_to_skip(self, leases: Leases) -> set[int]:
        """Lanes that the next claim leaves out, since their events would only fill the memory.

        A stalled destination gets a dedicated lane, so that this leaves out no other.
        """
        lanes: set[int] = set()
        size, half = self._sizes.size, self._sizes.most // 2
        for stalls in (self._http.stalls, self._kafka.stalls):
            for queue in stalls.without_dedicated_lane():
                queue.lane = await leases.ensure_dedicated_lane(queue.delivery_type, queue.destination) or 0
            lanes |= stalls.lanes(half)
        low = max(size, half - 2 * size)
        if lanes and self._held > low:
            self._low = low
        return lanes

    def _note_claimed(self, claims: Claims) -> None:
        """Only a claim proves that the database is back: one that is read-only, or full, accepts connections, too."""
        self._has_claimed = True
        self._wake.note_claim(claims.database_s)
        if self._failures:
            self._failures = 0
            self._metrics.database_reconnects_total.inc()
            _log.warning("the database is back")

    def _stop_claiming(self) -> None:
        self._claiming = False
        self._wake.at_once()
        self._room.set()

    async def _rest(self, leases: Leases) -> None:
        """Waits until an event that no claim has seen may be due. While nothing happens, it looks once a poll."""
        lookahead_s = self._settings.lookahead_s
        woken = await self._wake.wait(min(self._poll_s, _QUIET_S, max(0.0, lookahead_s - self._wake.ahead_s)))
        while not woken:
            sent_s = time.monotonic()
            async with asyncio.timeout(ANSWER_S):
                database_s, next_due, lease_end = await leases.next_due_at()
            self._clock.sample(database_s, sent_s, time.monotonic())
            if lease_end is not None and lease_end > database_s:
                self._wake.at(lease_end + random.uniform(0.0, _AGAIN_WITHIN_S))
            if next_due is not None and next_due > database_s:
                self._wake.expect(next_due)
            elif next_due is not None:  # it was locked by another session, or has just come
                self._wake.at(database_s + self._locked_gap_s)
                self._locked_gap_s = min(_LAST_LOCKED_GAP_S, 2 * self._locked_gap_s)
            woken = await self._wake.wait(self._poll_s)

    @property
    def _poll_s(self) -> float:
        """How long to wait for notifications. Less than their horizon, so that a poll finds what came beyond it."""
        poll_s = self._settings.poll_interval_s or (_POLL_S if self._listening else _DEAF_POLL_S)
        return poll_s * random.uniform(0.93, 0.98)

    @property
    def _held(self) -> int:
        """Events that wait in memory for their attempt."""
        return len(self._http.due) + len(self._kafka.due)

    @property
    def _unfinished(self) -> int:
        """These, and results that wait to be recorded: each claim passes over the timers of all of them."""
        return self._held + self._finisher.unrecorded

    @property
    def _held_payload(self) -> int:
        return self._http.due.payload + self._kafka.due.payload

    def _note_taken(self) -> None:
        if self._low >= 0 and self._unfinished <= self._low:
            self._low = -1
            self._room.set()
            self._wake.soon()

    def _note_listening(self, listening: bool) -> None:
        """Claims at once: notifications have been missed, or will be."""
        if listening != self._listening:
            self._listening = listening
            self._wake.soon()

    def _on_notified(self, payload: str) -> None:
        if payload.startswith(_HOLD):
            lane = payload.removeprefix(_HOLD)
            self._recall(None if lane == "*" else int(lane))
        else:
            self._wake.expect(float(payload))

    def _recall(self, lane: int | None) -> None:
        """Hands back the events of a lane, or with None of all lanes, whose attempts have not begun."""
        self._recalled.add(lane)
        self._finisher.release(self._http.due.remove(lane) + self._kafka.due.remove(lane))
        self._note_taken()
        self._wake.soon()  # a claim tells when a breaker that has opened lets the next attempt through
