"""The settings of Kafka. They stand apart only for their number; `Settings` has them as it has the others."""

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
# Named in the customer's own namespace unless said otherwise.
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
    """What says how Kafka is reached and used; `kafka_servers` None: it is not."""

    kafka_servers: str | None = defined(
        "KAFKA_BOOTSTRAP_SERVERS",
        "KAFKA_BROKERS",
        "SPRING_KAFKA_BOOTSTRAP_SERVERS",
        "SPRING_KAFKA_BOOTSTRAPSERVERS",
        kind=bootstrap_servers,
        otherwise="none: no Kafka; events come and go over HTTP and SQL alone",
        about="Brokers to begin with.",
    )
    kafka_security_protocol: str = defined(
        "KAFKA_SECURITY_PROTOCOL",
        "SPRING_KAFKA_SECURITY_PROTOCOL",
        "SPRING_KAFKA_PROPERTIES_SECURITY_PROTOCOL",
        kind=one_of(_PROTOCOLS, "PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL"),
        default="PLAINTEXT",
        about="How brokers are spoken to.",
    )
    kafka_sasl_mechanism: str = defined(
        "KAFKA_SASL_MECHANISM",
        "SPRING_KAFKA_PROPERTIES_SASL_MECHANISM",
        kind=one_of(_MECHANISMS, "PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512"),
        default="PLAIN",
        about="How to log in, with the SASL protocols.",
    )
    kafka_sasl_username: str | None = defined(
        "KAFKA_SASL_USERNAME", kind=text(), otherwise="none", about="Who logs in, with the SASL protocols."
    )
    kafka_sasl_password: str | None = defined(
        "KAFKA_SASL_PASSWORD", kind=password, otherwise="none", secret=True, about="Its password."
    )
    kafka_sasl_jaas: Jaas | None = defined(  # noqa: RUF009  # a field, as the others are
        "KAFKA_SASL_JAAS_CONFIG",
        "SPRING_KAFKA_PROPERTIES_SASL_JAAS_CONFIG",
        kind=jaas_config,
        otherwise="none",
        secret=True,
        about="User name and password as Java clients have them; in place of the two.",
    )
    kafka_ssl_ca_file: str | None = defined(
        "KAFKA_SSL_CA_FILE",
        kind=text(4096),
        otherwise="the system's",
        about="Certificates (PEM) that the brokers' own must be signed by.",
    )
    kafka_ssl_cert_file: str | None = defined(
        "KAFKA_SSL_CERT_FILE", kind=text(4096), otherwise="none", about="Certificate (PEM) to show to brokers."
    )
    kafka_ssl_key_file: str | None = defined(
        "KAFKA_SSL_KEY_FILE", kind=text(4096), otherwise="none", about="Its private key (PEM)."
    )
    kafka_idempotence: bool = defined(
        "KAFKA_IDEMPOTENCE",
        kind=boolean,
        default="true",
        about="Whether brokers drop what a producer sends them twice; turn it off for one that cannot.",
    )
    kafka_group: str = defined(
        "KAFKA_CONSUMER_GROUP",
        "SPRING_KAFKA_CONSUMER_GROUP_ID",
        "SPRING_KAFKA_CONSUMER_GROUPID",
        kind=text(),
        otherwise="`DEPLOYMENT_NAME`",
        about="Consumer group that shares the partitions out among ingesters.",
    )
    kafka_concurrency: int = defined(
        "KAFKA_CONSUMER_CONCURRENCY",
        "SPRING_KAFKA_LISTENER_CONCURRENCY",
        kind=whole(1, 100),
        default="1",
        about="Consumers of submissions in each ingester, with a database connection each.",
    )
    kafka_session_timeout_s: float = defined(
        "KAFKA_SESSION_TIMEOUT_MS",
        kind=milliseconds(1000, 300_000),
        default="30000",
        about="After so long without a sign of life, others take over a consumer's partitions.",
    )
    topic_submission: str = _topic("topic_submission", "In: events to schedule.")
    topic_processing: str = _topic("topic_processing", "In: commands, to cancel or redrive events.")
    topic_answers: str = _topic("topic_answers", "Out: what became of each command.")
    topic_ready: str = _topic("topic_ready", "Out: `KAFKA` events that name no topic of their own, when due.")
    topic_scheduled: str = _topic("topic_scheduled", "Out: events accepted.")
    topic_timestamp: str = _topic("topic_timestamp", "Out: the times of each finished event.")
    topic_dlq: str = _topic("topic_dlq", "Out: dead events and rejected submissions, with the reason.")
    kafka_allow_topics: tuple[str, ...] = defined(
        "KAFKA_ALLOW_TOPICS",
        kind=topic_patterns,
        default="",
        about="Topics that events may be delivered to; set it where deployments share brokers. Never one that the "
        "product reads or writes itself, nor Kafka's own (`__…`).",
    )
    kafka_partitions: int = defined(
        "KAFKA_PARTITIONS",
        kind=whole(1, 10_000),
        default="24",
        about="Partitions of the topics that `orchestrator topics create` makes.",
    )
    kafka_replication: int | None = defined(
        "KAFKA_REPLICATION", kind=whole(1, 100), otherwise="the brokers' own", about="Their replicas."
    )
    outbox_topics: tuple[str, ...] = defined(
        "OUTBOX_TOPICS",
        kind=outbox_kinds,
        default="dlq",
        about="Which of the topics scheduled, timestamp and dlq are written to.",
    )
    outbox_interval_s: float = defined(
        "OUTBOX_PUBLISH_INTERVAL",
        kind=milliseconds(100, 60_000),
        default="5000",
        about="Longest wait between two looks into the outbox, in case a notification is lost.",
    )
    submit_fallback: str | None = defined(
        "SUBMIT_FALLBACK",
        kind=one_of({"database": "database"}, "database"),
        otherwise="none: the API answers 503",
        about="Where the API puts submissions while Kafka is away.",
    )


def filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings of Kafka are when they are unset and follow from others."""
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
