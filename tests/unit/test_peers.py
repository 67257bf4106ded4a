"""How this project is compared with its peers: the arithmetic, and that no job may be missing or run twice."""

from __future__ import annotations

import pytest

from benchmarks.peers.compare import BODY, Run, check_each_once, compact, compared, life, table
from orchestrator.bench.workload import PAYLOAD
from orchestrator.errors import OrchestratorError


def runs(**per_s: list[float]) -> list[Run]:
    """As many rounds of each system, in turn."""
    by_round = zip(*per_s.values(), strict=True)
    return [
        Run(system, "drain", 1000, {"whole_life_per_s": value})
        for values in by_round
        for system, value in zip(per_s, values, strict=True)
    ]


def test_a_whole_life_takes_the_time_of_both_halves() -> None:
    figures = life(100.0, 50.0, 7.0)
    assert figures.pop("whole_life_per_s") == pytest.approx(100 / 3)
    assert figures == {"enqueue_per_s": 100.0, "drain_per_s": 50.0, "wal_bytes_per_job": 7.0}


def test_ratios_are_those_of_one_round_and_not_of_the_medians() -> None:
    [(name, medians, ratios)] = compared(runs(ours=[10.0, 90.0, 40.0], theirs=[20.0, 30.0, 80.0]), "drain")
    assert name == "whole_life_per_s"
    assert medians == {"ours": 40.0, "theirs": 30.0}
    assert ratios == {"theirs": (0.5, 0.5, 3.0)}


def test_a_run_of_another_scenario_does_not_count() -> None:
    assert list(compared(runs(ours=[1.0], theirs=[1.0]), "herd")) == []


def test_a_round_that_was_cut_short_has_no_ratio() -> None:
    [(_, medians, ratios)] = compared(runs(ours=[10.0, 20.0], theirs=[5.0, 5.0])[:-1], "drain")
    assert medians == {"ours": 15.0, "theirs": 5.0}
    assert ratios == {"theirs": (2.0, 2.0, 2.0)}


def test_the_table_has_the_first_system_over_each_other_one() -> None:
    assert table(runs(ours=[3000.0, 1000.0], before=[1000.0, 1000.0], peer=[500.0, 2000.0]), "drain").splitlines() == [
        "| drain | ours | before | peer | ours ÷ before | ours ÷ peer |",
        "| --- | --- | --- | --- | --- | --- |",
        "| whole_life_per_s | 2,000 | 1,000 | 1,250 | 2.00 (1.00–3.00) | 3.25 (0.50–6.00) |",
    ]


def test_the_jobs_of_the_peers_are_as_long_as_the_events() -> None:
    assert len(compact(BODY)) == len(PAYLOAD) == 261


@pytest.mark.parametrize(
    ("started", "wrong"),
    [(["a"], 0), (["a", "b", "b"], 0), (["a", "a"], 0), (["a", "b"], 1)],
    ids=["one missing", "one twice", "one twice, one missing", "one not completed"],
)
def test_a_run_counts_only_if_each_job_ran_once(started: list[str], wrong: int) -> None:
    with pytest.raises(OrchestratorError, match="not each of 2 jobs ran once"):
        check_each_once("a peer", 2, [(job, 0.0) for job in started], wrong)


def test_a_run_counts_if_each_job_ran_once() -> None:
    check_each_once("a peer", 2, [("a", 0.0), ("b", 1.0)], 0)
