from __future__ import annotations

import pytest

from orchestrator.backoff import backoff_s


@pytest.mark.parametrize(("failures", "longest_s"), [(1, 0.1), (2, 0.2), (5, 1.6), (7, 5.0), (10_000, 5.0)])
def test_connection_backoff_doubles_up_to_a_bound_and_at_least_half_of_it_is_waited(
    failures: int, longest_s: float
) -> None:
    waits_s = [backoff_s(failures) for _ in range(200)]
    assert longest_s / 2 <= min(waits_s) < max(waits_s) <= longest_s
