"""The database's clock, estimated between queries: no attempt may begin before its event is due, or too late."""

from __future__ import annotations

import time
from collections.abc import Callable

# No clock that NTP disciplines runs slower or faster than this against ours (adjtimex(2) slews by 500 ppm).
_SLOWEST = 1 - 500e-6
_FASTEST = 1 + 500e-6
_ROUNDING_S = 1e-6  # of sums and differences of Unix times in double precision, 0.24 us apart, and PostgreSQL's own


class DatabaseClock:
    """Bounds of the database's time, tight to the fastest recent answer.

    An answer that carries the database's time was computed after the question was sent and before it arrived. So
    the database's clock shows at least that time when the answer arrives, and since then has gone on at `_SLOWEST`
    or faster: the best of these bounds is the clock. When it is ahead of an answer's time even at the question's
    departure, the database's clock was set back, and only that answer counts. A step back by less than the answer
    took, or than numbers are rounded by, can hide; the clock is ahead by no more than that then.

    The upper bound works the other way round: when the question was sent, the database's clock showed no more than the
    answer's time. It is loose when the answer took long, as behind a lock.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._offset_s: float | None = None
        self._latest_offset_s = 0.0

    def sample(self, database_s: float, sent_s: float, received_s: float) -> None:
        """Takes in an answer: the database's Unix time, and when it was asked and heard on the monotonic clock."""
        lower, upper = database_s - _SLOWEST * received_s, database_s - _SLOWEST * sent_s
        soonest, latest = database_s - _FASTEST * received_s, database_s - _FASTEST * sent_s
        if self._offset_s is None or self._latest_offset_s > latest or self._latest_offset_s < soonest - _ROUNDING_S:
            self._latest_offset_s = latest
        if self._offset_s is None or not lower <= self._offset_s <= upper + _ROUNDING_S:
            self._offset_s = lower

    def now(self) -> float:
        """The database's time in Unix seconds, never ahead of it. Raises RuntimeError before the first sample."""
        if self._offset_s is None:
            raise RuntimeError("the database's clock has not been read yet")
        return _SLOWEST * self._monotonic() + self._offset_s

    def latest(self) -> float:
        """The database's time in Unix seconds, never behind it; for what must not have ended yet. Raises as `now`."""
        if self._offset_s is None:
            raise RuntimeError("the database's clock has not been read yet")
        return _FASTEST * self._monotonic() + self._latest_offset_s
