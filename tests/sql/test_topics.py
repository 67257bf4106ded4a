"""Submissions, reschedules and redrives in SQL keep to the topics that events may be delivered to."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.events.topics import TopicRules, topic_rules
from orchestrator.settings import Settings
from tests.support.sql_client import NOON, Client, event, results, seconds

NAMES = [
    *("orders", "Orders", "__consumer_offsets", "_schemas", "_.x", ".hidden", "a_b", "a.b", "axb"),
    *("ocean.event.submissions", "ocean_event_submissions", "ocean.event.dlq", "ocean.event.ready", "ocean.event.dlq2"),
    *("air.process-kafka-message", "air.event.submissions", "air.event.dlq"),
]


def rules_of(**environ: str) -> TopicRules:
    return topic_rules(Settings.from_env({"CUSTOMER_NAME": "ocean", **environ}))


def configure(client: Client, **environ: str) -> TopicRules:
    rules = rules_of(**environ)
    client.rows("select orchestrator.configure_topics(%s, %s, %s)", rules.ready, list(rules.own), list(rules.allowed))
    return rules


def to_topic(topic: str | None, **changes: Any) -> dict[str, Any]:
    return event(delivery_type="KAFKA", destination=topic, **changes)


@pytest.mark.parametrize("allowed", ["", "*", "orders,a*", "_*,.hidden", "air.*", "ORDERS", "a.b"])
def test_sql_and_python_allow_the_same_topics(client: Client, allowed: str) -> None:
    rules = configure(client, KAFKA_ALLOW_TOPICS=allowed)
    faults = client.column("select orchestrator.topic_fault('KAFKA', n) from unnest(%s::text[]) n", NAMES)
    assert [fault is None for fault in faults] == [rules.fault("KAFKA", name) is None for name in NAMES]


def test_an_internal_topic_of_kafka_is_refused_before_any_topics_are_configured(client: Client) -> None:
    (answer,) = client.submit(to_topic("__consumer_offsets"))
    assert (answer.result, answer.field) == ("refused", "destination")
    assert client.submit(to_topic("ocean.event.dlq"))[0].result == "accepted"


def test_a_topic_of_the_deployment_itself_is_refused_without_failing_other_events(client: Client) -> None:
    rules = configure(client)
    answers = client.submit(*map(to_topic, rules.own), to_topic("orders"), to_topic(None), event())
    assert [answer.result for answer in answers] == ["refused"] * len(rules.own) + ["accepted"] * 3
    assert {answer.field for answer in answers} == {"destination", None}
    with pytest.raises(Exception, match="destination: expected no topic that this product reads or writes itself"):
        client.rows("select orchestrator.schedule_event('ocean.event.dlq', '1', p_delivery_type => 'KAFKA')")


def test_an_earlier_event_is_not_rescheduled_to_a_topic_that_is_not_allowed(client: Client) -> None:
    (kept,) = client.submit(to_topic("ocean.event.dlq"))
    configure(client)
    (row,) = client.rows(
        "select result, field, reason, status from orchestrator.reschedule_event(%s, %s)", kept.id, NOON + seconds(60)
    )
    assert row[:2] == ("refused", "destination")
    assert "reads or writes itself" in row[2]
    assert row[3] == "scheduled"


def test_an_earlier_dead_event_is_not_redriven_to_a_topic_that_is_not_allowed(client: Client) -> None:
    (bad, good) = client.submit(to_topic("ocean.event.dlq"), to_topic("orders"))
    client.finish(results(client.claim(), "fail"))
    configure(client)
    assert client.rows("select result, status from orchestrator.redrive_event(%s)", bad.id) == [("refused", "dead")]
    (row,) = client.rows("select matched, redriven from orchestrator.redrive_dead_letters()")
    assert row == (2, 1)
    assert client.value("select event_id::text from orchestrator.timer") == good.id
