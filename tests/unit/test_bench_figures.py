"""How benchmarks count what a receiver saw."""

from __future__ import annotations

from orchestrator.bench.limits import mean_under_way, most_under_way, most_within
from orchestrator.bench.processes import Request
from orchestrator.bench.workload import judged


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


def test_arrivals_are_judged_by_what_was_due() -> None:
    judgement = judged({"a": 1.0, "b": 2.0, "c": 3.0}, iter([("a", 1.5), ("b", 1.9), ("a", 2.0), ("z", 0.0)]))
    assert {name: judgement[name] for name in ("delivered", "lost", "duplicated", "early")} == {
        "delivered": 2, "lost": 1, "duplicated": 1, "early": 1,
    }  # fmt: skip
