"""The events that wait in memory for one destination, and the window that bounds its attempts under way."""

from __future__ import annotations

import sys
from collections import deque
from typing import NamedTuple

from orchestrator.database import Claimed
from orchestrator.settings import Settings

FIRST_DEDICATED_LANE = 64
NEVER, NOW = float("inf"), float("-inf")


class Windows(NamedTuple):
    """How many attempts to one destination may be under way in this process: at first, and at most."""

    first: int
    most: int


UNBOUNDED = Windows(sys.maxsize, sys.maxsize)


def http_windows(settings: Settings) -> Windows:
    """A tenth of the connections at first; all but a tenth at most, so that no destination takes them all."""
    connections = settings.http_max_connections
    most = max(1, connections - max(1, connections // 10))
    if settings.customer_max_parallel is not None:
        most = min(most, settings.customer_max_parallel)
    return Windows(min(most, max(2, connections // 10)), most)


class DestinationQueue:
    """One destination's events, in the order in which they may start, and how its attempts fare.

    `wakes_at` is when the first event may start: `NOW` once it may, `NEVER` while there is none. `last_at` is when the
    last event may start. Both are the database's times; those that end in ``_s`` are monotonic. `limited_s` says since
    when the window has been full without a quick attempt. `lane` is the destination's dedicated lane, 0 while none is
    known.
    """

    __slots__ = (
        "asked_s",
        "delivery_type",
        "destination",
        "events",
        "idle_s",
        "lane",
        "last_at",
        "limited_s",
        "name",
        "running",
        "slow",
        "slow_s",
        "wakes_at",
        "window",
    )

    def __init__(self, name: str, delivery_type: str, destination: str | None, window: int) -> None:
        self.name = name
        self.delivery_type = delivery_type
        self.destination = destination
        self.events: deque[Claimed] = deque()
        self.last_at = NOW
        self.wakes_at = NEVER
        self.running = 0
        self.window = window
        self.slow = False  # whether the last attempt was slow
        self.slow_s = NOW  # when the last slow attempt ended
        self.limited_s = NOW
        self.idle_s = NOW
        self.lane = 0
        self.asked_s = NOW  # when a dedicated lane was last asked for

    @property
    def has_room(self) -> bool:
        """Whether its window has room for another event."""
        return self.running + len(self.events) < self.window

    @property
    def idle(self) -> bool:
        return not self.running and not self.events
