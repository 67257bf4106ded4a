"""What decides which examples property tests look at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.exploring import Exploration

ROOT = Path(__file__).resolve().parents[2]
# Prints the examples of a property, and how long Hypothesis would have looked for a smaller one.
PROPERTY = """
from hypothesis import given, strategies as st
from hypothesis.internal.conjecture import engine
from tests.support.exploring import load_profile
print(engine.MAX_SHRINKING_SECONDS)
load_profile()
@given(st.text())
def run(text):
    print(ascii(text))
run()
"""


def printed(directory: Path, **environ: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROPERTY],
        cwd=directory,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        check=True,
        text=True,
    )
    return done.stdout.splitlines()


def test_the_examples_are_the_same_in_every_run_unless_it_explores(tmp_path: Path) -> None:
    shrinking, *first = printed(tmp_path)
    assert int(shrinking) > 0  # it is this that the tests lower
    assert len(first) == 100
    assert printed(tmp_path)[1:] == first
    explored = printed(tmp_path, EXPLORE_SEED="1")[1:]
    assert len(explored) > 100
    assert explored[:100] != first


def test_an_exploration_has_an_order_of_its_own_and_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"test_{n}" for n in range(20)]
    for seed, seconds, is_over in (("1", "60", False), ("2", "-1", True)):
        monkeypatch.setenv("EXPLORE_SEED", seed)
        monkeypatch.setenv("EXPLORE_SECONDS", seconds)
        exploration = Exploration()
        exploration.begin(items := list(names))
        assert sorted(items) == sorted(names)
        assert items != names
        assert exploration.is_over() == is_over
    monkeypatch.delenv("EXPLORE_SEED")
    fixed = Exploration()
    fixed.begin(items := list(names))
    assert items == names
    assert not fixed.is_over()
