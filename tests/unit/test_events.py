"""The submission: what is let in, what is refused and why, its id and its line in a COPY."""

from __future__ import annotations

import hashlib
import json
import string
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.errors import ValidationError
from orchestrator.events.encoding import encode_row, encode_submission
from orchestrator.events.fields import FIELDS, Field
from orchestrator.events.ids import bucket, bucket_of_key, event_id, random_event_id
from orchestrator.events.parsing import Wire, parse_batch, parse_submission, submission_row
from orchestrator.events.rules import DOTS
from orchestrator.events.submission import JsonError, OutOfRangeError, Submission, SubmissionError
from tests.support.copying import fields_of


@dataclass(frozen=True)
class Bounds:
    max_payload_bytes: int = 1000
    max_batch_events: int = 10
    max_retries: int = 3


BOUNDS = Bounds()
MINIMAL = {
    "source": "orders",
    "scheduled_at": "2026-01-31T09:00:00.123456Z",
    "destination": "https://example.com/hook",
    "payload": {"a": 1},
}
times = st.integers(0, 84_371 * 86_400_000_000 - 1).map(
    lambda micros: datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros)
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def body(**changes: Any) -> bytes:
    return json.dumps({**MINIMAL, **changes}).encode()


def without(field: str) -> bytes:
    return json.dumps({name: value for name, value in MINIMAL.items() if name != field}).encode()


def errors_of(raw: bytes) -> dict[str, str]:
    with pytest.raises(SubmissionError) as caught:
        parse_submission(raw, BOUNDS)
    return dict(caught.value.errors)


def test_the_least_submission_gets_the_defaults() -> None:
    submission = parse_submission(body(), BOUNDS)
    assert submission.scheduled_at == datetime(2026, 1, 31, 9, 0, 0, 123456, tzinfo=UTC)
    assert (submission.source, submission.delivery_type, submission.max_retries) == ("orders", "HTTP", 3)
    assert (submission.external_job_id, submission.headers, submission.retry_policy) == (None, None, None)
    assert (submission.ordering_key, submission.priority, submission.spread_seconds) == (None, None, None)
    assert submission.expires_at is None


def test_every_field_of_a_submission_is_kept() -> None:
    submission = parse_submission(
        body(
            external_job_id="job-1",
            delivery_type="HTTP",
            headers={"X-Tenant": "a"},
            max_retries=0,
            retry_policy="fast_1",
            ordering_key="tenant-7",
            priority=-9,
            spread_seconds=12.5,
            expires_at="2026-01-31T10:00:01+01:00",
        ),
        BOUNDS,
    )
    assert submission.external_job_id == "job-1"
    assert submission.headers == b'{"X-Tenant":"a"}'
    assert (submission.max_retries, submission.retry_policy) == (0, "fast_1")
    assert (submission.ordering_key, submission.priority, submission.spread_seconds) == ("tenant-7", -9, 12.5)
    assert submission.expires_at == datetime(2026, 1, 31, 9, 0, 1, tzinfo=UTC)
    assert submission.expires_at.tzinfo is UTC


def test_null_is_the_same_as_absent_for_optional_fields() -> None:
    optional = ("external_job_id", "delivery_type", "headers", "max_retries", "retry_policy", "ordering_key")
    more = ("priority", "spread_seconds", "expires_at")
    submission = parse_submission(body(**dict.fromkeys((*optional, *more))), BOUNDS)
    assert (submission.external_job_id, submission.max_retries) == (None, 3)
    assert (submission.priority, submission.spread_seconds, submission.expires_at) == (None, None, None)


@pytest.mark.parametrize("topic", ["a", "orders.reminders_2-x", "...", "t" * 249, None])
def test_a_kafka_event_goes_to_a_topic_or_to_the_ready_topic(topic: str | None) -> None:
    submission = parse_submission(body(delivery_type="KAFKA", destination=topic), BOUNDS)
    assert (submission.delivery_type, submission.destination) == ("KAFKA", topic)


def test_a_kafka_event_may_leave_its_destination_out() -> None:
    raw = without("destination")[:-1] + b',"delivery_type":"KAFKA"}'
    assert parse_submission(raw, BOUNDS).destination is None


@pytest.mark.parametrize("topic", ["", ".", "..", "a b", "a/b", "topic\n", "é", "t" * 250])
def test_an_invalid_topic_name_is_refused_with_the_allowed_characters(topic: str) -> None:
    errors = errors_of(body(delivery_type="KAFKA", destination=topic))
    assert list(errors) == ["destination"]
    assert "1 to 249 characters" in errors["destination"]


def test_a_destination_of_the_other_delivery_type_is_refused_with_the_remedy() -> None:
    (reason,) = errors_of(body(delivery_type="KAFKA", destination="https://user:secret@a/")).values()
    assert "for HTTP set delivery_type to HTTP" in reason
    assert "secret" not in reason
    (reason,) = errors_of(body(destination="orders.reminders")).values()
    assert "for a Kafka topic set delivery_type to KAFKA" in reason
    (reason,) = errors_of(without("destination")).values()
    assert "only events of delivery_type KAFKA may leave it out" in reason


def test_a_destination_is_not_judged_by_an_invalid_delivery_type() -> None:
    assert list(errors_of(body(delivery_type="MAIL", destination="someone"))) == ["delivery_type"]


def test_a_whole_number_may_be_written_with_a_point() -> None:
    assert repr(parse_submission(body(max_retries=7.0), BOUNDS).max_retries) == "7"
    assert repr(parse_submission(body(priority=-7.0), BOUNDS).priority) == "-7"


@pytest.mark.parametrize("zero", [b"0", b"0.0", b"-0.0", b"-0"])
def test_the_priority_0_is_the_same_as_none(zero: bytes) -> None:
    submission = parse_submission(body()[:-1] + b',"priority":%b}' % zero, BOUNDS)
    assert submission.priority is None


@pytest.mark.parametrize("sent", ["12", "-10", "1e30", "9" * 300])
def test_a_priority_out_of_range_is_refused_with_the_range(sent: str) -> None:
    (reason,) = errors_of(body()[:-1] + f',"priority":{sent}}}'.encode()).values()
    assert reason.startswith("expected -9 to 9, got ")
    assert len(reason) < 150


@pytest.mark.parametrize("sent", ["1.5", "true", '"1"', "[]", "1e400", "-1e400", "9" * 5000])
def test_a_priority_that_is_no_whole_number_is_refused(sent: str) -> None:
    (reason,) = errors_of(body()[:-1] + f',"priority":{sent}}}'.encode()).values()
    assert reason.startswith(f"expected a whole number from -9 to 9, got {sent[:80]}")


@pytest.mark.parametrize(
    "sent", ["0", "-0.0", "-1", "604800.000001", "1e-7", "1e400", "true", '"12"', "{}", "9" * 5000]
)
def test_a_spread_that_is_no_time_or_too_long_is_refused(sent: str) -> None:
    (reason,) = errors_of(body()[:-1] + f',"spread_seconds":{sent}}}'.encode()).values()
    assert reason.startswith(f"expected more than 0 and at most 604800 seconds, got {sent[:80]}")


@pytest.mark.parametrize("field", ["priority", "spread_seconds"])
@pytest.mark.parametrize("sent", [b"NaN", b"Infinity", b"-Infinity"])
def test_a_json_value_that_is_no_number_is_no_priority_and_no_spread(field: str, sent: bytes) -> None:
    with pytest.raises(JsonError):
        parse_submission(body()[:-1] + b',"%b":%b}' % (field.encode(), sent), BOUNDS)


@pytest.mark.parametrize(
    ("sent", "micros"),
    [
        ("12.5", 12_500_000),
        ("1e-6", 1),
        ("0.00001", 10),
        ("6.048e5", 604_800_000_000),
        ("604799.999999", 604_799_999_999),
        ("7.0000004", 7_000_000),
    ],
)
def test_a_spread_is_kept_to_the_microsecond(sent: str, micros: int) -> None:
    raw = body()[:-1] + f',"spread_seconds":{sent}}}'.encode()
    assert fields_of(submission_row(raw, BOUNDS, 0))["spread"] == timedelta(microseconds=micros)


def test_the_payload_keeps_the_bytes_that_were_sent() -> None:
    raw = body().replace(b'{"a": 1}', b'{ "b":1.50,\n\t"a" : 1e2, "b": "\\u00e9" }')
    assert parse_submission(raw, BOUNDS).payload == b'{ "b":1.50,\n\t"a" : 1e2, "b": "\\u00e9" }'


@given(payload=json_values)
def test_any_json_value_without_nul_and_lone_surrogates_is_a_payload(payload: Any) -> None:
    text = json.dumps(payload)
    allowed = "\\u0000" not in text.replace("\\\\", "") and len(text) <= BOUNDS.max_payload_bytes
    if allowed:
        assert json.loads(parse_submission(body(payload=payload), BOUNDS).payload) == payload
    else:
        assert list(errors_of(body(payload=payload))) == ["payload"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("2026-01-31T10:30:00+01:30", datetime(2026, 1, 31, 9, tzinfo=UTC)),
        ("2026-01-31t09:00:00.5z", datetime(2026, 1, 31, 9, 0, 0, 500000, tzinfo=UTC)),
        ("2026-01-31T09:00:00-00:00", datetime(2026, 1, 31, 9, tzinfo=UTC)),
        ("1970-01-01T00:00:00Z", datetime(1970, 1, 1, tzinfo=UTC)),
        ("2200-12-31T23:59:59.999999Z", datetime(2200, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)),
    ],
)
def test_times_are_kept_to_the_microsecond_in_utc(text: str, kept: datetime) -> None:
    at = parse_submission(body(scheduled_at=text), BOUNDS).scheduled_at
    assert at == kept
    assert at.tzinfo is UTC


@pytest.mark.parametrize(
    "at",
    [
        "2026-01-31T09:00:00",
        "2026-01-31",
        "2026-02-30T00:00:00Z",
        "2016-12-31T23:59:60Z",
        "2026-01-31T24:00:00Z",
        "2026-01-31T09:00:00+24:00",
        "1969-12-31T23:59:59.999999Z",
        "2201-01-01T00:00:00Z",
        "0001-01-01T00:00:00+01:00",
        "9999-12-31T23:59:59-01:00",
        "tomorrow",
        "",
        1769850000,
        None,
    ],
)
def test_a_time_that_is_not_clear_or_not_in_range_is_refused(at: Any) -> None:
    assert list(errors_of(body(scheduled_at=at))) == ["scheduled_at"]


@pytest.mark.parametrize("at", ["2026-01-31T09:00:00.123456Z", "2026-01-31T10:00:00+01:00", "1970-01-01T00:00:00Z"])
def test_an_expiry_that_does_not_come_after_the_time_is_refused_with_both(at: str) -> None:
    with pytest.raises(OutOfRangeError) as caught:
        parse_submission(body(expires_at=at), BOUNDS)
    ((field, reason),) = caught.value.errors
    assert field == "expires_at"
    assert reason.startswith("expected a time after scheduled_at, 2026-01-31T09:00:00.123456+00:00, got ")
    assert errors_of(body(expires_at=at, source=""))["expires_at"] == reason


@pytest.mark.parametrize("at", ["2201-01-01T00:00:00Z", "9999-12-31T23:59:59-01:00"])
def test_an_expiry_beyond_all_times_is_refused(at: str) -> None:
    assert "from 1970 to 2200" in errors_of(body(expires_at=at))["expires_at"]


@pytest.mark.parametrize("at", ["", "2026-01-31", "2026-01-31T10:00:00", "+1h", 1769850000, True, [], "9" * 5000])
def test_an_expiry_that_is_no_time_is_refused_with_an_example(at: Any) -> None:
    errors = errors_of(body(expires_at=at))
    assert list(errors) == ["expires_at"]
    assert "such as 2026-01-31T09:00:00Z, or null, got " in errors["expires_at"]
    assert len(errors["expires_at"]) < 300


def test_an_expiry_is_not_judged_by_an_invalid_time() -> None:
    assert list(errors_of(body(scheduled_at="soon", expires_at="1999-01-01T00:00:00Z"))) == ["scheduled_at"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", ""),
        ("source", "s" * 201),
        ("source", None),
        ("source", 7),
        ("source", "a\x00b"),
        ("source", "a\ud800b"),
        ("external_job_id", ""),
        ("external_job_id", "j" * 201),
        ("external_job_id", "\x00"),
        ("delivery_type", "http"),
        ("destination", None),
        ("destination", 7),
        ("destination", "orders.reminders"),
        ("ordering_key", ""),
        ("ordering_key", "k" * 201),
        ("ordering_key", 7),
        ("ordering_key", "a\x00b"),
        ("ordering_key", "\ud800"),
        ("priority", 10),
        ("priority", True),
        ("spread_seconds", 0),
        ("spread_seconds", 604801),
        ("max_retries", -1),
        ("max_retries", 101),
        ("max_retries", 1.5),
        ("max_retries", "3"),
        ("max_retries", True),
        ("retry_policy", "Fast"),
        ("retry_policy", "fast\n"),
        ("retry_policy", ""),
        ("headers", []),
        ("headers", {"A": 1}),
        ("headers", {"": "a"}),
        ("headers", {"a b": "a"}),
        ("headers", {"X-A\n": "a"}),
        ("headers", {"X-A": "a\r\nHost: b"}),
        ("headers", {"X-A": "a\n"}),
        ("headers", {"X-A": "\x00"}),
        ("headers", {"X-A": "a" * 4097}),
        ("headers", {"X-A": "1", "x-a": "2"}),
        ("headers", {"Host": "a"}),
        ("headers", {"Transfer-Encoding": "chunked"}),
        ("headers", {"WebHook-Signature": "v1,forged"}),
        ("headers", {f"X-{n}": "a" for n in range(21)}),
        ("payload", "\x00"),
        ("payload", {"a": ["\ud83d"]}),
        ("payload", {"\udc00": 1}),
        ("payload", "a" * 999),
    ],
)
def test_a_broken_rule_names_its_field(field: str, value: Any) -> None:
    assert list(errors_of(body(**{field: value}))) == [field]


@pytest.mark.parametrize("field", list(MINIMAL))
def test_a_missing_field_is_named(field: str) -> None:
    assert errors_of(without(field))[field].startswith("required")


def test_all_broken_rules_of_a_submission_are_reported_at_once() -> None:
    raw = body(source="", destination="ftp://a", sheduled_at="x", max_retries=-1)
    assert set(errors_of(raw)) == {"source", "destination", "sheduled_at", "max_retries"}


def test_an_unknown_field_is_refused_with_the_likely_name() -> None:
    assert "did you mean scheduled_at?" in errors_of(body(sheduled_at="x"))["sheduled_at"]


def test_a_refused_value_is_quoted_but_never_at_length() -> None:
    (reason,) = errors_of(body(max_retries="9" * 5000)).values()
    assert '"999' in reason
    assert len(reason) < 300


def test_a_submission_of_nothing_but_mistakes_gets_a_short_list() -> None:
    for fields in (30, 3_000, 30_000, 100_000):
        raw = json.dumps({f"field_{n}": n for n in range(fields)}).encode()
        assert 1 <= len(errors_of(raw)) <= 20
    assert len(errors_of(json.dumps({f"field_{n}": n for n in range(30)}).encode())) == 20


def test_a_field_given_twice_takes_the_last_or_is_refused() -> None:
    assert parse_submission(body()[:-1] + b',"source":"b"}', BOUNDS).source == "b"
    assert errors_of(body(source="")[:-1] + b',"source":"b"}') == {"body": "expected each field once"}


@pytest.mark.parametrize("raw", [b"[]", b"null", b'"text"', b"1"])
def test_a_submission_is_an_object(raw: bytes) -> None:
    assert list(errors_of(raw)) == ["body"]


@pytest.mark.parametrize(
    ("raw", "position"),
    [
        (b"", 0),
        (b'{"source": "a"', 14),
        (b'{"source": 1, "x" 2}', 18),
        (b'{"source": "a"} {}', 17),
        (b'{"payload": "\xff"}', 13),
        (b'{"payload": "\xed\xa0\x80"}', 13),
        (b'{"payload": 01}', 13),
        (b'{"payload": "\n"}', 13),
        (b"\xef\xbb\xbf{}", 0),
    ],
)
def test_malformed_json_is_refused_with_its_position(raw: bytes, position: int) -> None:
    with pytest.raises(JsonError) as caught:
        parse_submission(raw, BOUNDS)
    assert caught.value.position == position


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_a_payload_is_nested_at_most_64_levels(opening: str) -> None:
    closing = "]" if opening == "[" else "}"

    def nested(levels: int) -> bytes:
        return body().replace(b'{"a": 1}', (opening * levels + "1" + closing * levels).encode())

    assert parse_submission(nested(64), BOUNDS).payload
    for levels in (65, 900, 985, 1000, 100_000):
        limits = Bounds(max_payload_bytes=10_000_000)
        with pytest.raises(SubmissionError, match="64 levels"):
            parse_submission(nested(levels), limits)


def test_brackets_in_strings_and_side_by_side_are_not_nesting() -> None:
    payload: list[Any] = ["[" * 100, {"{" * 100: ['"[\\'] * 40}] + [[[]]] * 70
    assert json.loads(parse_submission(body(payload=payload), BOUNDS).payload) == payload


def test_escaped_backslashes_are_not_escapes() -> None:
    assert parse_submission(body(payload="\\u0000 \\ud800"), BOUNDS).payload == rb'"\\u0000 \\ud800"'


def test_a_pair_of_surrogate_escapes_is_let_in() -> None:
    assert parse_submission(body(payload="\U0001f600", source="\U0001f600"), BOUNDS).source == "\U0001f600"


def batch(*items: bytes) -> bytes:
    return b'{"events": [' + b", ".join(items) + b"]}"


def test_a_bad_item_of_a_batch_does_not_fail_the_other_items() -> None:
    deep = body().replace(b'{"a": 1}', b"[" * 100_000 + b"]" * 100_000)
    results = parse_batch(
        batch(
            body(),
            body(source=""),
            body(payload="\x00"),
            body(payload="\ud800 and on"),
            deep,
            b"7",
            body(),
            b"{}",
        ),
        Bounds(max_payload_bytes=10_000_000),
    )
    fields = [result.field if isinstance(result, ValidationError) else None for result in results]
    assert fields == [None, "source", "payload", "payload", "payload", "body", None, "source"]


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (b"[]", "body"),
        (b"{}", "events"),
        (b'{"events": {}}', "events"),
        (b'{"events": []}', "events"),
        (b'{"events": [{}], "more": 1}', "more"),
        (batch(*[b"{}"] * 11), "events"),
    ],
)
def test_a_wrong_envelope_names_its_field(raw: bytes, field: str) -> None:
    with pytest.raises(SubmissionError) as caught:
        parse_batch(raw, BOUNDS)
    assert caught.value.field == field


def test_a_malformed_batch_is_refused_as_a_whole() -> None:
    with pytest.raises(JsonError):
        parse_batch(b'{"events": [{"source": "a"}, {"source": }]}', BOUNDS)


@given(source=st.text(), job=st.text(), at=times, key=st.none() | st.text())
def test_the_id_is_a_version_7_uuid_of_the_four_naming_fields(
    source: str, job: str, at: datetime, key: str | None
) -> None:
    found = uuid.UUID(event_id(source, job, at, key))
    assert str(found) == event_id(source, job, at, key)
    assert (found.version, found.variant) == (7, uuid.RFC_4122)
    micros = (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    assert found.int >> 80 == micros // 1000
    name, external_id, last = source.encode(), job.encode(), b"" if key is None else key.encode()
    lengths = f"{micros}:{len(name)}:" if key is None else f"k{micros}:{len(name)}:{len(external_id)}:"
    digest = hashlib.sha256(lengths.encode() + name + external_id + last).digest()
    partition = hashlib.sha256(external_id if key is None else last).digest()
    raw = bytearray((micros // 1000).to_bytes(6, "big") + partition[:2] + digest[2:10])
    raw[7] = partition[0] << 4 & 0xF0 | partition[1] >> 4
    raw[6] = partition[0] >> 4 | 0x70
    raw[8] = raw[8] & 0x3F | 0x80
    assert found.bytes == bytes(raw)
    assert bucket(str(found)) == bucket_of_key(job if key is None else key)


@pytest.mark.parametrize("job", [".", ".."])
def test_an_external_id_that_no_path_can_hold_is_refused(job: str) -> None:
    assert errors_of(body(external_job_id=job)) == {
        "external_job_id": f"expected a text that can be a part of a path, got {job}"
    }
    assert parse_submission(body(external_job_id=job * 3), BOUNDS).external_job_id == job * 3


def test_known_ids_are_reproduced() -> None:
    at = datetime(2026, 1, 31, 9, 0, 0, 123456, tzinfo=UTC)
    assert event_id("orders", "job-1", at) == "019c1347-d2fb-7026-a717-2a27dd38d28f"
    assert event_id("orders", "job-1", at, "client-7") == "019c1347-d2fb-7d2a-b114-b342b66d7dc5"


@pytest.mark.parametrize("other", ["job-2", "job-1", "client-8", None])
def test_another_ordering_key_makes_another_event(other: str | None) -> None:
    at = datetime(2026, 1, 31, 9, tzinfo=UTC)
    assert event_id("orders", "job-1", at, "client-7") != event_id("orders", "job-1", at, other)


@given(at=times, place=st.integers(0, 4095))
def test_a_random_id_is_in_the_requested_bucket(at: datetime, place: int) -> None:
    assert bucket(random_event_id(at, place)) == place


def test_an_event_without_an_external_id_is_in_the_bucket_of_its_ordering_key() -> None:
    found = [parse_submission(body(ordering_key="client-7"), BOUNDS).id for _ in range(2)]
    assert found[0] != found[1]
    assert {bucket(one) for one in found} == {bucket_of_key("client-7")}
    assert len({bucket(parse_submission(body(), BOUNDS).id) for _ in range(20)}) > 1


def test_the_zone_that_a_time_was_written_in_does_not_change_the_id() -> None:
    at = datetime(2026, 1, 31, 9, tzinfo=UTC)
    assert event_id("a", "b", at) == event_id("a", "b", at.astimezone(timezone(timedelta(hours=5.5))))


def test_source_and_external_id_are_kept_apart_in_the_id() -> None:
    at = datetime(2026, 1, 31, 9, tzinfo=UTC)
    assert event_id("a", "bc", at) != event_id("ab", "c", at)


@given(at=times)
def test_a_random_id_holds_the_millisecond_and_is_new_each_time(at: datetime) -> None:
    first, second = random_event_id(at), random_event_id(at)
    assert first != second
    assert uuid.UUID(first).version == 7
    assert first[:13] == event_id("a", "b", at)[:13]


def unescaped(field: bytes) -> bytes | None:
    if field == rb"\N":
        return None
    plain = {b"t": b"\t", b"n": b"\n", b"r": b"\r", b"\\": b"\\"}
    parts = field.split(b"\\\\")
    for escape in (b"t", b"n", b"r"):
        parts = [part.replace(b"\\" + escape, plain[escape]) for part in parts]
    return b"\\".join(parts)


awkward = st.text(string.printable + "\\\t\r\n\\Né😀", min_size=1)
spreads = st.floats(0.000001, 604_800)
names = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=200)


@given(
    source=awkward,
    job=st.none() | awkward,
    topic=st.none() | awkward,
    payload=awkward,
    headers=st.none() | awkward,
    key=st.none() | awkward,
    priority=st.none() | st.integers(-9, 9),
    spread=st.none() | spreads,
    at=times,
    lasts=st.none() | st.timedeltas(timedelta(microseconds=1), timedelta(days=1)),
    followed=st.none() | awkward,
)
def test_an_encoded_row_holds_every_field(
    source: str,
    job: str | None,
    topic: str | None,
    payload: str,
    headers: str | None,
    key: str | None,
    priority: int | None,
    spread: float | None,
    at: datetime,
    lasts: timedelta | None,
    followed: str | None,
) -> None:
    raw_headers = None if headers is None else headers.encode()
    submission = Submission(
        random_event_id(at),
        at,
        source,
        job,
        "KAFKA",
        topic,
        payload.encode(),
        raw_headers,
        3,
        None,
        key,
        priority,
        spread,
        None if lasts is None else at + lasts,
        followed,
    )
    row = encode_row(submission, 41)
    assert row.n == 41
    assert fields_of(row) == {
        "id": submission.id,
        "scheduled_at": at,
        "max_retries": 3,
        "source": source.encode(),
        "delivery_type": b"KAFKA",
        "destination": None if topic is None else topic.encode(),
        "external_job_id": None if job is None else job.encode(),
        "payload": payload.encode(),
        "headers": raw_headers,
        "correlation_id": None if followed is None else followed.encode(),
        "traceparent": None,
        "retry_policy": None,
        "ordering_key": None if key is None else key.encode(),
        "priority": priority or None,
        "spread": None if spread is None else timedelta(microseconds=round(spread * 1_000_000)),
        "expires_at": None if lasts is None else at + lasts,
    }


LAST = "2200-12-31T23:59:59.999999+00:00"
kafka_submissions = st.fixed_dictionaries(
    {
        "source": names,
        "scheduled_at": times.map(datetime.isoformat),
        "payload": json_values.filter(lambda value: "\\u0000" not in json.dumps(value)),
    },
    optional={
        "external_job_id": names.filter(lambda job: job not in DOTS),
        "headers": st.dictionaries(st.sampled_from(["X-A", "X-B"]), st.text(string.ascii_letters)),
        "max_retries": st.integers(0, 100),
        "retry_policy": st.just("patient"),
        "ordering_key": names,
        "priority": st.integers(-9, 9),
        "spread_seconds": spreads,
        "expires_at": st.just(LAST),
    },
)


@given(fields=kafka_submissions, target=st.sampled_from([("HTTP", "http://a/"), ("KAFKA", "topic"), ("KAFKA", None)]))
@example(fields={"source": "s", "scheduled_at": LAST, "payload": 1, "expires_at": LAST}, target=("KAFKA", None))
def test_an_encoded_submission_reads_as_the_same(fields: dict[str, Any], target: tuple[str, str | None]) -> None:
    raw = json.dumps({**fields, "delivery_type": target[0], "destination": target[1]}).encode()
    limits = Bounds(max_payload_bytes=100_000)
    if fields["scheduled_at"] == fields.get("expires_at"):  # no attempt could ever begin
        for read in (lambda: parse_submission(raw, limits), lambda: submission_row(raw, limits, 5)):
            with pytest.raises(OutOfRangeError, match="expected a time after scheduled_at"):
                read()
        return
    submission = parse_submission(raw, limits)
    row = submission_row(
        encode_submission(submission), limits, 5, submission.id if submission.external_job_id is None else None
    )
    assert row == encode_row(submission, 5)


def test_a_record_without_an_id_of_its_own_gets_one() -> None:
    first, second = submission_row(body(), BOUNDS, 0), submission_row(body(), BOUNDS, 0)
    assert first != second


GIVEN = "019c1347-d2fb-7000-8000-00000000002a"


def test_the_id_in_a_record_s_header_is_kept() -> None:
    assert fields_of(submission_row(body(), BOUNDS, 0, GIVEN))["id"] == GIVEN


@pytest.mark.parametrize(
    ("given_id", "changes"),
    [
        (GIVEN, {"external_job_id": "job-1"}),
        (GIVEN, {"scheduled_at": "2026-01-31T09:00:00.124Z"}),
        (GIVEN.replace("-7", "-4"), {}),
        (GIVEN.replace("-8", "-c"), {}),
        (GIVEN.upper(), {}),
        (GIVEN + "\n", {}),
        (GIVEN.replace("-", ""), {}),
        ("", {}),
    ],
)
def test_an_id_that_the_event_cannot_have_is_refused(given_id: str, changes: dict[str, Any]) -> None:
    with pytest.raises(SubmissionError) as caught:
        submission_row(body(**changes), BOUNDS, 0, given_id)
    assert caught.value.field == "orchestrator-event-id"


FULL = {
    "source": "orders",
    "external_job_id": "j-1",
    "scheduled_at": "2026-01-31T09:00:00Z",
    "delivery_type": "KAFKA",
    "destination": "reminders",
    "payload": {"a": 1},
    "headers": {"x": "y"},
    "max_retries": 7,
    "retry_policy": "gentle",
    "ordering_key": "o-1",
    "priority": 5,
    "spread_seconds": 1.5,
    "expires_at": "2026-02-01T09:00:00Z",
    "correlation_id": "c-1",
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
}
OTHER = {
    "source": "others",
    "external_job_id": "j-2",
    "scheduled_at": "2026-01-31T10:00:00Z",
    "delivery_type": "HTTP",
    "destination": "https://example.com/hook",
    "payload": {"a": 2},
    "headers": {"x": "z"},
    "max_retries": 8,
    "retry_policy": "patient",
    "ordering_key": "o-2",
    "priority": 6,
    "spread_seconds": 2.5,
    "expires_at": "2026-02-02T09:00:00Z",
    "correlation_id": "c-2",
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00",
}


def test_the_table_of_fields_names_what_the_wire_and_the_submission_have() -> None:
    names = [field.name for field in FIELDS]
    assert set(Wire.__struct_fields__) == set(names) == set(FULL) == set(OTHER)
    assert set(Submission.__struct_fields__) == {"id", *names}
    required = [name for name in Wire.__struct_fields__ if name in ("source", "scheduled_at", "payload")]
    assert {field.name for field in FIELDS if field.required} == set(required)


@pytest.mark.parametrize("name", Submission.__struct_fields__)
def test_each_field_is_read_and_stands_in_its_own_column_of_the_row(name: str) -> None:
    one, other = (parse_submission(json.dumps(given).encode(), BOUNDS) for given in (FULL, OTHER))
    changed = msgspec.structs.replace(one, **{name: getattr(other, name)})
    assert changed != one
    before, after = fields_of(encode_row(one, 1)), fields_of(encode_row(changed, 1))
    columns = {"id": "id"} | {field.name: field.column for field in FIELDS}
    assert [column for column in before if before[column] != after[column]] == [columns[name]]


def test_a_row_holds_what_it_shares_with_others_in_fields_of_their_own() -> None:
    row = encode_row(parse_submission(json.dumps(FULL).encode(), BOUNDS), 7)
    assert row.n == 7
    assert b"".join(row.kind) in row.fields
    assert row.options is not None
    assert row.fields.endswith(b"".join(row.options))


@pytest.mark.parametrize("field", FIELDS, ids=[field.name for field in FIELDS])
def test_each_field_that_is_set_is_in_the_json_for_the_submission_topic(field: Field) -> None:
    submission = parse_submission(json.dumps(FULL).encode(), BOUNDS)
    assert parse_submission(encode_submission(submission), BOUNDS) == submission
    assert field.name in json.loads(encode_submission(submission))
