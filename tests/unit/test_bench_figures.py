"""How benchmarks count what they saw, and that they submit what they say."""

from __future__ import annotations

import pytest

from orchestrator.bench.flow import Claim, by_period, period_s
from orchestrator.bench.limits import mean_under_way, most_under_way, most_within
from orchestrator.bench.processes import Request
from orchestrator.bench.soak import drift
from orchestrator.bench.workload import judged, paced


def test_a_window_ends_just_before_its_length_is_over() -> None:
    assert most_within([0.0, 4.0, 9.999], 10.0) == 3
    assert most_within([0.0, 4.0, 10.0], 10.0) == 2
    assert most_within([0.0, 20.0, 21.0, 22.0, 40.0], 10.0) == 3
    assert most_within([], 10.0) == 0


def test_a_request_that_ends_as_another_begins_is_not_under_way_with_it() -> None:
    requests = [Request("a", 0.0, 1.0), Request("b", 1.0, 2.0), Request("c", 1.5, 4.0)]
    assert most_under_way(requests) == 2
    assert mean_under_way(requests, 1.0, 2.0) == 1.5
    assert mean_under_way(requests, 3.0, 5.0) == 0.5


def test_arrivals_are_compared_with_the_events_that_were_due() -> None:
    judgement = judged({"a": 1.0, "b": 2.0, "c": 3.0}, iter([("a", 1.5), ("b", 1.9), ("a", 2.0), ("z", 0.0)]))
    assert {name: judgement[name] for name in ("delivered", "lost", "duplicated", "early")} == {
        "delivered": 2, "lost": 1, "duplicated": 1, "early": 1,
    }  # fmt: skip


def test_claims_count_in_the_period_in_which_they_ended() -> None:
    claims = [Claim(99.9, 9.0), Claim(100.0, 0.001), Claim(159.9, 0.003), Claim(160.0, 0.002), Claim(400.0, 9.0)]
    assert by_period(claims, 100.0, 300.0) == [
        {"claims": 2, "p50": 1.0, "p99": 3.0, "max": 3.0},
        {"claims": 1, "p50": 2.0, "p99": 2.0, "max": 2.0},
        *[{"claims": 0, "p50": None, "p99": None, "max": None}] * 3,
    ]


@pytest.mark.parametrize(("seconds", "length_s"), [(3600.0, 60.0), (300.0, 60.0), (60.0, 12.0)])
def test_a_short_run_has_five_periods_too(seconds: float, length_s: float) -> None:
    assert period_s(seconds) == length_s


def test_a_drift_is_measured_from_the_first_to_the_last_few_periods() -> None:
    assert drift([1.0, 1.0, 9.0, 1.0, 1.0, 5.0, 1.2, 1.2, 0.1, 1.2, 1.2]) == 0.2
    assert drift([2.0, 1.0]) == -0.5
    assert drift([1.0]) == 0.0
    assert drift([None, 2.0, None, 3.0]) == 0.5
    assert drift([]) is None


async def test_a_flow_makes_each_of_its_calls_once() -> None:
    sent: list[int] = []

    async def send(first: int, count: int) -> None:
        sent.extend(range(first, first + count))

    await paced(100_000.0, 12_345, send)
    assert sorted(sent) == list(range(12_345))


async def test_a_flow_ends_by_the_first_error() -> None:
    sent: list[int] = []

    async def send(first: int, count: int) -> None:
        sent.append(first)
        if first == count:
            raise ValueError("the second")

    with pytest.raises(ExceptionGroup) as raised:
        await paced(1e6, 10_000_000, send)
    assert [str(error) for error in raised.value.exceptions] == ["the second"]
    assert len(sent) < 10
