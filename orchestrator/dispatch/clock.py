"""The database's clock, read between queries without asking: attempts must not begin before it says they are due."""

from __future__ import annotations

import time

_WINDOW_S = 30.0


class DatabaseClock:
    """A lower bound of the database's time, tight to the fastest recent answer.

    An answer that carries the database's time was computed after the question was sent and before it arrived,
    so `database time - arrival` bounds the offset between the two clocks from below, and `database time -
    departure` from above. The largest lower bound of the last half minute or so is used; when an upper bound
    contradicts it, the database's clock was set back and everything older is forgotten.
    """

    def __init__(self) -> None:
        self._offset_s: float | None = None
        self._next_offset_s: float | None = None
        self._window_ends_s = 0.0

    def sample(self, database_s: float, sent_s: float, received_s: float) -> None:
        """Takes in an answer: the database's Unix time, and when it was asked and heard on the monotonic clock."""
        lower, upper = database_s - received_s, database_s - sent_s
        if self._offset_s is None or self._offset_s > upper:
            self._offset_s = self._next_offset_s = lower
            self._window_ends_s = received_s + _WINDOW_S
            return
        if received_s > self._window_ends_s:
            self._offset_s = self._next_offset_s
            self._next_offset_s = None
            self._window_ends_s = received_s + _WINDOW_S
        self._next_offset_s = lower if self._next_offset_s is None else max(lower, self._next_offset_s)
        self._offset_s = lower if self._offset_s is None else max(lower, self._offset_s)

    def now(self) -> float:
        """The database's time in Unix seconds, never ahead of it. Raises RuntimeError before the first sample."""
        if self._offset_s is None:
            raise RuntimeError("the database's clock has not been read yet")
        return time.monotonic() + self._offset_s
