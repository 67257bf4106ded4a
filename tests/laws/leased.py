"""What the models of these tests know of an event's leases."""

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
    def forsaken(self) -> bool:
        """So many leases ran out that no more are given."""
        return self.attempt >= self.max_retries + 1 + self.released + 5
