"""How property tests explore: alike for everybody in `make test`, from a seed and for a given time in `make explore`.

    make explore                 five minutes, from other seeds again and again
    make explore MINUTES=60      an hour
    make explore SEED=123        once more what was found from that seed

The seed is printed. What is found becomes an example of its test.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import engine

SHRINKING_S = 20
"""How long Hypothesis may look for a smaller example; a test has 120 s."""

_SEED = "EXPLORE_SEED"
_SECONDS = "EXPLORE_SECONDS"
_ROUND_S = 30.0  # with less time left than that, no other round is begun
_ROOT = Path(__file__).resolve().parents[2]
_MORE_EXAMPLES = 1000  # for tests that say nothing else


def load_profile() -> None:
    """Decides how Hypothesis looks for examples, for all tests that are imported later."""
    engine.MAX_SHRINKING_SECONDS = SHRINKING_S
    unhurried: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("fixed", derandomize=True, **unhurried)
    settings.register_profile("exploring", max_examples=_MORE_EXAMPLES, **unhurried)
    settings.load_profile("fixed" if explored_seed() is None else "exploring")


def explored_seed() -> int | None:
    """Where the exploration starts; None when it is the fixed one."""
    seed = os.environ.get(_SEED)
    return None if seed is None else int(seed)


class Exploration:
    """One run of the test runner, and how long it may begin tests; without end, and in order, unless it explores."""

    def __init__(self) -> None:
        self._end = float("inf")

    def begin(self, items: list[Any]) -> None:
        """Puts the tests into an order of the seed's, so that each comes first at times, and starts the clock."""
        seed = explored_seed()
        if seed is not None:
            random.Random(seed).shuffle(items)
            self._end = time.monotonic() + float(os.environ.get(_SECONDS, "inf"))

    def is_over(self) -> bool:
        return time.monotonic() > self._end


def explore(minutes: float, seed: int | None) -> int:
    """Runs all property tests from other seeds until the time is up, or once from `seed`; the last one's status."""
    end = time.monotonic() + 60 * minutes
    command = [sys.executable, "-m", "pytest", "-q", "-n", "3", "--dist", "loadgroup", "-m", "hypothesis"]
    while True:
        chosen = secrets.randbelow(1 << 32) if seed is None else seed
        limit = {_SECONDS: str(max(_ROUND_S, end - time.monotonic()))} if seed is None else {}
        print(f"exploring from seed {chosen}", flush=True)  # noqa: T201
        done = subprocess.run(
            [*command, "--timeout=600", f"--hypothesis-seed={chosen}"],
            cwd=_ROOT,
            env={**os.environ, _SEED: str(chosen), **limit},
            stdin=subprocess.DEVNULL,
        )
        if done.returncode != 0:
            print(f"from seed {chosen}; once more: make explore SEED={chosen}", file=sys.stderr)  # noqa: T201
        if done.returncode != 0 or seed is not None or time.monotonic() > end - _ROUND_S:
            return done.returncode


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--minutes", type=float, default=5.0)
    options.add_argument("--seed", type=int)
    given = options.parse_args()
    sys.exit(explore(given.minutes, given.seed))
