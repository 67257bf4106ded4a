"""What comes of an attempt to deliver an event, whichever way it went."""

from __future__ import annotations

from typing import NamedTuple

DELIVERED, RETRY, FAIL = "delivered", "retry", "fail"


class Attempted(NamedTuple):
    """What came of an attempt. `verdict`: ``delivered``, ``retry`` (try again later) or ``fail`` (final).

    `response` quotes up to 1,024 characters of a failure's body; `retry_after_s` is how long to wait at least.
    """

    verdict: str
    status_code: int | None = None
    error: str | None = None
    response: str | None = None
    retry_after_s: float | None = None

    @property
    def timed_out(self) -> bool:
        return self.error is not None and self.error.startswith("timeout: ")
