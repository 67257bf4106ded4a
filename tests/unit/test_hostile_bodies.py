"""What the worst bodies cost: no step of reading one, or of saying what is wrong with it, holds the event loop up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO

import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from orchestrator.api.requests.queries import page_of
from orchestrator.cli.submit import _batches
from orchestrator.errors import ValidationError
from orchestrator.events.parsing import batch_items, parse_batch, parse_submission, submission_row
from orchestrator.events.submission import Submission
from orchestrator.ingest.commands import read_command
from orchestrator.settings import Settings

LIMITS = Settings.from_env({})
LONGEST = LIMITS.max_body_bytes
# The longest step may take as long as the decoder needs for this many small values, and always AT_LEAST_S: what a
# step takes in seconds is the machine's and the interpreter's.
VALUES = 2_000_000
VALUES_AT_ONCE = 500_000
MANY_VALUES = b"[" + b",".join([b"[]"] * VALUES_AT_ONCE) + b"]"
decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
AT_LEAST_S = 0.03
EVENT = b'{"source":"s","scheduled_at":"2030-01-01T00:00:00Z","destination":"https://example.com/","payload":%b}'
# One of these, repeated, is what a body is made of.
UNITS = [
    b"[",
    b"{",
    b'{"a":',
    b"[]",
    b"{}",
    b"1",
    b"0.1",
    b"1e9",
    b"null",
    b'""',
    b'"\\n',
    b'\\"',
    b"\\\\",
    b'"',
    b"\\u0000",
    b"\\ud800",
    b"\\udc00",
    b"\\ud83d\\ude00",
    b" ",
    b"\xff",
    "é".encode(),
    b'"source":"s"',
    b'"sourc":1',
    b'"a":"b"',
    b'{"a":1}',
    EVENT % b"1",
    b"[" * 64 + b"]" * 64,
    b"[" * 900 + b"]" * 900,
    b"[" * 8000 + b"]" * 8000,
    b'{"a":' * 900 + b"1" + b"}" * 900,
]
# Where they stand, with what before and after them; a body is filled with items if there is room for several.
PLACES = [
    (b"", b""),
    (b"[", b"]"),
    (b'"', b'"'),
    (b"{", b"}"),
    (b'{"events":[', b"]}"),
    (b'{"events":[{', b"}]}"),
    (b'{"events":"', b'"}'),
    (b'{"source":"', b'"}'),
    (b'{"max_retries":', b"}"),
    (b'{"headers":{', b"}}"),
    (b'{"headers":"', b'"}'),
    tuple((EVENT % b"[*]").split(b"*")),
    tuple((EVENT % b'"*"').split(b"*")),
    tuple((EVENT % b'1,"headers":{*}').split(b"*")),
    tuple((EVENT % b'1,"extra":[*]').split(b"*")),
]


def filled(unit: bytes, separator: bytes, place: tuple[bytes, ...], size: int) -> bytes:
    """A text of nearly `size` bytes."""
    before, after = place
    count = (size - len(before) - len(after)) // len(unit + separator)
    return before + separator.join([unit] * max(1, count)) + after


def numbered(size: int) -> bytes:
    """An object of ever other keys."""
    return b"{" + b",".join(b'"k%d":1' % n for n in range(size // 14)) + b"}"


def steps(raw: bytes) -> Iterator[None]:
    """Reads a batch, pausing where the API lets others go on."""
    with suppress(ValidationError):
        yield from (None for _ in batch_items(raw, LIMITS))
    yield


def at_once(read: Callable[[], object]) -> Iterator[None]:
    with suppress(ValidationError):
        read()
    yield


def longest_step_s(work: Callable[[], Iterator[None]]) -> float:
    """CPU time of the longest step."""
    longest_s, began_s = 0.0, time.thread_time()
    for _ in work():
        longest_s = max(longest_s, time.thread_time() - began_s)
        began_s = time.thread_time()
    return longest_s


def read_values() -> Iterator[None]:
    for _ in range(VALUES // VALUES_AT_ONCE):
        decode_list(MANY_VALUES)
    yield


def assert_short_steps(work: Callable[[], Iterator[None]]) -> None:
    """In the best of three tries, since other processes disturb the caches."""
    shares: list[float] = []
    while len(shares) < 3:
        taken_s = longest_step_s(work)
        if taken_s < AT_LEAST_S:
            return
        shares.append(taken_s / longest_step_s(read_values))
        if shares[-1] < 0.5:
            return
    assert min(shares) < 1


def assert_cheap(raw: bytes) -> None:
    assert len(raw) <= LONGEST
    assert_short_steps(lambda: steps(raw))
    assert_short_steps(lambda: at_once(lambda: parse_submission(raw, LIMITS)))
    assert_short_steps(lambda: at_once(lambda: submission_row(raw, LIMITS, 0)))
    assert_short_steps(lambda: at_once(lambda: read_command(raw)))


# Shrinking would find a smaller body, which is not the worst.
@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    unit=st.sampled_from(UNITS),
    separator=st.sampled_from([b"", b","]),
    place=st.sampled_from(PLACES),
    item_bytes=st.sampled_from([None, 2_000_000, 16_000]),
)
def test_no_body_holds_the_event_loop_up(
    unit: bytes, separator: bytes, place: tuple[bytes, ...], item_bytes: int | None
) -> None:
    if item_bytes is None:
        raw = filled(unit, separator, place, LONGEST)
    else:
        item = filled(unit, separator, place, item_bytes)
        raw = b'{"events":[' + b",".join([item] * ((LONGEST - 20) // (len(item) + 1))) + b"]}"
    assert_cheap(raw)


BODIES = {
    "keys": lambda: numbered(LONGEST),
    "keys of an item": lambda: b'{"events":[' + numbered(LONGEST - 20) + b"]}",
    "keys of each item": lambda: b'{"events":[' + b",".join([numbered(16_000)] * 1000) + b"]}",
    "the array again and again": lambda: b"{" + b",".join([b'"events":[]'] * ((LONGEST - 2) // 12)) + b"}",
    "an item again and again": lambda: b"{" + b",".join([b'"\\u0065vents":[{}]'] * ((LONGEST - 2) // 19)) + b"}",
    "values": lambda: b'{"events":[' + b",".join([b"1"] * (LONGEST // 2 - 10)) + b"]}",
    "headers": lambda: b'{"headers":' + numbered(LONGEST - 20) + b"}",
    "keys of the payload": lambda: EVENT % numbered(LONGEST - 200),
    "digits": lambda: b'{"max_retries":' + b"1" * (LONGEST - 20) + b"}",
    "decimals": lambda: b'{"spread_seconds":0.' + b"1" * (LONGEST - 30) + b"}",
}


@pytest.mark.parametrize("name", BODIES)
def test_no_single_value_holds_the_event_loop_up(name: str) -> None:
    assert_cheap(BODIES[name]())


@pytest.mark.parametrize("payload", [b'"%b"' % (b"x" * 16_000), b"[%b]" % b",".join([b'{"a":"b"}'] * 1500)])
def test_a_long_batch_of_good_events_is_read_in_short_steps(payload: bytes) -> None:
    raw = b'{"events":[' + b",".join([EVENT % payload] * 1000) + b"]}"
    assert all(isinstance(item, Submission) for item in parse_batch(raw, LIMITS))
    assert_short_steps(lambda: steps(raw))


def test_a_deep_item_of_a_long_batch_does_not_fail_the_others() -> None:
    deep = EVENT % (b"[" * 8000 + b"]" * 8000)
    results = parse_batch(b'{"events":[' + b",".join([deep, EVENT % b"1"] * 400) + b"]}", LIMITS)
    assert [isinstance(item, Submission) for item in results] == [False, True] * 400
    assert str(results[0]) == "payload: expected at most 64 levels of nesting"


def test_items_beyond_the_bound_of_a_batch_are_not_built() -> None:
    raw = b'{"events":[' + b",".join([b"1"] * 8_000_000) + b"]}"
    with pytest.raises(ValidationError, match="expected 1 to 1000 events, got more"):
        parse_batch(raw, LIMITS)


def test_an_event_that_is_too_long_is_refused_unread() -> None:
    most = LIMITS.max_payload_bytes + (1 << 20)
    with pytest.raises(ValidationError, match=f"body: expected at most {most} bytes for an event"):
        parse_submission(b"[" * (most + 1), LIMITS)
    good, long = EVENT % b"1", EVENT % (b'"%b"' % (b"x" * most))
    first, second = parse_batch(b'{"events":[' + good + b"," + long + b"]}", LIMITS)
    assert isinstance(first, Submission)
    assert isinstance(second, ValidationError)
    assert second.field == "body"


def test_a_page_of_events_deeper_than_the_api_takes_can_be_turned() -> None:
    item = b'{"id":"019c1347-d2fb-705e-a717-2a27dd38d28f","scheduled_at":"2030-01-01T00:00:00Z","payload":%b}'
    deep = item % (b"[" * 5000 + b"]" * 5000)
    _, _, cursor = page_of("events", [deep, deep], 1, "scheduled_at").partition(b'"next":')
    assert cursor == page_of("events", [item % b"1"] * 2, 1, "scheduled_at").partition(b'"next":')[2]
    assert len(cursor) == 49


def test_a_file_without_ends_of_lines_is_not_read_at_once() -> None:
    limits = Settings.from_env({"MAX_PAYLOAD_BYTES": "10"})
    good = EVENT % b"1" + b"\n"
    file = BytesIO(good + b"[" * 10_000_000 + b"\n" + good)
    (batch,) = _batches(file, limits)
    assert [(number, isinstance(item, Submission)) for number, item in batch] == [(1, True), (2, False), (3, True)]
    assert "expected at most 1048586 bytes for an event" in str(batch[1][1])
