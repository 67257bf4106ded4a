"""Which topics events may be delivered to."""

from __future__ import annotations

import pytest

from orchestrator.errors import SettingsError
from orchestrator.events.parsing import submission_row
from orchestrator.events.submission import SubmissionError
from orchestrator.events.topics import topic_rules
from orchestrator.settings import Settings
from tests.support.copying import fields_of

OWN = [
    "ocean.event.submissions",
    "ocean.process-kafka-message",
    "ocean.command.answers",
    "ocean.event.scheduled",
    "ocean.timestamp.processing",
    "ocean.event.dlq",
]


def allows(topic: str | None, delivery_type: str = "KAFKA", **environ: str) -> bool:
    rules = topic_rules(Settings.from_env({"CUSTOMER_NAME": "ocean", **environ}))
    return rules.fault(delivery_type, topic) is None


@pytest.mark.parametrize("topic", [*OWN, "ocean_event_dlq", "ocean.process_kafka-message".replace("_", "-")])
def test_a_topic_of_the_deployment_itself_is_never_a_destination(topic: str) -> None:
    for allowed in ("", "*", topic, "ocean.*"):
        assert not allows(topic, KAFKA_ALLOW_TOPICS=allowed)


@pytest.mark.parametrize("topic", ["__consumer_offsets", "__transaction_state", "__x", "_.x", "..x", "__"])
def test_an_internal_topic_of_kafka_is_never_a_destination(topic: str) -> None:
    for allowed in ("", "*", "__*", topic):
        assert not allows(topic, KAFKA_ALLOW_TOPICS=allowed)


def test_a_renamed_topic_of_the_deployment_is_refused_by_its_new_name() -> None:
    assert not allows("cmds", KAFKA_TOPIC_PROCESSING="cmds")
    assert allows("ocean.event.dlq", KAFKA_TOPIC_DLQ="letters")


def test_every_other_topic_is_a_destination_unless_the_setting_names_them() -> None:
    assert all(map(allows, ["orders", "Ocean.Event.Dlq", "ocean.event.dlq2", "a_b", "x.event.dlq", None]))
    assert allows("orders", KAFKA_ALLOW_TOPICS="reminders, ord*")
    assert not allows("orders", KAFKA_ALLOW_TOPICS="reminders,order,Orders,*x")
    assert allows("orders.eu", KAFKA_ALLOW_TOPICS="orders.*")
    assert not allows("orders_eu", KAFKA_ALLOW_TOPICS="orders.*")


def test_a_submission_topic_of_another_deployment_is_a_destination_only_when_allowed() -> None:
    for topic in ("air.process-kafka-message", "rail.event.submissions"):
        assert not allows(topic)
        assert allows(topic, KAFKA_ALLOW_TOPICS="air.*,rail.event.submissions")


def test_a_topic_that_begins_with_an_underscore_needs_a_pattern_that_begins_so() -> None:
    for topic in ("_schemas", ".hidden"):
        assert not allows(topic)
        assert not allows(topic, KAFKA_ALLOW_TOPICS="*")
        assert allows(topic, KAFKA_ALLOW_TOPICS=f"{topic[0]}*")


def test_the_ready_topic_is_always_a_destination() -> None:
    assert allows(None, KAFKA_ALLOW_TOPICS="orders")
    assert allows("ocean.event.ready", KAFKA_ALLOW_TOPICS="orders")


def test_a_url_is_no_topic() -> None:
    assert allows("https://example.com/__consumer_offsets", delivery_type="HTTP")


def test_a_refused_topic_is_named_with_the_remedy() -> None:
    rules = topic_rules(Settings.from_env({"KAFKA_ALLOW_TOPICS": "a,b*"}))
    assert rules.fault("KAFKA", "orders") == (
        "expected a topic that KAFKA_ALLOW_TOPICS (a,b*) allows, got 'orders'; add it there"
    )


def test_the_setting_of_destination_topics_takes_only_names_and_stars() -> None:
    with pytest.raises(SettingsError, match="KAFKA_ALLOW_TOPICS: expected a comma-separated list of topics"):
        Settings.from_env({"KAFKA_ALLOW_TOPICS": "orders,a b"})


def test_a_record_of_the_submission_topic_for_an_invalid_topic_is_refused() -> None:
    settings = Settings.from_env({"CUSTOMER_NAME": "ocean"})
    record = (
        b'{"source":"s","scheduled_at":"2030-01-01T00:00:00Z","delivery_type":"KAFKA","payload":1,"destination":"%b"}'
    )
    with pytest.raises(SubmissionError, match="reads or writes itself") as caught:
        submission_row(record % b"ocean.process-kafka-message", settings, 0, topics=topic_rules(settings))
    assert caught.value.field == "destination"
    row = submission_row(record % b"orders", settings, 0, topics=topic_rules(settings))
    assert fields_of(row)["destination"] == b"orders"
