"""Histograms for Prometheus that cost little to feed: every event feeds two.

prometheus_client's take a lock for each of their counters, and look at every bucket.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector


class Histogram:
    """Counts values by the bucket they fall into. For one thread."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    @contextmanager
    def time(self) -> Iterator[None]:
        """Observes how many seconds its block takes, also when that raises."""
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self.observe(time.perf_counter() - began_s)

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        bounds = [*(repr(float(bound)) for bound in self._bounds), "+Inf"]
        family.add_metric(labels, [*zip(bounds, accumulate(self._counts), strict=True)], self._sum)


class Histograms(Collector):
    """All histograms of a name, one for each combination of values of its labels."""

    def __init__(
        self, registry: CollectorRegistry, name: str, about: str, bounds: Sequence[float], labels: Sequence[str] = ()
    ) -> None:
        self._name = name
        self._about = about
        self._bounds = bounds
        self.labels = labels
        self._histograms: dict[tuple[str, ...], Histogram] = {}
        registry.register(self)

    def labelled(self, *values: str) -> Histogram:
        histogram = self._histograms.get(values)
        if histogram is None:
            histogram = self._histograms[values] = Histogram(self._bounds)
        return histogram

    def describe(self) -> Iterator[HistogramMetricFamily]:
        yield HistogramMetricFamily(self._name, self._about, labels=self.labels)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        [family] = self.describe()
        for values, histogram in self._histograms.items():
            histogram.add_to(family, values)
        yield family
