"""Submitting: what becomes an event, what is answered, and who is told."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString

import msgspec
import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb

from orchestrator.database import COPY_STAGED, staged
from orchestrator.dispatch.http.request import custom_headers
from orchestrator.events.encoding import encode_row
from orchestrator.events.headers import RESERVED_HEADER_PREFIXES, RESERVED_HEADERS, headers_fault
from orchestrator.events.ids import event_id, random_event_id
from orchestrator.events.submission import Submission
from orchestrator.events.tracing import Carried, carried
from tests.sql.conftest import Connect
from tests.support.sql_client import HOST, NOON, Client, event, results, seconds
from tests.support.upkeep import moved

COUNTS = "select (select count(*) from orchestrator.event), (select count(*) from orchestrator.timer)"


def submission(external_job_id: str | None = None, **changes: Any) -> Submission:
    at: datetime = changes.get("scheduled_at", NOON)
    fields: dict[str, Any] = {
        "id": random_event_id(at) if external_job_id is None else event_id("tests", external_job_id, at),
        "scheduled_at": at,
        "source": "tests",
        "external_job_id": external_job_id,
        "delivery_type": "HTTP",
        "destination": f"{HOST}/hook",
        "payload": b'{"n": 1}',
        "headers": None,
        "max_retries": 3,
        "retry_policy": None,
    }
    return Submission(**(fields | changes))


def stage(client: Client, submissions: Sequence[Submission]) -> None:
    retries = {n: item.max_retries for n, item in enumerate(submissions) if not -(2**15) <= item.max_retries < 2**15}
    small = [
        msgspec.structs.replace(item, max_retries=0) if n in retries else item for n, item in enumerate(submissions)
    ]
    with client.connection.cursor().copy(COPY_STAGED) as copy:
        copy.write(staged(encode_row(item, n) for n, item in enumerate(small)))
    for n, number in retries.items():  # which no encoded row holds
        client.rows("update pg_temp.submission set max_retries = %s where n = %s", number, n)


def submit_staged(client: Client, submissions: Sequence[Submission]) -> dict[int, tuple[str, str | None]]:
    """COPY and submit_staged() in one transaction; what is answered: n to (result, field)."""
    client.rows("select orchestrator.open_staging()")
    with client.transaction():
        stage(client, submissions)
        return {
            n: (result, field)
            for n, result, field in client.rows("select n, result, field from orchestrator.submit_staged()")
        }


# schedule_event


def test_an_event_scheduled_from_psql_is_kept_as_given(client: Client) -> None:
    uid = client.value(
        """select orchestrator.schedule_event(
          'https://receiver.example/hook', '{"a": [1, null]}', %s, 'billing', 'job-1', 7,
          '{"X-Tenant": "ocean"}')::text""",
        NOON + seconds(5),
    )
    assert uid == event_id("billing", "job-1", NOON + seconds(5))
    shown = client.get(uid)
    assert {
        name: shown[name] for name in ("source", "external_job_id", "payload", "headers", "max_retries", "status")
    } == {
        "source": "billing",
        "external_job_id": "job-1",
        "payload": {"a": [1, None]},
        "headers": {"X-Tenant": "ocean"},
        "max_retries": 7,
        "status": "scheduled",
    }


def test_scheduling_needs_no_more_than_a_destination_and_a_payload(client: Client) -> None:
    client.at(None)
    uid = client.value("select orchestrator.schedule_event('https://receiver.example', 'null')::text")
    assert [lease.event_id for lease in client.claim()] == [uid]


def test_scheduling_the_same_triple_again_gives_the_same_id_and_changes_nothing(client: Client) -> None:
    schedule = "select orchestrator.schedule_event(%s, %s, %s, 's', 'j')::text"
    first = client.value(schedule, f"{HOST}/one", "1", NOON)
    again = client.value(schedule, f"{HOST}/two", "2", NOON)
    assert first == again
    assert client.get(first)["payload"] == 1
    assert client.rows(COUNTS) == [(1, 1)]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"p_destination": "ftp://x"}, "destination"),
        ({"p_destination": None}, "destination"),
        ({"p_scheduled_at": None}, "scheduled_at"),
        ({"p_scheduled_at": "infinity"}, "scheduled_at"),
        ({"p_scheduled_at": "-infinity"}, "scheduled_at"),
        ({"p_scheduled_at": "0044-03-15 BC"}, "scheduled_at"),
        ({"p_scheduled_at": "99999-01-01"}, "scheduled_at"),
        ({"p_source": ""}, "source"),
        ({"p_source": None}, "source"),
        ({"p_max_retries": -1}, "max_retries"),
        ({"p_max_retries": 2**31 - 1}, "max_retries"),
        ({"p_retry_policy": "unheard-of"}, "retry_policy"),
        ({"p_headers": "[]"}, "headers"),
    ],
)
def test_a_wrong_argument_of_schedule_event_is_an_error_that_names_it(
    client: Client, arguments: dict[str, Any], field: str
) -> None:
    given = {"p_destination": f"{HOST}/hook", "p_payload": "1"} | arguments
    call = sql.SQL("select orchestrator.schedule_event({})").format(
        sql.SQL(", ").join(
            sql.SQL("{} => {}").format(sql.Identifier(name), sql.Literal(value)) for name, value in given.items()
        )
    )
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=f"^{field}: "):
        client.connection.execute(call)
    assert client.rows(COUNTS) == [(0, 0)]


# submit_events: what is refused, and that nothing else suffers

TOO_LONG = "x" * 201
WRONG: list[tuple[Any, str]] = [
    (event(scheduled_at=...), "scheduled_at"),
    (event(scheduled_at=None), "scheduled_at"),
    (event(scheduled_at="2030-01-31T08:00:00"), "scheduled_at"),
    (event(scheduled_at="2030-01-31"), "scheduled_at"),
    (event(scheduled_at="now"), "scheduled_at"),
    (event(scheduled_at="tomorrow"), "scheduled_at"),
    (event(scheduled_at="infinity"), "scheduled_at"),
    (event(scheduled_at="2030-02-30T08:00:00Z"), "scheduled_at"),
    (event(scheduled_at="2030-01-31T08:00:00.1234567Z"), "scheduled_at"),
    (event(scheduled_at="2030-01-31T08:00:00 Europe/Berlin"), "scheduled_at"),
    (event(scheduled_at="2030-01-31T08:00:00Z\n"), "scheduled_at"),
    (event(scheduled_at="0000-01-01T00:00:00Z"), "scheduled_at"),
    (event(scheduled_at=""), "scheduled_at"),
    (event(scheduled_at=1_900_000_000), "scheduled_at"),
    (event(scheduled_at=NOON - timedelta(days=400)), "scheduled_at"),
    (event(scheduled_at="1969-12-31T23:59:59.999999Z"), "scheduled_at"),
    (event(scheduled_at="0001-01-01T00:00:00Z"), "scheduled_at"),
    (event(scheduled_at="2200-12-31T00:00:00Z"), "scheduled_at"),
    (event(scheduled_at="9999-12-31T23:59:59Z"), "scheduled_at"),
    (event(source=...), "source"),
    (event(source=None), "source"),
    (event(source=""), "source"),
    (event(source=TOO_LONG), "source"),
    (event(source=["tests"]), "source"),
    (event(external_job_id=""), "external_job_id"),
    (event(external_job_id=TOO_LONG), "external_job_id"),
    (event(external_job_id=17), "external_job_id"),
    (event(delivery_type="KAFKA"), "destination"),
    (event(delivery_type="KAFKA", destination="."), "destination"),
    (event(delivery_type="KAFKA", destination="a" * 250), "destination"),
    (event(ordering_key=""), "ordering_key"),
    (event(ordering_key=TOO_LONG), "ordering_key"),
    (event(ordering_key=17), "ordering_key"),
    (event(delivery_type="http"), "delivery_type"),
    (event(delivery_type=True), "delivery_type"),
    (event(destination=...), "destination"),
    (event(destination=None), "destination"),
    (event(destination=""), "destination"),
    (event(destination="https://"), "destination"),
    (event(destination="https:///path"), "destination"),
    (event(destination="javascript:alert(1)"), "destination"),
    (event(destination=f"{HOST}/{'x' * 2048}"), "destination"),
    (event(destination={"url": HOST}), "destination"),
    (event(payload=...), "payload"),
    (event(headers="X: 1"), "headers"),
    (event(headers=["X"]), "headers"),
    (event(headers={"X-Count": 1}), "headers"),
    (event(headers={"X-Nothing": None}), "headers"),
    (event(headers={"X-Deep": {"a": "b"}}), "headers"),
    (event(headers={"X-Split": "a\r\nEvil: 1"}), "headers"),
    (event(headers={"Bad Name": "a"}), "headers"),
    (event(headers={"": "a"}), "headers"),
    (event(headers={"Content-Length": "0"}), "headers"),
    (event(headers={"webhook-signature": "forged"}), "headers"),
    (event(headers={"X-A": "1", "x-a": "2"}), "headers"),
    (event(headers={f"X-{n}": "" for n in range(21)}), "headers"),
    (event(headers={"X-Long": "x" * 4097}), "headers"),
    (event(max_retries=-1), "max_retries"),
    (event(max_retries=101), "max_retries"),
    (event(max_retries=10**30), "max_retries"),
    (event(max_retries=1.5), "max_retries"),
    (event(max_retries="3"), "max_retries"),
    (event(max_retries=True), "max_retries"),
    (event(max_retries=[3]), "max_retries"),
    (event(retry_policy="unheard-of"), "retry_policy"),
    (event(retry_policy=""), "retry_policy"),
    (event(retry_policy="x" * 100_000), "retry_policy"),
    (event(retry_policy={}), "retry_policy"),
    (event(retries=3), "retries"),
    (event(**{"x" * 10_000: 1}), "x" * 80),
    ({}, "scheduled_at"),
    (None, "event"),
    (7, "event"),
    ("payload", "event"),
    ([event()], "event"),
    (True, "event"),
]


@pytest.mark.parametrize(("wrong", "field"), WRONG, ids=[f"{field}-{n}" for n, (_, field) in enumerate(WRONG)])
def test_a_wrong_item_is_refused_by_field_and_the_other_items_are_kept(client: Client, wrong: Any, field: str) -> None:
    answers = client.submit(event(source="before"), wrong, event(source="after"))
    by_n = {answer.n: answer for answer in answers}
    assert sorted(by_n) == [1, 2, 3]
    assert (by_n[2].result, by_n[2].field, by_n[2].id) == ("refused", field, None)
    assert by_n[2].reason
    assert len(by_n[2].reason) < 1000
    assert [by_n[n].result for n in (1, 3)] == ["accepted", "accepted"]
    assert client.column("select source from orchestrator.event order by 1") == ["after", "before"]
    assert client.rows(COUNTS) == [(2, 2)]
    assert client.totals() == {"accepted": 2}


def test_a_batch_with_every_wrong_item_keeps_its_good_items(client: Client) -> None:
    items = [item for wrong, _ in WRONG for item in (wrong, event())]
    answers = client.submit(*items)
    expected = [result for _ in WRONG for result in ("refused", "accepted")]
    assert [answer.result for answer in sorted(answers)] == expected
    assert client.rows(COUNTS) == [(len(WRONG), len(WRONG))]


def test_null_is_the_same_as_absent_where_a_field_may_be_absent(client: Client) -> None:
    uid = client.schedule(external_job_id=None, delivery_type=None, headers=None, max_retries=None, retry_policy=None)
    shown = client.get(uid)
    assert (shown["external_job_id"], shown["delivery_type"], shown["headers"]) == (None, "HTTP", None)
    assert (shown["max_retries"], shown["retry_policy"]) == (3, None)


@pytest.mark.parametrize(
    "at",
    [
        "2030-01-31T08:00:00Z",
        "2030-01-31t08:00:00z",
        "2030-01-31 08:00+00",
        "2030-01-31T13:30:00+05:30",
        "2030-01-31T00:00:00-0800",
        "2030-01-31T08:00:00.000000Z",
    ],
)
def test_every_way_to_write_a_time_with_its_zone_means_the_same(client: Client, at: str) -> None:
    client.at(datetime(2030, 1, 1, tzinfo=UTC))
    [answer] = client.submit(event(scheduled_at=at, external_job_id="j"))
    assert answer.id == event_id("tests", "j", datetime.fromisoformat("2030-01-31T08:00:00+00:00"))


def test_microseconds_of_the_time_are_kept(client: Client) -> None:
    uid = client.schedule(scheduled_at=NOON + timedelta(microseconds=1))
    [(at, due_at)] = client.rows("select scheduled_at, due_at from orchestrator.timer where event_id = %s", uid)
    assert at == due_at == NOON + timedelta(microseconds=1)


def test_an_event_of_the_past_is_due_at_once_and_keeps_its_time(client: Client) -> None:
    uid = client.schedule(scheduled_at=NOON - timedelta(days=2))
    [lease] = client.claim()
    assert (lease.event_id, lease.due_at, lease.scheduled_at) == (uid, NOON, NOON - timedelta(days=2))


def test_the_first_instant_kept_and_the_last_that_can_be_scheduled_are_inside(client: Client) -> None:
    first = NOON.replace(hour=0) - timedelta(days=7)
    end = NOON + timedelta(days=400)
    instant = timedelta(microseconds=1)
    answers = client.submit(*[event(scheduled_at=at) for at in (first - instant, first, end - instant, end)])
    assert [answer.result for answer in sorted(answers)] == ["refused", "accepted", "accepted", "refused"]
    before, _, _, beyond = sorted(answers)
    assert (before.field, beyond.field) == ("scheduled_at", "scheduled_at")
    assert f"send {first.isoformat()} or later" in str(before.reason)
    assert "more than 400 days ahead (MAX_SCHEDULE_AHEAD_DAYS)" in str(beyond.reason)
    assert f"send a time before {end.isoformat()}" in str(beyond.reason)


def test_a_day_without_a_partition_amid_the_others_puts_its_events_into_the_horizon(client: Client) -> None:
    client.rows(
        "select orchestrator.create_partitions(%s, %s)",
        (NOON + timedelta(days=60)).date(),
        (NOON + timedelta(days=61)).date(),
    )
    days = [50, 60, 61, 62, 0]
    answers = client.submit(*[event(scheduled_at=NOON + timedelta(days=day)) for day in days])
    assert {answer.result for answer in answers} == {"accepted"}
    waiting = client.column("select scheduled_at from orchestrator.horizon order by 1")
    assert waiting == [NOON + timedelta(days=day) for day in (50, 62)]
    placed = client.column("select scheduled_at from orchestrator.event order by 1")
    assert placed == [NOON + timedelta(days=day) for day in (0, 60, 61)]


@pytest.mark.parametrize("document", [{}, "x", 1, None, True])
def test_submitting_anything_but_an_array_is_an_error(client: Client, document: Any) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="expected a JSON array"):
        client.submit_json(document)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="expected a JSON array"):
        client.rows("select * from orchestrator.submit_events(null)")


def test_submitting_an_empty_array_does_nothing(client: Client) -> None:
    assert client.submit() == []
    assert client.totals() == {}


FREE = [
    *("accept", "accept-encoding", "authorization", "cookie", "date", "forwarded", "from", "idempotency-key", "origin"),
    *("referer", "via", "x-forwarded-for", "x-webhook-id", "content-language", "content-digest", "proxy", "webhook"),
]
RESERVED = [*RESERVED_HEADERS, *(f"{prefix}any" for prefix in RESERVED_HEADER_PREFIXES), "proxy-authorization"]


@pytest.mark.parametrize("change", [str.lower, str.upper, str.title])
def test_the_same_headers_are_reserved_in_sql_over_the_api_and_on_delivery(
    client: Client, change: Callable[[str], str]
) -> None:
    for name in [*RESERVED, *FREE]:
        headers = {change(name): "x"}
        in_sql = client.value("select orchestrator.check_headers(%s)", Jsonb(headers))
        of_secrets = client.value("select orchestrator.check_secrets('a.example', null, %s)", Jsonb(headers))
        refused = "header: it is set on delivery"
        if name in RESERVED:
            assert refused in (in_sql or ""), name
            assert refused in (of_secrets or ""), name
            assert refused in (headers_fault(headers) or ""), name
            assert custom_headers(headers) == {}, name
        else:
            assert (in_sql, of_secrets, headers_fault(headers)) == (None, None, None), name
            assert custom_headers(headers) == {name: "x"}


def test_headers_that_a_client_may_set_are_kept(client: Client) -> None:
    headers = {"X-Tenant": "ocean", "Authorization": "Bearer a.b-c=", "X-Text": "\tgrüße \U0001f600", "X-Empty": ""}
    client.schedule(headers=headers)
    [lease] = client.claim()
    assert lease.headers == headers


def test_a_large_payload_arrives_whole(client: Client) -> None:
    payload = {"text": "\u00e4\U0001f600" * 250_000, "deep": json.loads("[" * 60 + "]" * 60)}
    client.schedule(payload=payload)
    [lease] = client.claim()
    assert lease.payload == payload


def test_ten_thousand_events_in_one_array_are_kept(client: Client) -> None:
    answers = client.submit(*[event(external_job_id=str(n)) for n in range(10_000)])
    assert [answer.n for answer in answers] == list(range(1, 10_001))
    assert {answer.result for answer in answers} == {"accepted"}
    assert client.rows(COUNTS) == [(10_000, 10_000)]


# Duplicates


def test_a_triple_repeated_within_a_batch_is_kept_once(client: Client) -> None:
    answers = client.submit(
        *[event(external_job_id="same", payload=n) for n in range(3)], event(external_job_id="other")
    )
    assert [answer.result for answer in sorted(answers)] == ["accepted", "duplicate", "duplicate", "accepted"]
    assert len({answer.id for answer in answers}) == 2
    assert client.get(str(min(answers).id))["payload"] == 0
    assert client.rows(COUNTS) == [(2, 2)]
    assert client.totals() == {"accepted": 2, "duplicate": 2}


def test_a_wrong_twin_does_not_take_the_place_of_the_good_one(client: Client) -> None:
    wrong, good = event(external_job_id="twin", destination="nowhere"), event(external_job_id="twin")
    answers = client.submit(wrong, good, wrong, good)
    assert [answer.result for answer in sorted(answers)] == ["refused", "accepted", "refused", "duplicate"]


def test_a_triple_submitted_before_is_a_duplicate_and_a_random_id_never_is(client: Client) -> None:
    client.submit(event(external_job_id="a"), event())
    answers = client.submit(event(external_job_id="a"), event(), event(external_job_id="b"))
    assert [answer.result for answer in sorted(answers)] == ["duplicate", "accepted", "accepted"]
    assert client.rows(COUNTS) == [(4, 4)]


@pytest.mark.parametrize("end", ["delivered", "fail", "cancelled"])
def test_resubmitting_a_finished_event_does_not_revive_it(client: Client, end: str) -> None:
    uid = client.schedule(external_job_id="once")
    if end == "cancelled":
        client.cancel(uid)
    else:
        client.finish(results(client.claim(), end))
    before = client.get(uid)
    [answer] = client.submit(event(external_job_id="once"))
    assert (answer.result, answer.id) == ("duplicate", uid)
    assert client.get(uid) == before
    assert client.claim() == []


def test_resubmitting_an_event_in_flight_leaves_its_lease_alone(client: Client) -> None:
    client.schedule(external_job_id="once")
    leases = client.claim()
    assert [answer.result for answer in client.submit(event(external_job_id="once"))] == ["duplicate"]
    assert client.claim() == []
    assert client.finish(results(leases)) == []


@pytest.mark.parametrize("first_commits", [True, False])
def test_two_sessions_submit_the_same_event_at_once(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor, first_commits: bool
) -> None:
    first, second = connect(), connect()
    batch = [event(external_job_id=str(n)) for n in range(10)]
    first.rows("begin")
    first.submit(*batch)
    later = threads.submit(second.submit, *reversed(batch))
    observer.wait_until_blocked(second)
    first.rows("commit" if first_commits else "rollback")
    assert {answer.result for answer in later.result(10)} == {"duplicate" if first_commits else "accepted"}
    assert observer.rows(COUNTS) == [(10, 10)]
    assert observer.totals()["accepted"] == 10


def test_many_sessions_submitting_overlapping_batches_neither_lose_nor_repeat_nor_deadlock(
    connect: Connect, threads: ThreadPoolExecutor
) -> None:
    clients = [connect() for _ in range(6)]

    def submit(number: int) -> list[str]:
        answers = []
        for turn in range(8):
            jobs = [str(n) for n in range(turn * 20, turn * 20 + 40)]
            batch = [event(external_job_id=job) for job in (jobs if number % 2 else reversed(jobs))]
            answers += clients[number].submit(*batch)
        return [answer.result for answer in answers]

    answered = [result for many in threads.map(submit, range(6)) for result in many]
    assert answered.count("accepted") == 180
    assert answered.count("duplicate") == 6 * 8 * 40 - 180
    assert clients[0].rows(COUNTS) == [(180, 180)]


# submit_staged


def test_a_staged_batch_without_exceptions_answers_nothing(client: Client) -> None:
    assert submit_staged(client, [submission(str(n)) for n in range(1000)]) == {}
    assert client.rows(COUNTS) == [(1000, 1000)]
    assert client.totals() == {"accepted": 1000}


def test_a_staged_batch_answers_duplicates_and_refusals_by_number(client: Client) -> None:
    submit_staged(client, [submission("kept")])
    answers = submit_staged(
        client,
        [
            submission("new"),
            submission("kept"),
            submission("new"),
            submission(destination="nowhere"),
            submission(scheduled_at=NOON + timedelta(days=401)),
            submission(scheduled_at=NOON - timedelta(days=365)),
            submission(max_retries=70_000),
            submission(max_retries=-70_000),
            submission(retry_policy="unheard-of"),
            submission(headers=b"[]"),
            submission(delivery_type="SMTP"),
            submission(source=""),
            submission(""),
            submission(),
        ],
    )
    assert answers == {
        1: ("duplicate", None),
        2: ("duplicate", None),
        3: ("refused", "destination"),
        4: ("refused", "scheduled_at"),
        5: ("refused", "scheduled_at"),
        6: ("refused", "max_retries"),
        7: ("refused", "max_retries"),
        8: ("refused", "retry_policy"),
        9: ("refused", "headers"),
        10: ("refused", "delivery_type"),
        11: ("refused", "source"),
        12: ("refused", "external_job_id"),
    }
    assert client.rows(COUNTS) == [(3, 3)]


def test_duplicates_are_taken_out_of_a_staged_batch_and_the_rest_is_kept(client: Client) -> None:
    client.rows("insert into orchestrator.retry_policy (name) values ('slow')")
    submit_staged(client, [submission("kept"), submission("slow", retry_policy="slow")])
    client.rows("delete from orchestrator.retry_policy where name = 'slow'")
    new = [submission(f"new {n}") for n in range(3)]
    answers = submit_staged(
        client, [new[0], submission("kept"), *new, submission("slow", retry_policy="slow"), submission("kept")]
    )
    assert answers == dict.fromkeys((1, 2, 5, 6), ("duplicate", None))
    assert client.rows(COUNTS) == [(5, 5)]
    assert client.totals() == {"accepted": 5, "duplicate": 4}


def test_a_duplicate_that_breaks_a_rule_that_lasts_is_refused(client: Client) -> None:
    submit_staged(client, [submission("kept")])
    answers = submit_staged(
        client,
        [
            submission("new"),
            submission("kept", max_retries=101),
            submission("new", retry_policy="unheard-of"),
            submission("kept"),
        ],
    )
    assert answers == {1: ("refused", "max_retries"), 2: ("refused", "retry_policy"), 3: ("duplicate", None)}
    assert client.rows(COUNTS) == [(2, 2)]


@pytest.mark.parametrize("at", ["infinity", "-infinity"])
def test_an_endless_time_in_the_staging_table_is_refused(client: Client, at: str) -> None:
    client.rows("select orchestrator.open_staging()")
    with client.transaction():
        stage(client, [submission("good")])
        client.rows(
            """insert into pg_temp.submission
              (n, id, scheduled_at, source, delivery_type, destination, payload, max_retries)
            select 1, gen_random_uuid(), %s, source, delivery_type, destination, payload, 3 from pg_temp.submission""",
            at,
        )
        assert client.rows("select n, result, field from orchestrator.submit_staged()") == [
            (1, "refused", "scheduled_at")
        ]


def test_a_retry_policy_that_exists_is_accepted(client: Client) -> None:
    client.rows("insert into orchestrator.retry_policy (name) values ('slow')")
    assert (
        submit_staged(client, [submission(retry_policy="slow"), submission(retry_policy="default"), submission()]) == {}
    )


def test_payload_and_headers_keep_the_bytes_that_were_copied(client: Client) -> None:
    payload = b'{ "b":1.0,"a" : "\\u00e4\\t\\\\", "a":2 , "big":123456789012345678901234567890.10}'
    submit_staged(client, [submission(payload=payload, headers=b'{ "X-A" :"\\u00fc"}')])
    assert client.rows("select payload::text, headers::text from orchestrator.claim_due_events(1)") == [
        (payload.decode(), '{ "X-A" :"\\u00fc"}')
    ]


def test_the_staging_table_is_empty_after_each_transaction(client: Client) -> None:
    submit_staged(client, [submission()])
    assert client.rows("select * from pg_temp.submission") == []


def test_two_staged_batches_in_one_transaction_are_both_kept(client: Client) -> None:
    client.rows("select orchestrator.open_staging()")
    with client.transaction():
        stage(client, [submission("a"), submission("b")])
        assert client.rows("select * from orchestrator.submit_staged()") == []
        client.rows("select orchestrator.open_staging()")
        stage(client, [submission("b"), submission("c")])
        assert client.rows("select n, result from orchestrator.submit_staged()") == [(0, "duplicate")]
    assert client.rows(COUNTS) == [(3, 3)]
    assert client.totals() == {"accepted": 3, "duplicate": 1}


def test_two_calls_of_submit_events_in_one_transaction_are_both_kept(client: Client) -> None:
    with client.transaction():
        first = client.submit(event(external_job_id="a"), event(source=""))
        second = client.submit(event(external_job_id="a"), event(external_job_id="b"))
    assert [answer.result for answer in sorted(first)] == ["accepted", "refused"]
    assert [answer.result for answer in sorted(second)] == ["duplicate", "accepted"]


def test_a_rolled_back_submission_leaves_nothing(client: Client) -> None:
    client.rows("begin")
    client.submit(event())
    client.rows("rollback")
    assert client.rows(COUNTS) == [(0, 0)]
    assert client.totals() == {}
    assert [answer.result for answer in client.submit(event())] == ["accepted"]


def test_submitting_ignores_the_session_s_time_zone_and_date_style(client: Client) -> None:
    client.rows("set timezone = 'Pacific/Chatham'")
    client.rows("set datestyle = 'SQL, DMY'")
    uid = client.schedule(external_job_id="j")
    assert uid == event_id("tests", "j", NOON)
    assert client.get(uid)["scheduled_at"] == NOON.isoformat()
    [answer] = client.submit(event(scheduled_at=NOON + timedelta(days=401)))
    assert "+00:00 is more than" in str(answer.reason)


def test_a_staging_table_of_another_owner_is_refused(connect: Connect) -> None:
    client = connect()
    client.set_role("orchestrator_submit")
    client.rows("create temp table submission (n integer, id uuid)")
    for call in (
        client.submit,
        lambda: client.rows("select orchestrator.open_staging()"),
        lambda: client.rows("select * from orchestrator.submit_staged()"),
    ):
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="not the staging table"):
            call()


def test_a_view_in_place_of_the_staging_table_is_refused(connect: Connect) -> None:
    client = connect()
    client.rows("create temp view submission as select 1 as n")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="not the staging table"):
        client.rows("select * from orchestrator.submit_staged()")


def test_submitting_without_a_staging_table_says_how_to_get_one(client: Client) -> None:
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as raised:
        client.rows("select * from orchestrator.submit_staged()")
    assert "orchestrator.open_staging()" in str(raised.value.diag.message_hint)


# Notifications


def listener(connect: Connect) -> Client:
    client = connect()
    client.rows("listen orchestrator_due")
    return client


def heard(client: Client) -> list[float]:
    client.rows("select 1")
    return [float(notification.payload) for notification in client.connection.notifies(timeout=0)]


def test_dispatchers_are_notified_of_a_submission_that_is_due_soon_only(connect: Connect, client: Client) -> None:
    ear = listener(connect)
    client.submit(event(scheduled_at=NOON + seconds(10)), event(scheduled_at=NOON + timedelta(days=3)))
    assert heard(ear) == []
    client.submit(event(scheduled_at=NOON + seconds(20)), event(scheduled_at=NOON + seconds(9.5)))
    assert heard(ear) == [(NOON + seconds(9.5)).timestamp()]


def test_dispatchers_are_not_notified_of_a_rolled_back_submission(connect: Connect, client: Client) -> None:
    ear = listener(connect)
    client.rows("begin")
    client.submit(event())
    client.rows("rollback")
    assert heard(ear) == []


def test_a_transaction_notifies_again_only_of_events_due_earlier(connect: Connect, client: Client) -> None:
    ear = listener(connect)
    with client.transaction():
        for due_s in (9, 9.5, 3, 5, -5, 0, -10):
            client.submit(event(scheduled_at=NOON + seconds(due_s)))
    assert heard(ear) == [(NOON + seconds(due_s)).timestamp() for due_s in (9, 3, 0)]


def test_a_transaction_notifies_once_however_often_it_submits(connect: Connect, client: Client) -> None:
    ear = listener(connect)
    client.at(None)
    client.rows("select orchestrator.schedule_event('https://receiver.example', '1') from generate_series(1, 50)")
    assert len(heard(ear)) == 1
    client.rows("select orchestrator.schedule_event('https://receiver.example', '1')")
    client.rows("select orchestrator.schedule_event('https://receiver.example', '1')")
    assert len(heard(ear)) == 2


def test_an_id_of_a_random_event_carries_its_time(client: Client) -> None:
    assert uuid.UUID(client.schedule()).int >> 80 == int(NOON.timestamp() * 1000)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [({"external_job_id": "."}, "external_job_id"), ({"external_job_id": ".."}, "external_job_id")]
    + [({"destination": url}, "destination") for url in ("https://bücher.example/", "https://a.example/ä")],
)
def test_names_that_the_api_refuses_are_refused_in_sql(client: Client, wrong: dict[str, str], field: str) -> None:
    [answer] = client.submit(event(**wrong))
    assert (answer.result, answer.field) == ("refused", field)


# Submitting again what was right when it came


@pytest.mark.parametrize("days", [3, 50])
def test_a_policy_that_is_gone_does_not_hide_that_an_event_is_kept(client: Client, days: int) -> None:
    client.rows("insert into orchestrator.retry_policy (name) values ('gone')")
    given = event(scheduled_at=NOON + timedelta(days=days), external_job_id="j", retry_policy="gone")
    [first] = client.submit(given)
    client.rows("delete from orchestrator.retry_policy where name = 'gone'")
    [again, other] = client.submit(given, {**given, "external_job_id": "k"})
    assert (again.id, again.result, again.status) == (first.id, "duplicate", "scheduled")
    assert (other.result, other.field) == ("refused", "retry_policy")


@pytest.mark.parametrize("days", [20, 50])
def test_a_shorter_maximum_ahead_does_not_hide_that_an_event_is_kept(client: Client, days: int) -> None:
    given = event(scheduled_at=NOON + timedelta(days=days), external_job_id="j")
    [first] = client.submit(given)
    client.rows("select orchestrator.configure_retention(7, 5, 10)")
    [again, other] = client.submit(given, event(scheduled_at=NOON + timedelta(days=51)))
    assert (again.id, again.result) == (first.id, "duplicate")
    assert (other.result, other.field) == ("refused", "scheduled_at")
    client.at(NOON - timedelta(days=30))  # a clock that was ahead
    [again] = client.submit(given)
    assert (again.id, again.result) == (first.id, "duplicate")


def test_a_submission_with_a_wrong_field_is_refused_although_its_id_is_kept(client: Client) -> None:
    client.schedule(external_job_id="j")
    [answer] = client.submit(event(external_job_id="j", max_retries=101))
    assert (answer.result, answer.field) == ("refused", "max_retries")


def test_a_duplicate_says_what_state_its_event_is_in(client: Client) -> None:
    names = ("scheduled", "in_flight", "delivered", "dead", "cancelled", "rescheduled", "retrying")
    given = {name: event(external_job_id=name, max_retries=int(name == "retrying")) for name in names}
    ids = {name: str(client.submit(each)[0].id) for name, each in given.items()}
    leases = {lease.external_job_id: lease for lease in client.claim()}
    client.release([leases[name] for name in ("scheduled", "cancelled", "rescheduled")])
    client.cancel(ids["cancelled"])
    moved(client, ids["rescheduled"], NOON + seconds(60))
    client.finish(results([leases["delivered"]]))
    client.finish(results([leases["dead"]], "fail") + results([leases["retrying"]], "retry"))
    answers = client.submit(*given.values(), event(external_job_id="new"), event(external_job_id="bad", max_retries=-1))
    assert [(answer.result, answer.status) for answer in answers] == [
        *(("duplicate", name) for name in names), ("accepted", "scheduled"), ("refused", None),
    ]  # fmt: skip


def test_a_duplicate_that_waited_for_the_first_knows_its_state(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor
) -> None:
    first, second = connect(), connect()
    first.rows("begin")
    uid = first.schedule(external_job_id="j")
    later = threads.submit(second.submit, event(external_job_id="j"))
    observer.wait_until_blocked(second)
    first.cancel(uid)
    first.rows("commit")
    [answer] = later.result(10)
    assert (answer.id, answer.result, answer.status) == (uid, "duplicate", "cancelled")


def test_scheduling_again_from_psql_says_what_state_the_event_is_in(client: Client) -> None:
    told: list[str] = []
    client.connection.add_notice_handler(lambda notice: told.append(str(notice.message_primary)))
    client.rows("set client_min_messages = notice")
    call: LiteralString = "select orchestrator.schedule_event('https://a.example', '{}', %s, p_external_job_id => 'j')"
    uid = client.value(call, NOON)
    assert told == []
    client.cancel(uid)
    assert client.value(call, NOON) == uid
    assert told == [f"event {uid} is kept already, and is cancelled"]


TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("given", "kept"),
    [(TRACE, TRACE), (f"cc{TRACE[2:]}-more", TRACE), (f"{TRACE}-more", None), (f"ff{TRACE[2:]}", None), ("", None)],
)
def test_sql_reads_a_traceparent_as_python_does(client: Client, given: str, kept: str | None) -> None:
    [answer] = client.submit(event(traceparent=given))
    if kept is None:
        assert (answer.result, answer.field) == ("refused", "traceparent")
        assert carried(None, given.encode()) == Carried(None, None)
    else:
        assert client.get(str(answer.id))["traceparent"] == kept
        assert carried(None, given.encode()) == Carried(None, kept)


@pytest.mark.parametrize("given", ["", " c", "c" * 201, "é", "a\tb"])
def test_a_correlation_id_that_is_not_printable_ascii_is_refused(client: Client, given: str) -> None:
    [answer, other] = client.submit(event(correlation_id=given), event(correlation_id="order 7"))
    assert (answer.result, answer.field, other.result) == ("refused", "correlation_id", "accepted")
    assert answer.reason is not None
    assert answer.reason.startswith("expected 1 to 200 printable ASCII characters")


def test_schedule_event_takes_what_an_event_is_followed_by(client: Client) -> None:
    client.rows(
        "select orchestrator.schedule_event('https://r.example', '1', p_correlation_id => 'c', p_traceparent => %s)",
        TRACE,
    )
    assert client.rows("select correlation_id, traceparent from orchestrator.event_status") == [("c", TRACE)]


def test_a_claim_gives_what_an_event_is_followed_by(client: Client) -> None:
    client.submit(event(correlation_id="c", traceparent=TRACE), event())
    assert {(lease.correlation_id, lease.traceparent) for lease in client.claim()} == {("c", TRACE), (None, None)}


def test_an_event_staged_for_a_time_after_2200_to_expire_is_refused(client: Client) -> None:
    with client.transaction():
        client.rows("select orchestrator.open_staging()")
        client.rows(
            """insert into pg_temp.submission
              (n, id, scheduled_at, source, delivery_type, payload, max_retries, expires_at)
            values (1, orchestrator.random_event_id(%s), %s, 's', 'KAFKA', '1', 0, '2201-01-01 00:00+00')""",
            NOON,
            NOON,
        )
        [(_, _, result, field, reason)] = client.rows("select * from orchestrator.submit_staged()")
    assert (result, field) == ("refused", "expires_at")
    assert reason.startswith("expected a time from 1970 to 2200")


def test_a_staging_table_that_a_session_opened_before_the_migration_gets_the_new_columns(client: Client) -> None:
    client.rows("select orchestrator.open_staging()")
    client.rows("alter table pg_temp.submission drop column correlation_id, drop column traceparent")
    with client.transaction():
        client.rows("select orchestrator.open_staging()")
        client.rows(
            """insert into pg_temp.submission
              (n, id, scheduled_at, source, delivery_type, payload, max_retries, traceparent)
            values (1, orchestrator.random_event_id(%s), %s, 's', 'KAFKA', '1', 0, %s)""",
            NOON,
            NOON,
            TRACE,
        )
        assert client.rows("select * from orchestrator.submit_staged()") == []
    assert client.column("select traceparent from orchestrator.event") == [TRACE]
