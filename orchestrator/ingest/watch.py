"""Notices a consumer that has stopped moving without an error."""

from __future__ import annotations

import time
from collections.abc import Iterable

from orchestrator.ingest.partition import Partition
from orchestrator.ingest.source import Source

_PAUSED_S = 5.0  # between two looks: we were not running ourselves, or had no use for records


class StalledError(Exception):
    """The consumer does not move, and has to be built anew."""


class Watch:
    """A partition moves when brokers answer for it, and when it follows the end of what can be read."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._looked_s = 0.0
        self._seen: dict[int, tuple[int, int, float]] = {}

    def look(self, source: Source, partitions: Iterable[Partition]) -> None:
        """Call it about once a second while records are wanted. Raises StalledError."""
        now_s = time.monotonic()
        if now_s > self._looked_s + _PAUSED_S:
            self._seen = {}
        self._looked_s = now_s
        stalled = []
        for partition in partitions:
            polled_ms = source.polled_ms(partition.number)
            _, readable = source.ends(partition.number)
            last_polled_ms, last_offset, moved_s = self._seen.get(partition.number, (-1, -1, now_s))
            answered = polled_ms != last_polled_ms
            if partition.next_offset != last_offset or (answered and readable <= partition.next_offset):
                self._seen[partition.number] = polled_ms, partition.next_offset, now_s
            elif now_s > moved_s + self._stall_s:
                stalled.append(partition.number)
        if stalled:
            raise StalledError(f"partitions {stalled} have not moved for {self._stall_s:g} s; reading them anew")
