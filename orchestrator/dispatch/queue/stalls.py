"""Destinations that stall: their waiting events are handed back, and claims leave their lanes out.

Otherwise their events would fill the memory, and none of other destinations would be claimed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence

from orchestrator.database import Claimed
from orchestrator.dispatch.queue.destination_queue import FIRST_DEDICATED_LANE, DestinationQueue
from orchestrator.dispatch.queue.due_queue import DueQueue

QUICK_S = 1.0
"""An attempt that takes longer is slow; a destination stalls when its window is full this long without a quick one."""
_LOOK_S = 0.25
_ASKED_S = 5.0


class Stalls:
    """Watches a queue for destinations that stall. A destination recovers with its first quick attempt.

    While it stalls, up to `keep` of its events stay in memory, and none when no attempt has ended for a second.
    """

    def __init__(
        self,
        due: DueQueue,
        release: Callable[[Sequence[Claimed]], None],
        on_taken: Callable[[], None],
        window: int,
        keep: int = 0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._due = due
        self._release = release
        self._on_taken = on_taken
        self._window = window
        self._keep = keep
        self._monotonic = monotonic

    async def watch(self) -> None:
        """Looks while windows are full; never returns."""
        while True:
            await self._due.filled.wait()
            self._due.filled.clear()
            while self._due.full:
                await asyncio.sleep(_LOOK_S)
                self.look()

    def look(self) -> None:
        for queue in list(self._due.full):
            if self._monotonic() - queue.limited_s >= QUICK_S:
                self._stall(queue)

    def sweep(self) -> None:
        """Hands back events that were claimed from a shared lane before their destination got a dedicated one."""
        for queue in list(self._due.stalled):
            if queue.lane and queue.running >= queue.window:
                self._stall(queue)

    def stall_all(self) -> None:
        """Marks every destination with events as stalled: the brokers that they share do not answer."""
        for queue in self._due.queues:
            if queue.events:
                self._stall(queue)

    def recover_all(self) -> None:
        for queue in list(self._due.stalled):
            self._due.recover(queue)

    def without_dedicated_lane(self) -> list[DestinationQueue]:
        """Stalled destinations that may be in a shared lane; each is returned once in five seconds at most."""
        now_s = self._monotonic()
        queues = [queue for queue in self._due.stalled if not queue.lane and now_s - queue.asked_s >= _ASKED_S]
        for queue in queues:
            queue.asked_s = now_s
        return queues

    def _stall(self, queue: DestinationQueue) -> None:
        now_s = self._monotonic()
        events = self._due.stall(queue, self._window, self._keep if now_s - queue.slow_s < QUICK_S else 0)
        if events:
            lane = max(event.lane for event in events)
            if lane >= FIRST_DEDICATED_LANE:
                queue.lane = lane
            elif now_s - queue.asked_s >= _ASKED_S:
                queue.lane = 0  # it was taken away, or the events would be in it by now
            self._release(events)
            self._on_taken()

    def lanes(self, most: int) -> set[int]:
        """Dedicated lanes that claims should leave out: stalled ones, and those with more than `most` events here."""
        lanes = {queue.lane for queue in self._due.stalled if queue.lane and not queue.has_room}
        if len(self._due) > most:
            held: Counter[int] = Counter()
            for queue in self._due.queues:
                if queue.events:
                    held[queue.events[-1].lane] += len(queue.events)
            lanes |= {lane for lane, count in held.items() if count > most and lane >= FIRST_DEDICATED_LANE}
        return lanes
