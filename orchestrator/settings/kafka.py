"""The settings of Kafka. They have a module of their own because they are many; `Settings` inherits them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.settings.jaas import Jaas
from orchestrator.settings.kinds import (
    boolean,
    bootstrap_servers,
    defined,
    jaas_config,
    milliseconds,
    one_of,
    outbox_kinds,
    password,
    text,
    topic,
    topic_patterns,
    whole,
)

_PROTOCOLS = {name.lower(): name for name in ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")}
_MECHANISMS = {name.lower(): name for name in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")}
# By default, the customer's name and a dot come first.
_TOPICS = {
    "topic_submission": "event.submissions",
    "topic_processing": "process-kafka-message",
    "topic_answers": "command.answers",
    "topic_ready": "event.ready",
    "topic_scheduled": "event.scheduled",
    "topic_timestamp": "timestamp.processing",
    "topic_dlq": "event.dlq",
}


def _topic(key: str, about: str) -> Any:
    variable = f"KAFKA_{key.upper()}"
    return defined(variable, kind=topic, otherwise=f"`CUSTOMER_NAME`.{_TOPICS[key]}", about=about)


@dataclass(frozen=True, kw_only=True, slots=True)
class KafkaSettings:
    """How Kafka is reached and used; without `kafka_servers`, Kafka is not used."""

    kafka_servers: str | None = defined(
        "KAFKA_BOOTSTRAP_SERVERS",
        "KAFKA_BROKERS",
        "SPRING_KAFKA_BOOTSTRAP_SERVERS",
        "SPRING_KAFKA_BOOTSTRAPSERVERS",
        kind=bootstrap_servers,
        otherwise="none: no Kafka, only HTTP and SQL",
        about="Kafka brokers to connect to first.",
    )
    kafka_security_protocol: str = defined(
        "KAFKA_SECURITY_PROTOCOL",
        "SPRING_KAFKA_SECURITY_PROTOCOL",
        "SPRING_KAFKA_PROPERTIES_SECURITY_PROTOCOL",
        kind=one_of(_PROTOCOLS, "PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL"),
        default="PLAINTEXT",
        about="Protocol for connections to Kafka brokers.",
    )
    kafka_sasl_mechanism: str = defined(
        "KAFKA_SASL_MECHANISM",
        "SPRING_KAFKA_PROPERTIES_SASL_MECHANISM",
        kind=one_of(_MECHANISMS, "PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512"),
        default="PLAIN",
        about="Mechanism of the login to Kafka, with the SASL protocols.",
    )
    kafka_sasl_username: str | None = defined(
        "KAFKA_SASL_USERNAME",
        kind=text(),
        otherwise="none",
        about="User of the login to Kafka, with the SASL protocols.",
    )
    kafka_sasl_password: str | None = defined(
        "KAFKA_SASL_PASSWORD", kind=password, otherwise="none", secret=True, about="Password of the login to Kafka."
    )
    kafka_sasl_jaas: Jaas | None = defined(  # noqa: RUF009  # a field, as the others are
        "KAFKA_SASL_JAAS_CONFIG",
        "SPRING_KAFKA_PROPERTIES_SASL_JAAS_CONFIG",
        kind=jaas_config,
        otherwise="none",
        secret=True,
        about="User and password of the login to Kafka in the form of Java clients; replaces `KAFKA_SASL_USERNAME` and "
        "`KAFKA_SASL_PASSWORD`.",
    )
    kafka_ssl_ca_file: str | None = defined(
        "KAFKA_SSL_CA_FILE",
        kind=text(4096),
        otherwise="those of the system",
        about="File (PEM) of the authorities that must have signed the certificates of Kafka brokers.",
    )
    kafka_ssl_cert_file: str | None = defined(
        "KAFKA_SSL_CERT_FILE",
        kind=text(4096),
        otherwise="none",
        about="File (PEM) of the client certificate to show to Kafka brokers.",
    )
    kafka_ssl_key_file: str | None = defined(
        "KAFKA_SSL_KEY_FILE",
        kind=text(4096),
        otherwise="none",
        about="File (PEM) of the private key of `KAFKA_SSL_CERT_FILE`.",
    )
    kafka_idempotence: bool = defined(
        "KAFKA_IDEMPOTENCE",
        kind=boolean,
        default="true",
        about="Whether Kafka brokers drop records that a producer sends twice. Turn it off for brokers that cannot.",
    )
    kafka_group: str = defined(
        "KAFKA_CONSUMER_GROUP",
        "SPRING_KAFKA_CONSUMER_GROUP_ID",
        "SPRING_KAFKA_CONSUMER_GROUPID",
        kind=text(),
        otherwise="`DEPLOYMENT_NAME`",
        about="Kafka consumer group that divides the partitions of submissions among ingesters.",
    )
    kafka_concurrency: int = defined(
        "KAFKA_CONSUMER_CONCURRENCY",
        "SPRING_KAFKA_LISTENER_CONCURRENCY",
        kind=whole(1, 100),
        default="1",
        about="Number of Kafka consumers in each ingester. Each has its own database connection.",
    )
    kafka_session_timeout_s: float = defined(
        "KAFKA_SESSION_TIMEOUT_MS",
        kind=milliseconds(1000, 300_000),
        default="30000",
        about="How long a Kafka consumer may be silent before other consumers take over its partitions.",
    )
    topic_submission: str = _topic("topic_submission", "Topic to read: events to schedule.")
    topic_processing: str = _topic(
        "topic_processing", "Topic to read: commands that cancel, reschedule or redrive events."
    )
    topic_answers: str = _topic("topic_answers", "Topic to write: the answer to each command.")
    topic_ready: str = _topic("topic_ready", "Topic to write: due `KAFKA` events that name no topic.")
    topic_scheduled: str = _topic("topic_scheduled", "Topic to write: accepted events.")
    topic_timestamp: str = _topic("topic_timestamp", "Topic to write: the times of each finished event.")
    topic_dlq: str = _topic("topic_dlq", "Topic to write: dead events and rejected submissions, with the reason.")
    kafka_allow_topics: tuple[str, ...] = defined(
        "KAFKA_ALLOW_TOPICS",
        kind=topic_patterns,
        default="",
        about="Topics that events may be delivered to; unset means any. Set it where deployments share brokers. Topics "
        "that the orchestrator itself reads or writes and Kafka's internal topics (`__…`) are always refused.",
    )
    kafka_partitions: int = defined(
        "KAFKA_PARTITIONS",
        kind=whole(1, 10_000),
        default="24",
        about="Number of partitions of each topic that `orchestrator topics create` makes.",
    )
    kafka_replication: int | None = defined(
        "KAFKA_REPLICATION",
        kind=whole(1, 100),
        otherwise="the default of the brokers",
        about="Number of replicas of each topic that `orchestrator topics create` makes.",
    )
    outbox_topics: tuple[str, ...] = defined(
        "OUTBOX_TOPICS",
        kind=outbox_kinds,
        default="dlq",
        about="Which of the topics scheduled, timestamp and dlq the outbox writes to.",
    )
    outbox_interval_s: float = defined(
        "OUTBOX_PUBLISH_INTERVAL",
        kind=milliseconds(100, 60_000),
        default="10000",
        about="Longest wait between two polls of the outbox, in case a notification is lost.",
    )
    submit_fallback: str | None = defined(
        "SUBMIT_FALLBACK",
        kind=one_of({"database": "database"}, "database"),
        otherwise="none: the API answers 503",
        about="Where the API keeps submissions while Kafka is unavailable.",
    )


def topics_of_others(values: Mapping[str, Any]) -> tuple[str, ...]:
    """One line for each topic that is named as the default of another customer's would be."""
    found = []
    for key, tail in _TOPICS.items():
        owner, _, rest = values[key].partition(".")
        if rest == tail and owner != values["customer"]:
            name = f"KAFKA_{key.upper()}"
            found.append(
                f"{name}: {values[key]} looks like a topic of {owner}, but CUSTOMER_NAME is {values['customer']}"
            )
    return tuple(found)


def filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Unset settings of Kafka that follow from other settings."""
    made: dict[str, Any] = {}
    if "customer" in values:
        made |= {key: f"{values['customer']}.{tail}" for key, tail in _TOPICS.items() if values.get(key, "") is None}
    if "deployment" in values and values.get("kafka_group", "") is None:
        made["kafka_group"] = values["deployment"]
    login: Jaas | None = values.get("kafka_sasl_jaas")
    if login is not None:
        made |= {
            key: value
            for key, value in (("kafka_sasl_username", login.username), ("kafka_sasl_password", login.password))
            if values.get(key, "") is None
        }
    return made
