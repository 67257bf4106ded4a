"""Commands from Kafka, and the redrive of a dead event."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from psycopg.types.json import Jsonb

from tests.support.sql_client import HOST, NOON, Client, results

TOPIC = "tests.commands"


def execute(client: Client, *commands: dict[str, Any]) -> list[Any]:
    """Carries the commands out; the answers to them, in order."""
    placed = [{"partition": 0, "offset": n, **command} for n, command in enumerate(commands)]
    assert client.value("select orchestrator.execute_commands(%s, %s)", TOPIC, Jsonb(placed)) == len(commands)
    answers = [json.loads(value) for value in client.column("select value from orchestrator.outbox order by message")]
    client.rows("delete from orchestrator.outbox")
    return answers


def bury(client: Client, **changes: Any) -> str:
    event_id = client.schedule(**changes)
    client.finish(results([lease for lease in client.claim() if lease.event_id == event_id], "fail", error="HTTP 410"))
    assert client.status(event_id) == "dead"
    return event_id


def test_a_cancel_by_id_is_carried_out_and_answered(client: Client) -> None:
    event_id = client.schedule(scheduled_at=NOON + timedelta(hours=1))
    [answer] = execute(client, {"id": "c-1", "command": "cancel", "event_id": event_id})
    assert client.status(event_id) == "cancelled"
    assert answer == {
        "id": "c-1",
        "command": "cancel",
        "event_id": event_id,
        "external_job_id": None,
        "problem": None,
        "results": [{"event_id": event_id, "result": "cancelled", "status": "cancelled"}],
        "answered_at": NOON.isoformat(),
        "topic": TOPIC,
        "partition": 0,
        "offset": 0,
    }


def test_a_cancel_by_external_id_answers_for_each_event(client: Client) -> None:
    ids = {client.schedule(external_job_id="job", scheduled_at=NOON + timedelta(hours=hours)) for hours in (1, 2, 3)}
    [answer] = execute(client, {"command": "cancel", "external_job_id": "job"})
    assert {result["event_id"] for result in answer["results"]} == ids
    assert {result["result"] for result in answer["results"]} == {"cancelled"}


def test_commands_are_carried_out_and_answered_in_order(client: Client) -> None:
    event_id = client.schedule(scheduled_at=NOON + timedelta(hours=1))
    cancel = {"command": "cancel", "event_id": event_id}
    answers = execute(client, cancel, {"command": "redrive", "event_id": event_id}, cancel)
    assert [answer["results"][0]["result"] for answer in answers] == ["cancelled", "not_dead", "already_cancelled"]
    assert [answer["offset"] for answer in answers] == [0, 1, 2]


def test_a_command_for_an_event_that_does_not_exist_says_so(client: Client) -> None:
    nobody = "01a1fdfa-4600-748c-94b7-eb449d22c4d5"
    answers = execute(
        client,
        {"command": "cancel", "event_id": nobody},
        {"command": "redrive", "event_id": nobody},
        {"command": "cancel", "external_job_id": "nobody"},
        {"command": "redrive", "external_job_id": "nobody"},
    )
    assert [answer["results"] for answer in answers] == [[], [], [], []]
    assert [answer["problem"] for answer in answers] == [
        {"field": field, "reason": "there is no such event"}
        for field in ("event_id", "event_id", "external_job_id", "external_job_id")
    ]


def test_a_command_with_a_problem_is_answered_with_it_and_changes_nothing(client: Client) -> None:
    event_id = client.schedule(scheduled_at=NOON + timedelta(hours=1))
    problem = {"field": "command", "reason": "expected cancel or redrive"}
    [answer] = execute(client, {"id": "c", "command": "cancel", "event_id": event_id, "problem": problem})
    assert (answer["id"], answer["problem"], answer["results"]) == ("c", problem, [])
    assert client.status(event_id) == "scheduled"


def test_a_dead_event_is_redriven_with_as_many_attempts_as_at_first(client: Client) -> None:
    event_id = bury(client, max_retries=1)
    [answer] = execute(client, {"command": "redrive", "event_id": event_id})
    assert answer["results"] == [{"event_id": event_id, "result": "redriven", "status": "retrying"}]
    assert client.status(event_id) == "retrying"
    assert client.statistics()["dead_letters"] == 0
    for result in ("retried", "dead"):
        [lease] = client.claim()
        client.finish(results([lease], "retry", error="HTTP 500"))
        assert client.outcomes(event_id)[-1] == (lease.attempt, result)
        client.at(NOON + timedelta(hours=2))
    assert client.outcomes(event_id) == [(1, "dead"), (1, "redriven"), (2, "retried"), (3, "dead")]
    assert client.status(event_id) == "dead"


def test_a_redriven_event_can_be_delivered_or_cancelled(client: Client) -> None:
    one, other = bury(client, external_job_id="one"), bury(client, external_job_id="other")
    execute(client, {"command": "redrive", "external_job_id": "one"}, {"command": "redrive", "event_id": other})
    client.cancel(other)
    client.finish(results(client.claim()))
    assert (client.status(one), client.status(other)) == ("delivered", "cancelled")
    assert [outcome["result"] for outcome in client.get(one)["outcomes"]] == ["dead", "redriven", "delivered"]
    assert client.totals()["redriven"] == 2


def test_a_redriven_event_wakes_the_dispatchers(client: Client) -> None:
    event_id = bury(client)
    client.rows("listen orchestrator_due")
    client.rows("select * from orchestrator.redrive_event(%s::uuid)", event_id)
    assert len(list(client.connection.notifies(timeout=5, stop_after=1))) == 1


def test_kafka_events_fall_into_the_lane_of_their_topic(client: Client) -> None:
    for n in range(20):
        client.schedule(external_job_id=f"{n}", delivery_type="KAFKA", destination=f"topic-{n}")
    client.schedule(delivery_type="KAFKA", destination=None)
    client.schedule(destination=f"{HOST}/hook")
    lanes = client.column("select distinct lane from orchestrator.timer")
    assert len(lanes) > 10
