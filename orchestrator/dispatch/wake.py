"""When the claimer claims next: after a rest, or sooner when an event that no claim has seen may be due."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from orchestrator.dispatch.clock import DatabaseClock

_CLAIM_GAP_S = 0.01  # between claims that found less than they asked for
_CLAIM_AHEAD_S = 0.25  # an expected event is claimed this long before it is due, at the latest
_GATHER_S = 0.25  # after a claim; events expected later than that above share the next one


class Wake:
    """Times are Unix seconds by the database's clock."""

    def __init__(self, clock: DatabaseClock, lookahead_s: float) -> None:
        self._clock = clock
        self._lookahead_s = lookahead_s
        self.ahead_s = min(lookahead_s, _CLAIM_AHEAD_S)
        self._changed = asyncio.Event()
        self._due = float("inf")
        self._at_once = False
        self._claimed_at = float("-inf")

    def reset(self) -> None:
        """Forgets what woke it: a claim begins."""
        self._changed.clear()
        self._due = float("inf")
        self._at_once = False

    def note_claim(self, database_s: float) -> None:
        self._claimed_at = database_s

    def at(self, database_s: float) -> None:
        """Wakes the claimer no later than at this time."""
        if database_s < self._due:
            self._due = database_s
            self._changed.set()

    def expect(self, due_at: float) -> None:
        """Wakes the claimer in time for an event that is due then; many such events share one claim.

        Early, since there may be more events due with it than one claim gives.
        """
        self.at(min(due_at - self.ahead_s, max(due_at - self._lookahead_s, self._claimed_at + _GATHER_S)))

    def soon(self) -> None:
        """Wakes it now: what the last claim left out may be claimed."""
        self.at(float("-inf"))

    def at_once(self) -> None:
        """Wakes it without the usual gap between claims."""
        self._at_once = True
        self._changed.set()

    async def wait(self, rest_s: float) -> bool:
        """Waits for that long at most; whether it was woken."""
        began_s = time.monotonic()
        ends_s, earliest_s = began_s + rest_s, began_s + _CLAIM_GAP_S
        while not self._at_once:
            now_s = time.monotonic()
            until_due_s = self._due - self._clock.now()
            if until_due_s <= 0 and now_s >= earliest_s:
                return True
            if now_s >= ends_s:
                return False
            wait_s = min(ends_s - now_s, max(until_due_s, earliest_s - now_s))
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            self._changed.clear()
        return True
