"""The outbox: what is written to it, in which order it is drained, and by whom."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import psycopg
import pytest

from tests.sql.conftest import Connect
from tests.support.sql_client import NOON, Client, Lease, event, results


class Message(NamedTuple):
    at: str
    floor: int
    message: int
    kind: str
    headers: Any
    key: bytes | None
    value: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.value)


def switch_on(client: Client, *kinds: str) -> None:
    client.rows("select orchestrator.set_outbox(%s::text[])", list(kinds))


def batch(client: Client, limit: int = 1000, floor: int = 0) -> list[Message]:
    rows = client.rows(
        "select at::text, floor, message, kind, headers, key, value from orchestrator.outbox_batch(%s, %s)",
        limit,
        floor,
    )
    return [Message(*row) for row in rows]


def published(client: Client, messages: list[Message]) -> int:
    count: int = client.value("select orchestrator.outbox_published(%s::tid[])", [message.at for message in messages])
    return count


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def test_no_message_is_written_until_the_outbox_is_switched_on(client: Client) -> None:
    client.submit(event(), event(max_retries=0))
    client.finish(results(client.claim(1)))
    client.finish(results(client.claim(1), "fail"))
    assert batch(client) == []


def test_setting_the_outbox_replaces_the_kinds_that_were_on(client: Client) -> None:
    switch_on(client, "scheduled", "dlq")
    switch_on(client, "timestamp")
    client.schedule()
    client.finish(results(client.claim(), "fail", error="gone"))
    assert [message.kind for message in batch(client)] == ["timestamp"]


def test_an_unknown_kind_is_refused(client: Client) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        switch_on(client, "everything")


def test_an_accepted_event_writes_one_message_and_a_duplicate_none(client: Client) -> None:
    switch_on(client, "scheduled")
    kept = event(external_job_id="job", ordering_key="client-7")
    client.submit(kept)
    client.submit(kept, event(external_job_id="other"), event(source=""))
    first, second = batch(client)
    assert (first.kind, first.key, second.key) == ("scheduled", b"client-7", b"other")
    assert first.body["external_job_id"] == "job"
    assert {"id", "source", "scheduled_at", "delivery_type", "destination", "created_at"} < first.body.keys()


@pytest.mark.parametrize("result", ["delivered", "fail"])
@pytest.mark.parametrize("company", [False, True])
def test_the_message_of_a_finished_event_has_its_times(client: Client, result: str, company: bool) -> None:
    """In a batch that is delivered throughout, and in a mixed one."""
    switch_on(client, "timestamp")
    event_id = client.schedule(scheduled_at=NOON)
    [lease] = client.claim()
    given = results([lease], result, started_at=NOON.timestamp() + 0.5, finished_at=NOON.timestamp() + 0.75)
    if company:
        client.schedule(external_job_id="company")
        given += results(client.claim(), "retry", error="HTTP 500")
    finish(client, given, claimed_at=NOON.timestamp() - 1)
    [message] = batch(client)
    body = message.body
    assert (body["id"], body["result"], body["attempt"]) == (event_id, "dead" if result == "fail" else result, 1)
    assert [
        moment(body[name]) - NOON for name in ("scheduled_at", "due_at", "claimed_at", "started_at", "finished_at")
    ] == [timedelta(seconds=seconds) for seconds in (0, 0, -1, 0.5, 0.75)]
    assert body["lateness_ms"] == 500


def finish(client: Client, given: list[Any], claimed_at: float) -> None:
    columns = [list(column) for column in zip(*given, strict=True)]
    client.rows(
        """select * from orchestrator.finish_events(%s::uuid[], %s::integer[], %s::text[], %s::integer[], %s::float8[],
          %s::float8[], %s::text[], %s::text[], %s::float8[], 0, %s::float8[])""",
        *columns,
        [claimed_at] * len(given),
    )


def test_a_retry_and_a_lost_lease_write_no_message(client: Client) -> None:
    switch_on(client, "timestamp", "dlq")
    client.schedule()
    [lease] = client.claim()
    client.finish(results([lease], "retry", error="HTTP 500"))
    client.finish(results([lease]))
    assert batch(client) == []


def test_a_result_that_is_sent_twice_writes_one_message(client: Client) -> None:
    switch_on(client, "timestamp", "dlq")
    client.schedule(external_job_id="one")
    client.schedule(external_job_id="two")
    leases = client.claim()
    mixed = results(leases[:1]) + results(leases[1:], "fail", error="gone")
    client.finish(mixed)
    client.finish(mixed)
    client.finish(mixed[:1])
    assert sorted(message.kind for message in batch(client)) == ["dlq", "timestamp", "timestamp"]


@pytest.mark.parametrize("days", [0, 60], ids=["in event", "in the horizon"])
def test_the_message_of_a_cancel_has_its_time(client: Client, days: int) -> None:
    switch_on(client, "timestamp")
    event_id = client.schedule(scheduled_at=NOON + timedelta(days=days, hours=1))
    client.cancel(event_id)
    client.cancel(event_id)
    [message] = batch(client)
    assert (message.body["id"], message.body["result"], message.body["started_at"]) == (event_id, "cancelled", None)
    assert moment(message.body["finished_at"]) == NOON


def test_a_dead_event_goes_to_the_dlq_whole_and_with_its_reason(client: Client) -> None:
    switch_on(client, "dlq")
    event_id = client.schedule(external_job_id="job", payload={"n": [1, "ü"]}, headers={"x-a": "b"})
    client.finish(results(client.claim(), "fail", error="HTTP 410 Gone"))
    [message] = batch(client)
    assert message.headers == {"orchestrator-kind": "dead", "orchestrator-reason": "HTTP 410 Gone"}
    assert message.key == b"job"
    body = message.body
    assert (body["id"], body["payload"], body["headers"], body["attempts"]) == (
        event_id,
        {"n": [1, "ü"]},
        {"x-a": "b"},
        1,
    )
    assert body["reason"] == "HTTP 410 Gone"


def test_an_event_ended_by_lost_leases_goes_to_the_dlq(client: Client) -> None:
    switch_on(client, "dlq", "timestamp")
    event_id = client.schedule(max_retries=0)
    at = NOON
    for _ in range(6):
        assert [lease.event_id for lease in client.claim()] == [event_id]
        client.at(at := at + timedelta(minutes=5))
    assert client.claim() == []
    assert sorted(message.kind for message in batch(client)) == ["dlq", "timestamp"]


def test_a_rolled_back_event_leaves_no_message(client: Client) -> None:
    switch_on(client, "scheduled")
    client.rows("begin")
    client.schedule()
    client.rows("rollback")
    assert batch(client) == []


def test_messages_come_in_the_order_of_what_happened_and_go_when_published(client: Client) -> None:
    switch_on(client, "scheduled", "timestamp")
    ids = client.schedule_many(5)
    leases: list[Lease] = client.claim()
    client.finish(results(leases))
    seen: list[Message] = []
    floor = 0
    while some := batch(client, 3, floor):
        assert published(client, some) == len(some)
        floor = some[-1].floor
        seen += some
    for event_id in ids:
        assert [message.kind for message in seen if message.body["id"] == event_id] == ["scheduled", "timestamp"]
    assert client.value("select orchestrator.outbox_pending()") == 0


def test_a_message_of_a_transaction_that_commits_late_is_never_passed_over(connect: Connect) -> None:
    slow, quick, publisher = connect(), connect(), connect()
    switch_on(slow, "scheduled")
    with slow.transaction():
        first = slow.schedule(external_job_id="slow")
        second = quick.schedule(external_job_id="quick")
        some = batch(publisher)
        assert [message.body["id"] for message in some] == [second]
        published(publisher, some)
    assert [message.body["id"] for message in batch(publisher, floor=some[-1].floor)] == [first]


def test_one_publisher_at_a_time_gets_messages(connect: Connect) -> None:
    one, other = connect(), connect()
    switch_on(one, "scheduled")
    one.schedule()
    with one.transaction():
        assert len(batch(one)) == 1
        assert batch(other) == []
    assert len(batch(other)) == 1


def test_messages_not_committed_as_published_come_again(client: Client) -> None:
    switch_on(client, "scheduled")
    client.schedule()
    client.rows("begin")
    published(client, batch(client))
    client.rows("rollback")
    assert len(batch(client)) == 1


def test_a_message_that_no_broker_takes_is_set_aside_and_can_be_tried_again(client: Client) -> None:
    switch_on(client, "scheduled")
    client.schedule(external_job_id="a")
    client.schedule(external_job_id="b")
    first, second = batch(client)
    failed = client.value(
        "select orchestrator.outbox_failed(%s::tid[], %s::text[])", [first.at], ["the record is too large"]
    )
    assert failed == 1
    assert [message.key for message in batch(client)] == [second.key]
    assert client.rows("select message, reason, key from orchestrator.outbox_failure") == [
        (first.message, "the record is too large", b"a")
    ]
    assert client.value("select orchestrator.retry_outbox_failures()") == 1
    assert sorted(message.key or b"" for message in batch(client)) == [b"a", b"b"]
    assert client.value("select orchestrator.retry_outbox_failures()") == 0


def test_the_publisher_is_woken_once_a_transaction(connect: Connect) -> None:
    client, listener = connect(), connect()
    switch_on(client, "scheduled")
    listener.rows("listen orchestrator_outbox")
    with client.transaction():
        client.schedule(external_job_id="a")
        client.schedule(external_job_id="b")
    assert len(list(listener.connection.notifies(timeout=5, stop_after=1))) == 1
    assert list(listener.connection.notifies(timeout=0)) == []
