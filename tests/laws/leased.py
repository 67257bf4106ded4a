"""What the models of these tests know of an event's leases.

The number of lost leases is a literal here on purpose: a model that took it from the product would share its mistakes.
"""

from __future__ import annotations

from datetime import datetime


class Leased:
    """For dataclasses with these fields; `released` counts the leases that were handed back unused."""

    max_retries: int
    attempt: int
    released: int
    lease_until: datetime | None

    def held(self, now: datetime) -> bool:
        return self.lease_until is not None and self.lease_until > now

    @property
    def exhausted(self) -> bool:
        """A failure would be final."""
        return self.attempt >= self.max_retries + 1 + self.released

    @property
    def lost_too_often(self) -> bool:
        """Five leases more than all attempts have run out: the event dies at its next claim."""
        return self.attempt >= self.max_retries + 1 + self.released + 5
