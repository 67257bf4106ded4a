"""The queue of all claimed events that wait in memory until they may start; destinations take turns."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from collections.abc import Callable, Sequence

from orchestrator.database import Claimed
from orchestrator.dispatch.queue.destination_queue import NEVER, NOW, UNBOUNDED, DestinationQueue, Windows
from orchestrator.events.destination_name import destination_name

_MAX_REMEMBERED = 10_000  # spellings of destinations; beyond that the idle ones are forgotten
_FORGOTTEN_S = 10.0  # after which it says little how an idle destination fared


class DueQueue:
    """Hands out events, none before its `start_at` by the clock it is given.

    Destinations with events that may start take turns, so that none waits for the backlog of another. The events of one
    destination go by `start_at`; those that were late when they came go in the order of the claim. A destination whose
    window of attempts is full is passed over until `ended` makes room. `on_room` is called when a stalled one has room.
    """

    def __init__(
        self,
        now: Callable[[], float],
        windows: Windows = UNBOUNDED,
        on_room: Callable[[], None] = lambda: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now = now
        self._windows = windows
        self._on_room = on_room
        self._monotonic = monotonic
        self._queues: dict[str, DestinationQueue] = {}
        self._by_destination: dict[str | None, DestinationQueue] = {}
        # Each queue with events is in one of these three. An entry of the heap `_later` counts only while it equals the
        # wakes_at of its queue.
        self._ready: deque[DestinationQueue] = deque()
        self._later: list[tuple[float, int, DestinationQueue]] = []
        self.full: dict[DestinationQueue, None] = {}
        self.filled = asyncio.Event()
        self.stalled: set[DestinationQueue] = set()
        self._entries = 0
        self._held = 0
        self.payload = 0  # characters of all payloads that it holds
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = NEVER
        self._closed = False

    def __len__(self) -> int:
        return self._held

    @property
    def queues(self) -> list[DestinationQueue]:
        """The queues of all destinations it knows, empty ones included."""
        return list(self._queues.values())

    def put(self, events: Sequence[Claimed]) -> None:
        """Takes events in, and reads the clock again: when it was set, events that already wait move, too."""
        find = self._by_destination.get
        now_s = self._now() if events else NOW
        unsorted: set[DestinationQueue] = set()
        payload = 0
        for event in events:
            queue = find(event.destination) or self._queue_of(event)
            start_at = event.start_at if event.start_at > now_s else now_s
            if not queue.events:
                self._rouse(queue, start_at)
            elif start_at < queue.last_at:
                unsorted.add(queue)
                if start_at < queue.wakes_at:
                    self._wait(queue, start_at)
            queue.events.append(event)
            queue.last_at = start_at
            payload += len(event.payload)
        for queue in unsorted:
            queue.events = deque(sorted(queue.events, key=lambda event: max(event.start_at, now_s)))
            queue.last_at = max(queue.events[-1].start_at, now_s)
        self._held += len(events)
        self.payload += payload
        self._alarm_at = NEVER
        self._wake()

    async def get(self) -> Claimed | None:
        """The next event, once it may start; None once the queue is closed. It counts as under way until `ended`."""
        ready, later = self._ready, self._later
        while not self._closed:
            now_s = self._now() if self._held else NOW  # the clock may not have been read yet
            if later and later[0][0] <= now_s:
                self._promote(now_s)
            while ready:
                queue = ready.popleft()
                events = queue.events
                if queue.running >= queue.window or events[0].start_at > now_s:
                    self._place(queue, now_s)
                    continue
                event = events.popleft()
                self._held -= 1
                self.payload -= len(event.payload)
                queue.running += 1
                if events and queue.running < queue.window and events[0].start_at <= now_s:
                    ready.append(queue)
                else:
                    self._place(queue, now_s)
                if self._waiting:
                    self._wake()
                return event
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            self._set_alarm()
            try:
                await waiter
            except asyncio.CancelledError:
                self._wake()  # it may have been woken, and then no other waiter was
                raise
        return None

    async def take(self, limit: int) -> list[Claimed]:
        """Waits for one event, and takes it with all others that may start, up to `limit`; none once closed.

        For queues without windows: what it takes does not count as under way.
        """
        first = await self.get()
        if first is None:
            return []
        self._queue_of(first).running -= 1
        taken = [first]
        now_s, ready = self._now(), self._ready
        while ready and len(taken) < limit:
            queue = ready.popleft()
            events = queue.events
            share = -(-(limit - len(taken)) // (len(ready) + 1))
            while share and events and events[0].start_at <= now_s:
                taken.append(events.popleft())
                share -= 1
            self._place(queue, now_s)
        self._held += 1  # get() has counted the first
        self.payload += len(first.payload)
        return self._gone(taken)

    def ended(self, event: Claimed, quick: bool | None = None) -> str:
        """Ends an event's time under way; returns the name of its destination.

        The caller calls `get` next, so that no other waiter is woken.

        `quick` says whether the attempt was quick; None: there was none. A full window grows with each quick attempt,
        and goes back to its first size after a slow one.
        """
        queue = self._by_destination.get(event.destination) or self._queue_of(event)
        queue.running -= 1
        full = queue in self.full
        if quick:
            queue.slow = False
            if full and queue.window < self._windows.most:
                queue.window += 1
        elif quick is not None:
            queue.slow, queue.slow_s, queue.window = True, self._monotonic(), self._windows.first
        if full and queue.running < queue.window:
            del self.full[queue]
            self._ready.append(queue)
        if not queue.running and not queue.events:
            queue.idle_s = self._monotonic()
        if self.stalled and queue in self.stalled:
            if quick:
                self.recover(queue)
            elif queue.has_room:
                self._on_room()
        return queue.name

    def stall(self, queue: DestinationQueue, window: int, keep: int) -> list[Claimed]:
        """Narrows the window of a destination, and takes out all of its events except the first `keep`."""
        self.stalled.add(queue)
        queue.window, queue.idle_s = window, self._monotonic()
        taken = [queue.events.pop() for _ in range(len(queue.events) - keep)]
        self._replace([queue])
        return self._gone(taken)

    def recover(self, queue: DestinationQueue) -> None:
        """The opposite of `stall`."""
        self.stalled.discard(queue)
        queue.window = max(queue.window, self._windows.first)
        queue.lane = 0
        self._replace([queue])
        self._wake()
        self._on_room()

    def remove(self, lane: int | None) -> list[Claimed]:
        """Takes out all events of a lane, or of all lanes with None."""
        taken = []
        changed = []
        for queue in self._queues.values():
            going = [event for event in queue.events if lane in (None, event.lane)]
            if going:
                queue.events = deque(event for event in queue.events if lane not in (None, event.lane))
                taken += going
                changed.append(queue)
        self._replace(changed)
        return self._gone(taken)

    def close(self) -> list[Claimed]:
        """Ends every `get`, and returns the events that were still held."""
        self._closed = True
        held = self.remove(None)
        if self._alarm:
            self._alarm.cancel()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        return held

    def _gone(self, taken: list[Claimed]) -> list[Claimed]:
        self._held -= len(taken)
        self.payload -= sum(len(event.payload) for event in taken)
        return taken

    def _queue_of(self, event: Claimed) -> DestinationQueue:
        queue = self._by_destination.get(event.destination)
        if queue is None:
            if len(self._by_destination) >= _MAX_REMEMBERED:
                self._by_destination.clear()
                self._queues = {name: queue for name, queue in self._queues.items() if not queue.idle}
                self.stalled.intersection_update(self._queues.values())
            name = destination_name(event.delivery_type, event.destination)
            queue = self._queues.get(name)
            if queue is None:
                queue = DestinationQueue(name, event.delivery_type, event.destination, self._windows.first)
                self._queues[name] = queue
            self._by_destination[event.destination] = queue
        return queue

    def _rouse(self, queue: DestinationQueue, start_at: float) -> None:
        """Readies an empty queue for an event; forgets how its attempts fared if that was long ago."""
        if not queue.running and self._monotonic() - queue.idle_s > _FORGOTTEN_S:
            queue.slow, queue.window = False, self._windows.first
            queue.lane = 0
            self.stalled.discard(queue)
        self._wait(queue, start_at)

    def _wait(self, queue: DestinationQueue, start_at: float) -> None:
        queue.wakes_at = start_at
        self._entries += 1
        heapq.heappush(self._later, (start_at, self._entries, queue))

    def _promote(self, now_s: float) -> None:
        """Places each queue whose first event may start by now."""
        later = self._later
        while later and later[0][0] <= now_s:
            start_at, _, queue = heapq.heappop(later)
            if queue.wakes_at == start_at:
                self._place(queue, now_s)

    def _place(self, queue: DestinationQueue, now_s: float) -> None:
        """Puts a queue that is in none of the three where it belongs."""
        events = queue.events
        if not events:
            queue.wakes_at = NEVER
        elif events[0].start_at > now_s:
            self._wait(queue, events[0].start_at)
        elif queue.running < queue.window:
            queue.wakes_at = NOW
            self._ready.append(queue)
        else:
            queue.wakes_at = NOW
            if not queue.slow and queue not in self.stalled:
                queue.limited_s = self._monotonic()
            if not self.full:
                self.filled.set()
            self.full[queue] = None

    def _replace(self, queues: Sequence[DestinationQueue]) -> None:
        """Moves queues that have changed to where they belong now."""
        if not queues:
            return
        changed = set(queues)
        others = [queue for queue in self._ready if queue not in changed]
        self._ready.clear()
        self._ready.extend(others)
        now_s = self._now()
        for queue in queues:
            self.full.pop(queue, None)
            queue.wakes_at = NEVER
            self._place(queue, now_s)

    def _wake(self) -> None:
        """Wakes one waiter if an event may start; that waiter wakes the next when it has taken its event."""
        if self._later:
            self._promote(self._now())
        if not self._waiting:
            return
        if self._ready:
            while self._waiting:
                waiter = self._waiting.popleft()
                if not waiter.done():  # else its task was cancelled
                    waiter.set_result(None)
                    return
        else:
            self._set_alarm()

    def _set_alarm(self) -> None:
        """Sets the timer to when the next event may start, if there is a waiter."""
        at = self._later[0][0] if self._later and self._waiting else NEVER
        if at == self._alarm_at:
            return
        if self._alarm:
            self._alarm.cancel()
            self._alarm = None
        self._alarm_at = at
        if at < NEVER:
            delay_s = max(0.0, at - self._now())
            self._alarm = asyncio.get_running_loop().call_later(delay_s, self._ring)

    def _ring(self) -> None:
        self._alarm, self._alarm_at = None, NEVER
        self._wake()
