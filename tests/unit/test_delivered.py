"""What finish_delivered() is given, read back as the database reads it."""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.database import Finished
from orchestrator.database.delivered import MOST_EVENTS, delivered_arguments, is_plain

NOW_S = 1_900_000_000.0


def result(
    ms: int, rest: int, us: int = 0, times: tuple[int, int, int, int] = (0, 0, 0, 0), code: int | None = 200
) -> Finished:
    """An event scheduled at `ms` and `us`; due, claimed, started and finished so many microseconds after `NOW_S`."""
    scheduled = datetime.fromtimestamp(ms / 1000, UTC) + timedelta(microseconds=us)
    due, claimed, started, ended = (NOW_S + time / 1e6 for time in times)
    text = f"{scheduled:%Y-%m-%d %H:%M:%S.%f}".rstrip("0").rstrip(".") + "+00"
    uid = str(UUID(int=ms << 80 | 7 << 76 | 2 << 62 | rest))
    return Finished(
        uid,
        1,
        "delivered",
        code,
        started,
        ended,
        None,
        None,
        None,
        claimed,
        scheduled_at=text,
        due_at=due,
        timer="(1,2)",
    )


def elements(array: object, width: int) -> list[bytes]:
    """Of a binary array of one dimension without nulls."""
    assert isinstance(array, bytes)
    dimensions, nulls, _, count, lower = struct.unpack_from(">iiIii", array)
    assert (dimensions, nulls, lower, len(array)) == (1, 0, 1, 20 + count * (4 + width))
    found = [array[20 + n * (4 + width) :][: 4 + width] for n in range(count)]
    assert {each[:4] for each in found} == {struct.pack(">i", width)}
    return [each[4:] for each in found]


def microseconds(array: object) -> list[int]:
    return [struct.unpack(">i", each)[0] for each in elements(array, 4)]


def numbers(literal: object) -> list[float]:
    assert isinstance(literal, str)
    return [float(each) for each in literal.strip("{}").split(",")]


micros = st.integers(0, 1_500_000_000)
finished_events = st.builds(
    result,
    st.integers(1_899_999_980_000, 1_900_000_020_000),
    st.integers(0, 2**62 - 1),
    st.sampled_from([0, 0, 1, 10, 999]),
    st.tuples(micros, micros, micros, micros),
    st.sampled_from([200, 200, 204, None]),
)


@given(st.lists(finished_events, min_size=1, max_size=300))
def test_every_time_id_and_status_comes_back_to_the_microsecond(given_results: list[Finished]) -> None:
    ordered = sorted(given_results, key=lambda each: each.event_id)
    arguments = delivered_arguments(ordered)
    assert arguments is not None
    ids, timers, starts, scheduled, due_at, due, base, claimed, started, ended, code, codes = arguments
    assert [str(UUID(bytes=each)) for each in elements(ids, 16)] == [each.event_id for each in ordered]
    assert timers == "{" + ",".join(['"(1,2)"'] * len(ordered)) + "}"
    begins = [int(start) - 1 for start in numbers(starts)]
    of_batch = [sum(begin <= n for begin in begins) - 1 for n in range(len(ordered))]
    bases = numbers(due_at)
    assert isinstance(base, float)
    for n, each in enumerate(ordered):
        fraction = each.scheduled_at[20:-3].ljust(6, "0") if "." in each.scheduled_at else "0"
        assert (numbers(scheduled)[n] if scheduled else 0) == int(fraction) % 1000
        due_us = microseconds(due)[n] if due else 0
        assert round(bases[of_batch[n]] * 1e6) + due_us == round(each.due_at * 1e6)
        assert abs(base + (microseconds(claimed)[n] / 1e6 if claimed else 0) - each.claimed_at) < 1.5e-6
        assert abs(base + microseconds(started)[n] / 1e6 - each.started_at) < 1.5e-6
        assert abs(base + microseconds(ended)[n] / 1e6 - each.finished_at) < 1.5e-6
    told = [code] * len(ordered) if codes is None else str(codes).strip("{}").split(",")
    assert [None if each in (None, "null") else int(str(each)) for each in told] == [
        each.status_code for each in ordered
    ]


@given(st.lists(finished_events, min_size=1, max_size=700))
def test_a_batch_has_at_most_two_hundred_events_of_one_stretch_of_ten_seconds(given_results: list[Finished]) -> None:
    ordered = sorted(given_results, key=lambda each: each.event_id)
    arguments = delivered_arguments(ordered)
    assert arguments is not None
    begins = [int(start) - 1 for start in numbers(arguments[2])]
    assert begins[0] == 0
    stretches = [int(each.event_id.replace("-", "")[:12], 16) // 10_000 for each in ordered]
    for begin, end in zip(begins, [*begins[1:], len(ordered)], strict=True):
        assert 1 <= end - begin <= MOST_EVENTS
        assert len(set(stretches[begin:end])) == 1
    # No more of them than that takes.
    assert len(begins) <= len(set(stretches)) + len(ordered) // MOST_EVENTS


@pytest.mark.parametrize("times", [(0, 0, 0, 2**31 * 1000), (2**31 * 1000, 0, 0, 0), (0, -(2**31) * 1000, 0, 0)])
def test_times_that_no_integer_holds_are_not_for_a_batch(times: tuple[int, int, int, int]) -> None:
    assert delivered_arguments([result(1_900_000_000_000, 1), result(1_900_000_000_000, 2, 0, times)]) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attempt", 2), ("result", "fail"), ("timer", None), ("waited", "{}"), ("error", "odd"), ("response", "odd"),
    ],
)  # fmt: skip
def test_a_result_with_more_to_tell_is_not_for_a_batch(name: str, value: object) -> None:
    plain = result(1_900_000_000_000, 1)
    assert is_plain(plain)
    setattr(plain, name, value)
    assert not is_plain(plain)
