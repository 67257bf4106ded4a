"""The result of a demo: the submitted events compared with those that the receiver recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Lateness:
    """Milliseconds from `scheduled_at` to the arrival at the receiver, by the receiver's clock."""

    p50: float
    p99: float
    max: float


@dataclass(frozen=True)
class Result:
    """Counts of events, except `duplicated`: deliveries beyond an event's first.

    `through_kafka` of the submitted events went through Kafka. `events_per_s` is the rate at which the herd was
    delivered: its size over the time from its instant to its last arrival.
    """

    submitted: int
    delivered: int
    lost: int
    duplicated: int
    early: int
    lateness_ms: Lateness
    events_per_s: float
    through_kafka: int = 0

    @property
    def flawless(self) -> bool:
        return self.submitted == self.delivered and not (self.lost or self.duplicated or self.early)


def result_of(
    scheduled: Mapping[str, float], herd_at: float, ids: Sequence[str], arrived_at: Sequence[float]
) -> Result:
    """`scheduled` maps ids to their due times; `ids` arrived at `arrived_at`, in order. All in Unix seconds.

    Arrivals of ids that are not in `scheduled` do not count.
    """
    first: dict[str, float] = {}
    duplicated = 0
    for event_id, at in zip(ids, arrived_at, strict=True):
        if event_id in first:
            duplicated += 1
        elif event_id in scheduled:
            first[event_id] = at
    late_s = sorted(at - scheduled[event_id] for event_id, at in first.items())
    herd_s = [at - herd_at for event_id, at in first.items() if scheduled[event_id] == herd_at]
    return Result(
        submitted=len(scheduled),
        delivered=len(first),
        lost=len(scheduled) - len(first),
        duplicated=duplicated,
        early=sum(seconds < 0 for seconds in late_s),
        lateness_ms=Lateness(_percentile_ms(late_s, 0.5), _percentile_ms(late_s, 0.99), _percentile_ms(late_s, 1)),
        events_per_s=round(len(herd_s) / max(herd_s), 1) if herd_s and max(herd_s) > 0 else 0.0,
    )


def _percentile_ms(ordered_s: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; 0 of nothing."""
    if not ordered_s:
        return 0.0
    return round(ordered_s[max(0, math.ceil(share * len(ordered_s)) - 1)] * 1000, 3)
