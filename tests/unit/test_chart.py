"""The bars of the forecast."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli.chart import _short, axis, bars, columns_for

EIGHTHS = " ▁▂▃▄▅▆▇█"
LABEL = 10
AMOUNTS = st.just(0.0) | st.floats(1e-6, 1e9)  # events, and the least that a rate allows


def height_of(column: str) -> float:
    """How many rows a column's bar fills, which must stand on the ground without a gap."""
    eighths = [EIGHTHS.index(cell) if cell in EIGHTHS else 0 for cell in column[::-1]]
    assert eighths == sorted(eighths, reverse=True)
    assert sum(0 < each < 8 for each in eighths) <= 1
    return sum(eighths) / 8


@given(values=st.lists(AMOUNTS, min_size=1, max_size=60), line=st.none() | AMOUNTS, height=st.integers(1, 8))
def test_bars_of_a_chart_are_as_high_as_their_values(values: list[float], line: float | None, height: int) -> None:
    drawn = [text.plain for text in bars(values, line, height)]
    assert {len(text) for text in drawn} == {LABEL + len(values)}
    assert len(drawn) == height
    top = max([*values, line or 0]) or 1
    for n, value in enumerate(values):
        shown = height_of("".join(text[LABEL + n] for text in drawn))
        assert shown == pytest.approx(value / top * height, abs=0.126)
        assert (shown > 0) == (value > 0)


def test_bars_above_the_line_are_red() -> None:
    drawn = bars([4, 2, 0], 2, 4)
    assert [text.plain[LABEL:] for text in drawn] == ["█  ", "█┄┄", "██ ", "██ "]
    assert [str(span.style) for text in drawn for span in text.spans if "█" in text.plain[span.start : span.end]] == [
        "red",
        "red",
        "cyan",
        "cyan",
    ]
    assert [text.plain[:LABEL].strip() for text in drawn] == ["4", "2", "", ""]


@given(count=st.integers(1, 300), each_s=st.sampled_from([1, 60, 3600, 86_400]))
def test_the_times_below_a_chart_stand_where_they_belong(count: int, each_s: int) -> None:
    first = datetime(2026, 11, 21, 9, 30, tzinfo=UTC)
    marks = axis(first, timedelta(seconds=each_s), count).plain
    assert marks[LABEL:].startswith(first.strftime("%H:%M")) or marks[LABEL:].startswith("21. 09:30")
    assert len(marks) <= LABEL + max(count, len("00. 00:00"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (7, "7"), (0.125, "0.125"), (12.5, "12.5"), (1234.5, "1,234"), (9_999, "9,999")),
        *((12_345, "12.3k"), (999_999, "1M"), (1_500_000, "1.5M"), (2e9, "2G")),
    ],
)
def test_a_number_has_a_short_form(value: float, text: str) -> None:
    assert _short(value) == text


def test_a_narrow_terminal_has_some_bars() -> None:
    assert columns_for(5) == 10
    assert columns_for(160) == 149
