"""What an event is followed by: which correlation ids and trace contexts are let in, and what wins."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from orchestrator.events.parsing import parse_batch, parse_submission, submission_row
from orchestrator.events.submission import Submission, SubmissionError
from orchestrator.events.tracing import Carried, carried, followed, with_tracing
from tests.support.copying import fields_of

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
OTHER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
VALID = [
    (TRACE, TRACE),
    (TRACE.replace("00-4", "01-4"), TRACE),
    (f"cc{TRACE[2:]}-what-the-future-will-be-like", TRACE),
    (f"cc{TRACE[2:]}-", TRACE),
    (f"{TRACE[:-2]}ff", f"{TRACE[:-2]}ff"),
]
INVALID = [
    "",
    f"ff{TRACE[2:]}",
    f"{TRACE}-more",
    f"{TRACE}-",
    f"{TRACE}\n",
    f"{TRACE}0",
    f"cc{TRACE[2:]}.more",
    TRACE.upper(),
    TRACE[:-1],
    TRACE.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32),
    TRACE.replace("00f067aa0ba902b7", "0" * 16),
    TRACE.replace("-", "_"),
]


@dataclass(frozen=True)
class Bounds:
    max_payload_bytes: int = 1000
    max_batch_events: int = 10
    max_retries: int = 3


def body(**changes: Any) -> bytes:
    minimal = {"source": "s", "scheduled_at": "2030-01-31T09:00:00Z", "payload": 1, "destination": "https://r.example"}
    return json.dumps(minimal | changes).encode()


def parsed(told: Carried | None = None, **changes: Any) -> Submission:
    return parse_submission(body(**changes), Bounds(), carried=told)


@pytest.mark.parametrize(("given", "kept"), VALID)
def test_a_traceparent_is_kept_in_version_00(given: str, kept: str) -> None:
    assert parsed(traceparent=given).traceparent == kept
    assert carried(None, f" {given} ".encode()) == Carried(None, kept)


@pytest.mark.parametrize("given", INVALID)
def test_an_invalid_traceparent_is_refused_as_a_field_and_ignored_as_a_header(given: str) -> None:
    with pytest.raises(SubmissionError, match="traceparent: expected a W3C traceparent, such as 00-4bf9"):
        parsed(traceparent=given)
    assert carried(None, given.strip("\n").encode()) == Carried(None, None) or given.endswith("\n")


@pytest.mark.parametrize("given", ["c", "order 17/a", "~" * 200, "!"])
def test_a_correlation_id_of_printable_ascii_is_kept(given: str) -> None:
    assert parsed(correlation_id=given).correlation_id == given
    assert carried(given.encode(), None) == Carried(given, None)


@pytest.mark.parametrize("given", ["", " ", " c", "c ", "c\n", "a\tb", "é", "\x7f", "c" * 201])
def test_any_other_correlation_id_is_refused_as_a_field(given: str) -> None:
    with pytest.raises(SubmissionError, match="correlation_id: expected 1 to 200 printable ASCII characters"):
        parsed(correlation_id=given)


@pytest.mark.parametrize("given", ["", " ", "a\tb", "é", "\x7f", "c" * 201])
def test_any_other_correlation_id_is_ignored_as_a_header(given: str) -> None:
    assert carried(given.encode(), TRACE.encode()) == Carried(None, TRACE)


def test_a_field_goes_before_the_header_and_null_leaves_it_to_the_header() -> None:
    told = Carried("of the header", OTHER)
    both = parsed(told, correlation_id="of the field", traceparent=TRACE)
    assert (both.correlation_id, both.traceparent) == ("of the field", TRACE)
    neither = parsed(told, correlation_id=None)
    assert (neither.correlation_id, neither.traceparent) == told[:2]
    assert parsed().correlation_id is parsed().traceparent is None


def test_headers_hold_for_each_event_of_a_batch_that_says_nothing_itself() -> None:
    batch = b'{"events": [%b, %b]}' % (body(), body(correlation_id="own"))
    events = parse_batch(batch, Bounds(), carried=Carried("told", TRACE))
    assert [(e.correlation_id, e.traceparent) for e in events if isinstance(e, Submission)] == [
        ("told", TRACE),
        ("own", TRACE),
    ]


def test_a_record_of_kafka_has_them_in_its_row() -> None:
    row = submission_row(body(), Bounds(), 0, carried=Carried("told", TRACE))
    fields = fields_of(row)
    assert (fields["correlation_id"], fields["traceparent"]) == (b"told", TRACE.encode())


def test_the_id_of_an_event_does_not_depend_on_what_it_is_followed_by() -> None:
    assert parsed(external_job_id="j").id == parsed(external_job_id="j", correlation_id="c", traceparent=TRACE).id


def test_a_delivery_has_what_the_event_is_followed_by_in_place_of_its_own_headers() -> None:
    own = {"X-Correlation-Id": "own", "Traceparent": "own", "x-other": "o"}
    assert with_tracing(own, None, None) == own
    assert with_tracing(None, None, None) is None
    assert with_tracing(own, "c", None) == {"Traceparent": "own", "x-other": "o", "x-correlation-id": "c"}
    assert with_tracing(None, "c", TRACE) == {"x-correlation-id": "c", "traceparent": TRACE}


def test_the_trace_id_stands_in_for_a_correlation_id_that_nobody_gave() -> None:
    assert parsed(traceparent=TRACE).correlation_id == TRACE[3:35]
    assert parsed(Carried(None, OTHER)).correlation_id == OTHER[3:35]
    assert parsed(Carried(None, OTHER), traceparent=TRACE).correlation_id == TRACE[3:35]
    assert parsed(Carried("told", OTHER), traceparent=TRACE).correlation_id == "told"


@pytest.mark.parametrize(
    "state", ["a=b", "vendor@x/y=t61rcWkgMzE,rojo=00f067aa0ba902b7", "a=b , c=d e", f"a={'b' * 200}"]
)
def test_a_tracestate_becomes_a_header_of_the_event_that_came_with_it(state: str) -> None:
    told = carried(None, TRACE.encode(), f" {state}\t".encode())
    assert told == Carried(None, TRACE, state)
    assert json.loads(parsed(told).headers or b"") == {"tracestate": state}
    assert json.loads(parsed(told, headers={"x": "y"}).headers or b"") == {"x": "y", "tracestate": state}


@pytest.mark.parametrize(
    "state",
    ["", "a", "=b", "A=b", "a=b,", "a=\x00", "a=b\nc=d", "a=é", "a=b=c", ",".join(["a=b"] * 33), f"a={'b' * 600}"],
)
def test_any_other_tracestate_is_ignored(state: str) -> None:
    assert carried(None, TRACE.encode(), state.encode()) == Carried(None, TRACE)


def test_a_tracestate_means_nothing_without_its_traceparent() -> None:
    assert carried(b"c", None, b"a=b") == carried(b"c", b"wrong", b"a=b") == Carried("c", None)
    assert parsed(Carried(None, OTHER, "a=b"), traceparent=TRACE).headers is None


def test_a_tracestate_takes_no_header_of_the_event_away() -> None:
    told = Carried(None, TRACE, "a=b")
    own = {"Tracestate": "own"}
    full = {f"x-{n}": "y" for n in range(20)}
    assert json.loads(parsed(told, headers=own).headers or b"") == own
    assert json.loads(parsed(told, headers=full).headers or b"") == full


def test_a_line_of_the_log_names_an_event_by_all_that_is_known() -> None:
    assert followed("e", None, None) == {"event_id": "e"}
    ids = {"trace_id": "4bf92f3577b34da6a3ce929d0e0e4736", "span_id": "00f067aa0ba902b7"}
    assert followed("e", "c", TRACE) == {"event_id": "e", "correlation_id": "c"} | ids
