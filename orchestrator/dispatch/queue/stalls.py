"""Destinations that stall: what waits for them is handed back, and claims leave their lanes out.

Else their events would fill the memory, and nobody else's would be claimed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence

from orchestrator.database import Claimed
from orchestrator.dispatch.queue.destination_queue import FIRST_OWN_LANE, Line
from orchestrator.dispatch.queue.due_queue import DueQueue

QUICK_S = 1.0
"""An attempt that takes longer is slow; a destination whose window is full for so long without a quick one stalls."""
_LOOK_S = 0.25
_ASKED_S = 5.0


class Stalls:
    """Watches a queue. A destination recovers with its first quick attempt.

    While it stalls, up to `keep` events wait for it, and none when no attempt has ended for a second.
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
        for line in list(self._due.full):
            if self._monotonic() - line.limited_s >= QUICK_S:
                self._stall(line)

    def sweep(self) -> None:
        """Hands back at once what was on its way from another lane when its destination got its own."""
        for line in list(self._due.stalled):
            if line.lane and line.running >= line.window:
                self._stall(line)

    def stall_all(self) -> None:
        """All stall that have events: what they share does not answer."""
        for line in self._due.lines:
            if line.events:
                self._stall(line)

    def recover_all(self) -> None:
        for line in list(self._due.stalled):
            self._due.recover(line)

    def without_lane(self) -> list[Line]:
        """Stalled destinations that may share their lane with others, each named every few seconds at most."""
        now_s = self._monotonic()
        lines = [line for line in self._due.stalled if not line.lane and now_s - line.asked_s >= _ASKED_S]
        for line in lines:
            line.asked_s = now_s
        return lines

    def _stall(self, line: Line) -> None:
        now_s = self._monotonic()
        events = self._due.stall(line, self._window, self._keep if now_s - line.slow_s < QUICK_S else 0)
        if events:
            lane = max(event.lane for event in events)
            if lane >= FIRST_OWN_LANE:
                line.lane = lane
            elif now_s - line.asked_s >= _ASKED_S:
                line.lane = 0  # it has been taken away, or the events would have moved by now
            self._release(events)
            self._on_taken()

    def lanes(self, most: int) -> set[int]:
        """Lanes that claims had better leave out: of what is stalled, or has more than `most` events here."""
        lanes = {line.lane for line in self._due.stalled if line.lane and not line.has_room}
        if len(self._due) > most:
            held: Counter[int] = Counter()
            for line in self._due.lines:
                if line.events:
                    held[line.events[-1].lane] += len(line.events)
            lanes |= {lane for lane, count in held.items() if count > most and lane >= FIRST_OWN_LANE}
        return lanes
