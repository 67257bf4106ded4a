from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.dispatch.clock import DatabaseClock

NOW = 1_790_000_000.0
ROUNDING_S = 2e-6  # of sums of Unix times in double precision

waits = st.floats(0, 60)
delays = st.floats(0, 2)
rates = st.floats(-400e-6, 0.05)  # what a slewed clock gains a second, against ours
disciplined = st.floats(-400e-6, 400e-6)  # what one gains that NTP disciplines


class World:
    """Our monotonic clock, and the database's, which runs at a rate of its own; both exact, and read as floats."""

    def __init__(self) -> None:
        self.monotonic_s = Fraction(1000)
        self.database_s = Fraction(NOW)
        self.clock = DatabaseClock(lambda: float(self.monotonic_s))

    def pass_time(self, seconds: float, rate: float = 0.0) -> None:
        self.monotonic_s += Fraction(seconds)
        self.database_s += Fraction(seconds) * (1 + Fraction(rate))

    def ask(self, before_s: float = 0.0, after_s: float = 0.0) -> None:
        """A question that is computed `before_s` after it was sent, and heard `after_s` later."""
        sent_s = self.monotonic_s
        self.pass_time(before_s)
        read_s = self.database_s
        self.pass_time(after_s)
        self.clock.sample(float(read_s), float(sent_s), float(self.monotonic_s))

    @property
    def ahead_s(self) -> float:
        return float(Fraction(self.clock.now()) - self.database_s)

    @property
    def latest_ahead_s(self) -> float:
        return float(Fraction(self.clock.latest()) - self.database_s)


@given(st.lists(st.tuples(waits, rates, delays, delays), min_size=1))
def test_the_clock_is_never_ahead_of_the_database_under_any_drift_and_delay_of_answers(
    history: list[tuple[float, float, float, float]],
) -> None:
    world = World()
    world.ask()
    for wait_s, rate, before_s, after_s in history:
        world.pass_time(wait_s, rate)
        assert world.ahead_s <= ROUNDING_S
        world.ask(before_s, after_s)
        assert world.ahead_s <= ROUNDING_S


# What is computed the very moment it is asked for, less than a microsecond after the last, was not set back.
@example(0.5, [(1.0, 2.0, 0.0), (5.960464477539063e-08, 0.0, 1.0)])
@given(delays, st.lists(st.tuples(st.floats(0, 5), delays, delays), max_size=20))
def test_a_fast_answer_makes_the_clock_tight_and_slow_answers_keep_it_so(
    first_s: float, later: list[tuple[float, float, float]]
) -> None:
    world = World()
    world.ask(first_s, first_s)
    world.ask()
    began_s = world.monotonic_s
    for wait_s, before_s, after_s in later:
        world.pass_time(wait_s)
        world.ask(before_s, after_s)
    assert world.ahead_s >= -(500e-6 * float(world.monotonic_s - began_s) + ROUNDING_S)


@given(st.floats(0.001, 1e6), delays, delays)
def test_a_step_back_of_the_database_clock_is_noticed_by_the_next_answer(
    step_s: float, before_s: float, after_s: float
) -> None:
    world = World()
    world.ask()
    world.pass_time(1.0)
    world.database_s -= Fraction(step_s)
    world.ask(before_s, after_s)
    # A step smaller than the time the answer took cannot be told from a slow answer.
    assert world.ahead_s <= before_s + ROUNDING_S
    world.ask()
    assert world.ahead_s <= ROUNDING_S


@given(st.floats(0.001, 1e6), delays, delays)
def test_a_step_forward_of_the_database_clock_is_followed_by_the_next_answer(
    step_s: float, before_s: float, after_s: float
) -> None:
    world = World()
    world.ask()
    world.pass_time(1.0)
    world.database_s += Fraction(step_s)
    world.ask(before_s, after_s)
    assert -(after_s + 0.001 + ROUNDING_S) <= world.ahead_s <= ROUNDING_S


@given(st.lists(st.tuples(waits, disciplined, waits, delays), min_size=1))
def test_the_upper_bound_of_the_clock_is_never_behind_the_database_however_long_answers_wait(
    history: list[tuple[float, float, float, float]],
) -> None:
    world = World()
    world.ask(after_s=history[0][2])
    assert world.latest_ahead_s >= -ROUNDING_S
    for wait_s, rate, held_s, before_s in history:
        world.pass_time(wait_s, rate)
        assert world.latest_ahead_s >= -ROUNDING_S
        world.ask(before_s, held_s)
        assert world.latest_ahead_s >= -ROUNDING_S


@given(st.lists(st.tuples(delays, delays), max_size=20))
def test_a_fast_answer_makes_the_upper_bound_of_the_clock_tight(later: list[tuple[float, float]]) -> None:
    world = World()
    world.ask(60.0, 60.0)
    world.ask()
    began_s = world.monotonic_s
    for before_s, after_s in later:
        world.ask(before_s, after_s)
        assert world.latest_ahead_s <= 500e-6 * float(world.monotonic_s - began_s) + ROUNDING_S


@given(st.floats(-1e6, 1e6), delays, delays)
def test_the_upper_bound_of_the_clock_follows_a_step_with_the_next_answers(
    step_s: float, before_s: float, after_s: float
) -> None:
    world = World()
    world.ask()
    world.pass_time(1.0)
    world.database_s += Fraction(step_s)
    world.ask(before_s, after_s)
    # A step smaller than the time the answer took cannot be told from a slow answer.
    assert world.latest_ahead_s >= -(after_s + 0.001 + ROUNDING_S)
    world.ask()
    assert -ROUNDING_S <= world.latest_ahead_s <= 0.001 + before_s + ROUNDING_S


def test_the_clock_refuses_to_guess_before_the_first_answer() -> None:
    for bound in (DatabaseClock().now, DatabaseClock().latest):
        with pytest.raises(RuntimeError, match="not been read"):
            bound()
