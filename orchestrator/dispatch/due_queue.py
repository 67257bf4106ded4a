"""Claimed events that wait in memory until they are due."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Sequence

from orchestrator.database import Claimed


class DueQueue:
    """Hands out events in order of `due_at`, none before its time by the clock it is given."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._heap: list[tuple[float, int, Claimed]] = []
        self._sequence = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._alarm: asyncio.TimerHandle | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._heap)

    def put(self, events: Sequence[Claimed]) -> None:
        """Takes events in, and looks at the clock again: a step of it moves what waits already, too."""
        for event in events:
            self._sequence += 1
            heapq.heappush(self._heap, (event.due_at, self._sequence, event))
        self._wake()

    async def get(self) -> Claimed | None:
        """The next event, as soon as it is due; None once the queue is closed."""
        while not self._closed:
            if self._heap and self._heap[0][0] <= self._now():
                event = heapq.heappop(self._heap)[2]
                self._wake()
                return event
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            self._set_alarm()
            try:
                await waiter
            except asyncio.CancelledError:
                self._wake()  # it may have been woken already, and nobody else was
                raise
        return None

    async def take(self, limit: int) -> list[Claimed]:
        """Waits for one event to be due, and takes with it all others that are, up to `limit`; none once closed."""
        first = await self.get()
        if first is None:
            return []
        taken = [first]
        now_s = self._now()
        while self._heap and len(taken) < limit and self._heap[0][0] <= now_s:
            taken.append(heapq.heappop(self._heap)[2])
        return taken

    def close(self) -> list[Claimed]:
        """Ends every `get`, and returns what was still held."""
        self._closed = True
        held = [event for _, _, event in self._heap]
        self._heap.clear()
        if self._alarm:
            self._alarm.cancel()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        return held

    def _wake(self) -> None:
        """Wakes one waiter if an event is due; having taken it, that one wakes the next."""
        if self._heap and self._waiting and self._heap[0][0] <= self._now():
            while self._waiting:
                waiter = self._waiting.popleft()
                if not waiter.done():  # else its task was cancelled
                    waiter.set_result(None)
                    return
        else:
            self._set_alarm()

    def _set_alarm(self) -> None:
        """Sets the timer to when the first event is due, if anybody waits for it."""
        if self._alarm:
            self._alarm.cancel()
            self._alarm = None
        if self._heap and self._waiting:
            delay_s = max(0.0, self._heap[0][0] - self._now())
            self._alarm = asyncio.get_running_loop().call_later(delay_s, self._wake)
