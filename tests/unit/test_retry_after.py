"""The Retry-After header in both of its forms, and in none."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.dispatch.http.retry_after import MAX_RETRY_AFTER_S, parse_retry_after

NOW = datetime(1994, 11, 6, 8, 49, 7, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(("value", "seconds"), [("0", 0.0), ("120", 120.0), (" 7\t", 7.0), ("007", 7.0)])
def test_whole_seconds_of_retry_after_are_taken_as_they_are(value: str, seconds: float) -> None:
    assert parse_retry_after(value, NOW) == seconds


@pytest.mark.parametrize(
    "value",
    ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"],
)
def test_each_form_of_an_http_date_is_the_time_until_then(value: str) -> None:
    assert parse_retry_after(value, NOW) == 30.0


def test_a_retry_after_date_that_has_passed_asks_for_no_wait() -> None:
    assert parse_retry_after("Sat, 05 Nov 1994 08:49:37 GMT", NOW) == 0.0


@pytest.mark.parametrize(
    "value",
    ["86401", "9999999999", "9" * 5000, "Fri, 31 Dec 9999 23:59:59 GMT", "Mon, 07 Nov 1994 09:00:00 GMT"],
)
def test_a_retry_after_is_at_most_a_day(value: str) -> None:
    assert parse_retry_after(value, NOW) == MAX_RETRY_AFTER_S


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "-1",
        "+5",
        "1.5",
        "1e3",
        "0x10",
        "soon",
        "٣",
        "²",
        "5 s",
        "5, 10",
        "1994-11-06T08:49:37Z",
        "Sun, 99 Nov 1994 08:49:37 GMT",
        "Sun, 06 Foo 1994 08:49:37 GMT",
        "Sun,",
        "nan",
        "inf",
    ],
)
def test_an_unreadable_retry_after_counts_as_no_header(value: str) -> None:
    assert parse_retry_after(value, NOW) is None


def test_an_answer_without_retry_after_asks_for_no_wait() -> None:
    assert parse_retry_after(None, NOW) is None


@given(st.text() | st.from_regex(r"(Sun|Mon),? [0-9A-Za-z:,+ -]*"))
def test_no_retry_after_that_a_receiver_sends_raises_or_leaves_the_bounds(value: str) -> None:
    seconds = parse_retry_after(value, NOW)
    assert seconds is None or 0.0 <= seconds <= MAX_RETRY_AFTER_S
