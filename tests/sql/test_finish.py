"""Finishing and releasing: what a result does to its event, and which results count."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sql.conftest import Connect
from tests.support.databases import Databases
from tests.support.sql_client import NOON, Client, Finish, Lease, Result, event, results, seconds


def claimed(client: Client, count: int = 1, **changes: Any) -> list[Lease]:
    client.schedule_many(count, **changes)
    leases = client.claim(count)
    assert len(leases) == count
    return sorted(leases)


def due_at(client: Client, event_id: str) -> Any:
    return client.value("select due_at from orchestrator.timer where event_id = %s", event_id)


# Delivered


def test_a_delivered_event_is_done(client: Client) -> None:
    [lease] = claimed(client)
    started = (NOON + timedelta(microseconds=1500)).timestamp()
    finished = (NOON + seconds(0.25)).timestamp()
    assert client.finish([Result(lease.event_id, 1, "delivered", 204, started, finished)]) == []
    shown = client.get(lease.event_id)
    assert (shown["status"], shown["attempt"], shown["due_at"]) == ("delivered", 1, None)
    assert shown["outcomes"] == [
        {
            "attempt": 1,
            "result": "delivered",
            "status_code": 204,
            "error": None,
            "response": None,
            "due_at": NOON.isoformat(),
            "claimed_at": None,
            "started_at": f"{NOON:%Y-%m-%d}T12:00:00.0015+00:00",
            "finished_at": f"{NOON:%Y-%m-%d}T12:00:00.25+00:00",
            "lateness_ms": 1.5,
            "waited": None,
            "worker": "by hand",
            "successor": None,
        }
    ]
    assert client.at(NOON + seconds(3600)).claim() == []
    assert client.totals() == {"accepted": 1, "delivered": 1}


def test_a_whole_batch_is_delivered_in_one_call(client: Client) -> None:
    leases = claimed(client, 500)
    assert client.finish(results(leases)) == []
    assert client.value("select count(*) from orchestrator.timer") == 0
    assert client.totals() == {"accepted": 500, "delivered": 500}


def test_a_result_without_times_is_recorded_as_of_now(client: Client) -> None:
    [lease] = claimed(client)
    client.at(NOON + seconds(2)).rows(
        "select * from orchestrator.finish_events(%s::uuid[], '{1}', '{delivered}')", [lease.event_id]
    )
    assert client.rows("select started_at, finished_at from orchestrator.outcome") == [(None, NOON + seconds(2))]


# Failed


def test_a_failed_attempt_waits_for_the_next_one(client: Client) -> None:
    [lease] = claimed(client, max_retries=2)
    [answer] = client.finish(results([lease], "retry", status_code=503, error="HTTP 503", response="busy"))
    assert (answer.event_id, answer.result) == (lease.event_id, "retried")
    assert answer.due_at == due_at(client, lease.event_id)
    assert NOON <= answer.due_at <= NOON + seconds(1)  # the default policy: full jitter over one second
    assert client.status(lease.event_id) == "retrying"
    [again] = client.at(answer.due_at).claim()
    assert (again.event_id, again.attempt, again.due_at) == (lease.event_id, 2, answer.due_at)
    [outcome] = client.get(lease.event_id)["outcomes"]
    assert (outcome["result"], outcome["error"], outcome["response"]) == ("retried", "HTTP 503", "busy")
    assert outcome["due_at"] == NOON.isoformat()
    assert client.totals() == {"accepted": 1, "retried": 1}


def test_an_event_without_retries_left_becomes_a_dead_letter(client: Client) -> None:
    uid = client.schedule(max_retries=2)
    for attempt, expected in ((1, "retried"), (2, "retried"), (3, "dead")):
        client.at(NOON + timedelta(hours=attempt))
        [lease] = client.claim()
        assert lease.attempt == attempt
        [answer] = client.finish(results([lease], "retry", error=f"failure {attempt}"))
        assert (answer.event_id, answer.result) == (uid, expected)
    assert client.outcomes(uid) == [(1, "retried"), (2, "retried"), (3, "dead")]
    assert client.status(uid) == "dead"
    assert client.rows("select id::text, died_at, attempts, reason from orchestrator.dead_letters") == [
        (uid, NOON + timedelta(hours=3), 3, "failure 3")
    ]
    assert client.at(NOON + timedelta(days=1)).claim() == []
    assert client.totals() == {"accepted": 1, "retried": 2, "dead": 1}


def test_a_failure_for_good_spends_no_further_attempts(client: Client) -> None:
    [lease] = claimed(client, max_retries=9)
    assert client.finish(results([lease], "fail", status_code=410, error="gone")) == [
        Finish(lease.event_id, "dead", None, 1)
    ]
    assert client.outcomes(lease.event_id) == [(1, "dead")]
    assert client.column("select reason from orchestrator.dead_letters") == ["gone"]


def test_a_failure_without_words_has_a_reason_all_the_same(client: Client) -> None:
    client.finish(results(claimed(client), "fail"))
    assert client.column("select reason from orchestrator.dead_letters") == ["failed"]


def test_an_event_without_retries_dies_of_its_first_failure(client: Client) -> None:
    leases = claimed(client, max_retries=0)
    assert [answer.result for answer in client.finish(results(leases, "retry"))] == ["dead"]


def test_each_result_of_a_mixed_batch_has_its_own_effect(client: Client) -> None:
    leases = claimed(client, 300)
    kinds = ["delivered", "retry", "fail"] * 100
    answers = client.finish(
        [Result(lease.event_id, 1, kind, error=kind) for lease, kind in zip(leases, kinds, strict=True)]
    )
    expected = {"delivered": "delivered", "retry": "retried", "fail": "dead"}
    for lease, kind in zip(leases, kinds, strict=True):
        assert client.outcomes(lease.event_id) == [(1, expected[kind])]
    assert {answer.event_id: answer.result for answer in answers} == {
        lease.event_id: expected[kind] for lease, kind in zip(leases, kinds, strict=True) if kind != "delivered"
    }
    assert len(answers) == 200
    assert client.totals() == {"accepted": 300, "delivered": 100, "retried": 100, "dead": 100}


# Retry policies

DELAY = "select extract(epoch from orchestrator.retry_delay(%s, %s, make_interval(secs => %s)))::float8"
delays = st.integers(0, 86_400_000_000).map(lambda micros: micros / 1e6)  # an interval has whole microseconds


@pytest.fixture(scope="module")
def policies(databases: Databases) -> Iterator[Client]:
    with databases.migrated() as url, Client(url) as client:
        yield client


@given(
    initial_s=delays,
    multiplier=st.floats(1, 100),
    max_s=st.floats(0.001, 31_000_000),
    jitter=st.integers(0, 1000).map(lambda thousandths: thousandths / 1000),
    attempt=st.integers(1, 32_767),
    retry_after_s=st.none() | st.floats(0, 1e9),
)
@settings(max_examples=150, deadline=None)
def test_a_retry_delay_is_exponential_jittered_capped_and_no_less_than_asked_for(
    policies: Client,
    initial_s: float,
    multiplier: float,
    max_s: float,
    jitter: float,
    attempt: int,
    retry_after_s: float | None,
) -> None:
    policies.rows("delete from orchestrator.retry_policy where name = 'tried'")
    policies.rows(
        """insert into orchestrator.retry_policy (name, initial_delay, multiplier, max_delay, jitter)
        values ('tried', make_interval(secs => %s), %s, make_interval(secs => %s), %s)""",
        initial_s, multiplier, max_s, jitter,
    )  # fmt: skip
    full = min(max_s, initial_s * multiplier ** min(attempt - 1, 100))
    asked = 0.0 if retry_after_s is None else min(retry_after_s, max_s)
    slack = 1e-5 + full * 1e-9
    for _ in range(3):
        delay = policies.value(DELAY, "tried", attempt, retry_after_s)
        assert max(full * (1 - jitter), asked) - slack <= delay <= max(full, asked) + slack


@given(
    schedule=st.lists(delays, min_size=1, max_size=8),
    jitter=st.integers(0, 1000).map(lambda thousandths: thousandths / 1000),
    attempt=st.integers(1, 200),
    retry_after_s=st.none() | st.floats(0, 7200),
)
@settings(max_examples=75, deadline=None)
def test_a_schedule_gives_each_attempt_its_delay_and_repeats_the_last(
    policies: Client, schedule: list[float], jitter: float, attempt: int, retry_after_s: float | None
) -> None:
    policies.rows("delete from orchestrator.retry_policy where name = 'tried'")
    policies.rows(
        """insert into orchestrator.retry_policy (name, jitter, schedule)
        select 'tried', %s, array_agg(make_interval(secs => s) order by n)
        from unnest(%s::float8[]) with ordinality as u (s, n)""",
        jitter, schedule,
    )  # fmt: skip
    full = schedule[min(attempt, len(schedule)) - 1]
    asked = 0.0 if retry_after_s is None else min(retry_after_s, 3600.0)  # the default of max_delay
    delay = policies.value(DELAY, "tried", attempt, retry_after_s)
    assert max(full * (1 - jitter), asked) - 1e-4 <= delay <= max(full, asked) + 1e-4


def test_full_jitter_spreads_delays_over_the_whole_range(policies: Client) -> None:
    drawn = policies.column(
        "select extract(epoch from orchestrator.retry_delay('default', 5))::float8 from generate_series(1, 1000)"
    )
    assert min(drawn) < 1.6 < 14.4 < max(drawn) <= 16
    assert 7 < sum(drawn) / len(drawn) < 9


def test_a_policy_that_is_gone_is_served_as_the_default_one(policies: Client) -> None:
    assert policies.value(DELAY, "gone", 1, None) <= 1
    assert policies.value(DELAY, None, 1, None) <= 1


@pytest.mark.parametrize(
    "values",
    [
        "initial_delay = '-1 s'",
        "initial_delay = 'infinity'",
        "multiplier = 0.5",
        "multiplier = 'NaN'",
        "max_delay = '0 s'",
        "max_delay = 'infinity'",
        "max_delay = '100000 years'",
        "jitter = 1.1",
        "jitter = -0.1",
        "jitter = 'NaN'",
        "schedule = '{}'",
        "schedule = '{1 s,null}'",
        "schedule = '{1 s,-1 s}'",
        "schedule = '{infinity}'",
    ],
)
def test_a_policy_that_finish_events_could_not_compute_is_refused(policies: Client, values: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        policies.connection.execute(f"update orchestrator.retry_policy set {values}")


def test_an_event_is_retried_by_the_policy_that_it_names(client: Client) -> None:
    client.rows("insert into orchestrator.retry_policy (name, jitter, schedule) values ('steps', 0, '{10 s,1 min}')")
    uid = client.schedule(retry_policy="steps")
    [first] = client.finish(results(client.claim(), "retry"))
    assert first.due_at == NOON + seconds(10)
    [second] = client.finish(results(client.at(NOON + seconds(10)).claim(), "retry"))
    assert (second.event_id, second.due_at) == (uid, NOON + seconds(70))


@pytest.mark.parametrize(
    ("retry_after", "delay_s"),
    [
        *[(120.0, 120), (3600.0, 3600), (86_400.0, 3600), (1e300, 3600), (math.inf, 3600), (math.nan, 3600)],
        *[(0.0, 0), (-5.0, 0), (-math.inf, 0), (None, 0)],
    ],
)
def test_a_retry_after_is_heeded_up_to_the_bound(client: Client, retry_after: float | None, delay_s: float) -> None:
    client.rows("update orchestrator.retry_policy set initial_delay = '0 s'")
    [answer] = client.finish(results(claimed(client), "retry", retry_after=retry_after))
    assert (answer.result, answer.due_at) == ("retried", NOON + seconds(delay_s))


def delays_until_dead(client: Client, uid: str, at: datetime) -> list[float]:
    """The seconds from each failure to when the next attempt is due; every attempt fails at once."""
    delays: list[float] = []
    while True:
        [lease] = client.at(at).claim()
        [finish] = client.finish(results([lease], "retry"))
        assert finish.event_id == uid
        if finish.due_at is None:
            return delays
        delays.append((finish.due_at - at).total_seconds())
        at = finish.due_at


def test_after_a_redrive_the_backoff_begins_again_and_attempt_numbers_go_on(client: Client) -> None:
    client.rows(
        """insert into orchestrator.retry_policy (name, initial_delay, multiplier, max_delay, jitter)
        values ('doubling', '1 s', 2, '1 hour', 0)"""
    )
    uid = client.schedule(retry_policy="doubling", max_retries=3)
    assert delays_until_dead(client, uid, NOON) == [1, 2, 4]
    at = NOON + seconds(600)
    assert client.at(at).value("select result from orchestrator.redrive_event(%s)", uid) == "redriven"
    assert delays_until_dead(client, uid, at) == [1, 2, 4]
    attempts = [attempt for attempt, result in client.outcomes(uid) if result != "redriven"]
    assert attempts == list(range(1, 9))


def test_leases_that_were_handed_back_do_not_lengthen_the_backoff(client: Client) -> None:
    client.rows(
        "insert into orchestrator.retry_policy (name, jitter, schedule) values ('steps', 0, '{1 s,5 s,1 hour}')"
    )
    uid = client.schedule(retry_policy="steps", max_retries=2)
    for _ in range(7):
        client.release(client.claim())
    assert delays_until_dead(client, uid, NOON) == [1, 5]


def test_a_remark_about_the_answer_to_a_delivered_attempt_is_kept(client: Client) -> None:
    ids = client.schedule_many(3)
    leases = client.claim()
    odd = [*results(leases[:1], "delivered", status_code=204, error="HTTP 204 No Content; odd"), *results(leases[1:])]
    assert client.finish(odd) == []
    assert [client.status(uid) for uid in ids] == ["delivered"] * 3
    shown = {uid: client.get(uid)["outcomes"][0] for uid in ids}
    assert shown.pop(leases[0].event_id)["error"] == "HTTP 204 No Content; odd"
    assert {outcome["error"] for outcome in shown.values()} == {None}
    assert client.totals() == {"accepted": 3, "delivered": 3}
    assert client.finish(odd) == []  # repeated, as after a lost reply


def test_without_any_policy_a_failed_event_is_still_retried(client: Client) -> None:
    client.rows("delete from orchestrator.retry_policy")
    [answer] = client.finish(results(claimed(client), "retry"))
    assert (answer.result, answer.due_at) == ("retried", NOON + seconds(60))


# Which results count


@pytest.mark.parametrize("kind", ["delivered", "retry", "fail"])
def test_a_lease_that_passed_to_another_worker_cannot_be_finished(client: Client, kind: str) -> None:
    old = claimed(client)
    new = client.at(NOON + seconds(60)).claim(worker=2)
    before = client.get(old[0].event_id)
    assert client.finish(results(old, kind), worker=1) == [Finish(old[0].event_id, "stale", None, 1)]
    assert client.get(old[0].event_id) == before
    assert client.finish(results(new), worker=2) == []
    assert client.outcomes(old[0].event_id) == [(2, "delivered")]


def test_a_lease_that_ran_out_can_be_finished_while_nobody_else_has_taken_it(client: Client) -> None:
    leases = claimed(client)
    assert client.at(NOON + seconds(3600)).finish(results(leases)) == []
    assert client.status(leases[0].event_id) == "delivered"


@pytest.mark.parametrize("kind", ["delivered", "retry", "fail"])
def test_a_result_for_an_event_that_lost_all_its_leases_is_stale(client: Client, kind: str) -> None:
    leases = claimed(client, max_retries=0)
    for minute in range(1, 7):
        leases = client.at(NOON + seconds(60 * minute)).claim() or leases
    assert [answer.result for answer in client.finish(results(leases, kind))] == ["stale"]
    assert client.outcomes(leases[0].event_id) == [(6, "dead")]


@pytest.mark.parametrize("attempt", [0, 2, -1, 32_768, 2**31 - 1, None])
def test_only_the_attempt_of_the_lease_counts(client: Client, attempt: int | None) -> None:
    [lease] = claimed(client)
    for kind in ("delivered", "retry", "fail"):
        [answer] = client.finish([lease_result := Result(lease.event_id, attempt, kind)])  # type: ignore[arg-type]
        assert (answer.result, lease_result.event_id) == ("stale", lease.event_id)
    assert client.status(lease.event_id) == "in_flight"


@pytest.mark.parametrize("kind", ["delivered", "retry", "fail"])
def test_an_event_that_nobody_holds_cannot_be_finished(client: Client, kind: str) -> None:
    uid = client.schedule()
    assert client.finish([Result(uid, 0, kind)]) == [Finish(uid, "stale", None, 0)]
    lease = client.claim()
    client.release(lease)
    assert client.finish(results(lease, kind)) == [Finish(uid, "stale", None, 1)]
    assert client.status(uid) == "scheduled"
    assert client.outcomes(uid) == []


@pytest.mark.parametrize("kind", ["delivered", "retry", "fail"])
def test_repeating_a_finish_whose_reply_was_lost_changes_nothing_and_is_not_stale(client: Client, kind: str) -> None:
    leases = claimed(client, 3)
    worker = client.value("select orchestrator.register_worker('w')")
    client.finish(results(leases, kind), worker=worker)
    before = [client.get(lease.event_id) for lease in leases]
    totals = client.totals()
    assert client.at(NOON + seconds(0.5)).finish(results(leases, kind), worker=worker) == []
    assert [client.get(lease.event_id) for lease in leases] == before
    assert client.totals() == totals


def test_a_finish_repeated_after_the_retry_was_claimed_does_not_touch_the_new_lease(client: Client) -> None:
    [lease] = claimed(client)
    client.finish(results([lease], "retry"), worker=1)
    [again] = client.at(NOON + seconds(1)).claim(worker=2)
    assert client.finish(results([lease], "retry"), worker=1) == []
    assert client.finish(results([again]), worker=2) == []
    assert client.outcomes(lease.event_id) == [(1, "retried"), (2, "delivered")]


def test_the_same_finish_by_another_worker_is_stale(client: Client) -> None:
    leases = claimed(client)
    client.finish(results(leases), worker=1)
    assert [answer.result for answer in client.finish(results(leases), worker=2)] == ["stale"]


@pytest.mark.parametrize("kinds", [["delivered"] * 3, ["retry"] * 3, ["fail", "delivered", "retry"]])
def test_an_attempt_given_several_times_in_one_call_is_recorded_once(client: Client, kinds: list[str]) -> None:
    [lease, other] = claimed(client, 2)
    answers = client.finish([Result(lease.event_id, 1, kind) for kind in kinds] + results([other], kinds[0]))
    assert len(client.outcomes(lease.event_id)) == 1
    assert len(client.outcomes(other.event_id)) == 1
    assert "stale" not in {answer.result for answer in answers}
    assert sum(answer.event_id == lease.event_id for answer in answers) <= 1


def test_two_attempts_of_one_event_in_one_call_count_by_the_lease(client: Client) -> None:
    [first] = claimed(client)
    [second] = client.at(NOON + seconds(60)).claim()
    answers = client.finish([*results([first], "fail"), *results([second], "retry")])
    assert sorted(answer.result for answer in answers) == ["retried", "stale"]
    assert client.outcomes(first.event_id) == [(2, "retried")]


def test_unknown_ids_are_stale_and_the_other_results_are_recorded(client: Client) -> None:
    [lease] = claimed(client)
    unknown = [str(uuid.uuid4()), client.schedule(scheduled_at=NOON + seconds(99))]
    for kind in ("delivered", "fail"):
        answers = client.finish(
            [Result(uid, 1, kind) for uid in unknown] + (results([lease]) if kind == "delivered" else [])
        )
        assert sorted(answers) == sorted(Finish(uid, "stale", None, 1) for uid in unknown)
    assert client.status(lease.event_id) == "delivered"


def test_a_cancelled_event_cannot_be_finished(client: Client) -> None:
    leases = claimed(client)
    client.at(NOON + seconds(60))
    assert [answer.result for answer in client.cancel(leases[0].event_id)] == ["cancelled"]
    assert [answer.result for answer in client.finish(results(leases))] == ["stale"]
    assert client.outcomes(leases[0].event_id) == [(1, "cancelled")]


# Nonsense


def test_empty_arrays_are_no_work(client: Client) -> None:
    assert client.finish([]) == []
    assert client.release([]) == 0
    assert client.rows("select * from orchestrator.finish_events(null, null, null)") == []
    assert client.totals() == {}


@pytest.mark.parametrize("kind", ["", "DELIVERED", "dead", "cancelled", None])
def test_an_unknown_result_is_an_error_and_nothing_is_recorded(client: Client, kind: str | None) -> None:
    leases = claimed(client, 2)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_results: expected delivered, retry or fail"):
        client.finish([*results(leases[:1]), Result(leases[1].event_id, 1, kind)])  # type: ignore[arg-type]
    assert {client.status(lease.event_id) for lease in leases} == {"in_flight"}


@pytest.mark.parametrize(
    ("ids", "attempts", "kinds"),
    [(2, 1, 2), (2, 2, 1), (1, 2, 2), (0, 1, 1), (2, 2, 0), (2, None, 2), (2, 2, None), (None, 1, 1)],
)
def test_arrays_of_different_lengths_are_an_error_that_says_so(
    client: Client, ids: int | None, attempts: int | None, kinds: int | None
) -> None:
    leases = claimed(client, 2)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="arrays of one length"):
        client.rows(
            "select * from orchestrator.finish_events(%s::uuid[], %s::integer[], %s::text[])",
            ids if ids is None else [lease.event_id for lease in leases][:ids],
            attempts if attempts is None else [1] * attempts,
            kinds if kinds is None else ["delivered"] * kinds,
        )
    assert client.value("select count(*) from orchestrator.outcome") == 0


def test_null_among_the_ids_does_not_hinder_the_other_results(client: Client) -> None:
    [lease] = claimed(client)
    client.rows(
        "select * from orchestrator.finish_events(%s::uuid[], '{1,1}', '{delivered,delivered}')", [None, lease.event_id]
    )
    assert client.status(lease.event_id) == "delivered"


def test_optional_arrays_may_be_short_or_absent(client: Client) -> None:
    leases = claimed(client, 2)
    client.rows(
        "select * from orchestrator.finish_events(%s::uuid[], '{1,1}', '{delivered,fail}', '{200}', p_errors => '{}')",
        [lease.event_id for lease in leases],
    )
    assert client.column("select status_code from orchestrator.outcome order by result") == [None, 200]


def test_the_largest_error_texts_are_kept(client: Client) -> None:
    [lease] = claimed(client)
    error, response = "ü\U0001f600'\\\n{}," * 20, "\x01\t\U0010fffd" * 300
    client.finish(results([lease], "fail", error=error, response=response))
    [outcome] = client.get(lease.event_id)["outcomes"]
    assert (outcome["error"], outcome["response"]) == (error, response)


# Release


def test_a_released_event_is_due_again_and_no_attempt_is_spent(client: Client) -> None:
    [lease] = claimed(client, max_retries=0)
    for attempt in range(2, 7):
        assert client.release([lease]) == 1
        [lease] = client.claim()
        assert (lease.attempt, lease.due_at) == (attempt, NOON)
    assert client.finish(results([lease])) == []
    assert client.outcomes(lease.event_id) == [(6, "delivered")]


def test_releasing_never_makes_an_event_due_early(client: Client) -> None:
    uid = client.schedule(scheduled_at=NOON + seconds(5))
    leases = client.claim(lookahead_s=10)
    assert client.release(leases) == 1
    assert due_at(client, uid) == NOON + seconds(5)
    assert client.claim() == []
    assert client.at(NOON + seconds(5)).claim()[0].event_id == uid


def test_releasing_leaves_the_retries_that_are_left(client: Client) -> None:
    [lease] = claimed(client, max_retries=1)
    client.release([lease])
    answers = []
    for hour in (1, 2):
        leases = client.at(NOON + timedelta(hours=hour)).claim()
        answers += [answer.result for answer in client.finish(results(leases, "retry"))]
    assert answers == ["retried", "dead"]


def test_only_the_holder_of_a_lease_can_release_it(client: Client) -> None:
    old = claimed(client)
    new = client.at(NOON + seconds(60)).claim()
    assert client.release(old) == 0
    assert client.status(old[0].event_id) == "in_flight"
    assert client.release(new) == 1
    assert client.release(new) == 0
    assert client.release([new[0]._replace(event_id=str(uuid.uuid4()))]) == 0


def test_a_lease_released_twice_in_one_call_is_released_once(client: Client) -> None:
    [lease] = claimed(client, max_retries=0)
    assert client.release([lease, lease]) == 1
    assert client.value("select max_attempts from orchestrator.timer") == 2


# Several at once


def test_finishes_and_cancels_that_overlap_do_not_deadlock(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor
) -> None:
    """The first of two events is retried and the second delivered, while a cancel goes through both."""
    blocker, finisher, canceller = connect(), connect(), connect()
    finisher.submit(
        event(external_job_id="both"),
        event(external_job_id="both", source="other"),
        event(external_job_id="both", source="x"),
    )
    first, second, third = sorted(finisher.claim())
    blocker.rows("begin")
    blocker.rows("select from orchestrator.timer where event_id = %s for update", first.event_id)
    cancelling = threads.submit(canceller.cancel_external, "both")
    observer.wait_until_blocked(canceller)
    finishing = threads.submit(
        finisher.finish, [*results([first], "retry"), *results([second]), *results([third], "retry")]
    )
    observer.wait_until_blocked(finisher)
    blocker.rows("rollback")
    assert {answer.result for answer in cancelling.result(10)} == {"in_flight"}
    assert [answer.result for answer in finishing.result(10)] == ["retried", "retried"]


@pytest.mark.parametrize("kind", ["delivered", "retry"])
def test_two_finishes_of_the_same_leases_record_each_once(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor, kind: str
) -> None:
    first, second = connect(), connect()
    leases = claimed(first, 20)
    first.rows("begin")
    first.finish(results(leases[10:], kind), worker=1)
    later = threads.submit(second.finish, results(leases, kind), worker=2)
    observer.wait_until_blocked(second)
    first.rows("commit")
    answered = later.result(10)
    assert {answer.event_id for answer in answered if answer.result == "stale"} == {x.event_id for x in leases[10:]}
    assert observer.value("select count(*) from orchestrator.outcome") == 20


def test_a_finish_that_waited_for_a_rolled_back_one_is_recorded(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor
) -> None:
    first, second = connect(), connect()
    leases = claimed(first)
    first.rows("begin")
    first.finish(results(leases, "fail"))
    later = threads.submit(second.finish, results(leases))
    observer.wait_until_blocked(second)
    first.rows("rollback")
    assert later.result(10) == []
    assert observer.status(leases[0].event_id) == "delivered"


def test_finishes_of_shuffled_overlapping_batches_do_not_deadlock(
    connect: Connect, threads: ThreadPoolExecutor
) -> None:
    """Of mixed results: the arrays may have any order, as they do when somebody calls it by hand."""
    clients = [connect() for _ in range(4)]
    leases = claimed(clients[0], 200)
    kinds = ["retry", "delivered", "fail"]

    def finish(number: int) -> None:
        order = leases[number * 50 :] + leases[: number * 50]
        order = order if number % 2 else order[::-1]
        for start in range(0, 200, 25):
            clients[number].finish(
                [Result(lease.event_id, 1, kinds[n % 3]) for n, lease in enumerate(order[start : start + 50])],
                worker=number,
            )

    list(threads.map(finish, range(4)))
    counted = clients[0].rows("select event_id, attempt from orchestrator.outcome")
    assert len(counted) == len(set(counted)) == 200
