"""Attempts by destination, as a counter for Prometheus whose number of series is bounded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector

MOST_DESTINATIONS = 50
OTHER = "other"
_OUTCOMES = ("delivered", "retry", "fail")
_FORGOTTEN_S = 3600.0
_LOOK_EVERY_S = 60.0
_LABELS = ("delivery_type", "destination", "outcome")


class DestinationAttempts(Collector):
    """Tells the first 50 destinations apart, and counts the others together as ``other``.

    When there are 50, those without an attempt for an hour make room for new ones, once a minute. For one thread.
    """

    def __init__(
        self, registry: CollectorRegistry, name: str, about: str, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._name = name
        self._about = about
        self._monotonic = monotonic
        self._counts: dict[tuple[str, str], dict[str, int]] = {}
        self._others: dict[str, dict[str, int]] = {}
        self._seen: dict[tuple[str, str], tuple[int, float]] = {}
        self._looked_s = -math.inf
        self.labels = _LABELS
        registry.register(self)

    def count(self, delivery_type: str, destination: str, outcome: str) -> None:
        counts = self._counts.get((delivery_type, destination))
        if counts is None:
            counts = self._counts_of_new(delivery_type, destination)
        counts[outcome] += 1

    def describe(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(self._name, self._about, labels=_LABELS)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """All series; also notes which destinations have had attempts since the last time."""
        now_s = self._monotonic()
        for key, counts in self._counts.items():
            total = sum(counts.values())
            if self._seen.get(key, (0, 0.0))[0] != total:
                self._seen[key] = total, now_s
        [family] = self.describe()
        others = {(delivery_type, OTHER): counts for delivery_type, counts in self._others.items()}
        for (delivery_type, destination), counts in (self._counts | others).items():
            for outcome, count in counts.items():
                family.add_metric((delivery_type, destination, outcome), count)
        yield family

    def _counts_of_new(self, delivery_type: str, destination: str) -> dict[str, int]:
        if len(self._counts) >= MOST_DESTINATIONS and self._monotonic() >= self._looked_s + _LOOK_EVERY_S:
            self._looked_s = self._monotonic()
            self._forget()
        if len(self._counts) >= MOST_DESTINATIONS:
            if delivery_type not in self._others:
                self._others[delivery_type] = dict.fromkeys(_OUTCOMES, 0)
            return self._others[delivery_type]
        self._counts[delivery_type, destination] = new = dict.fromkeys(_OUTCOMES, 0)
        return new

    def _forget(self) -> None:
        """Forgets destinations that had no attempt for an hour, as far as the readers of the metrics could see."""
        until_s = self._monotonic() - _FORGOTTEN_S
        for key, (total, seen_s) in list(self._seen.items()):
            if seen_s < until_s and total == sum(self._counts[key].values()):
                del self._counts[key], self._seen[key]
