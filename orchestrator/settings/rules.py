"""Rules about several settings, each of which is valid alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from orchestrator.settings import jaas
from orchestrator.settings.database_url import TARGET, DatabaseUrl

_MECHANISMS = {jaas.PLAIN: ("PLAIN",), jaas.SCRAM: ("SCRAM-SHA-256", "SCRAM-SHA-512")}
MARGIN_S = 5.0
"""Seconds that a lease must leave beyond look-ahead and timeout, to record the result in the database."""


def contradictions(values: Mapping[str, Any]) -> list[str]:
    """One line for each rule that `values`, keyed as `Settings`, break; missing keys break none."""
    return [problem for rule in _RULES if (problem := _broken(rule, values))]


def _broken(rule: Callable[[Mapping[str, Any]], str | None], values: Mapping[str, Any]) -> str | None:
    try:
        return rule(values)
    except KeyError:
        return None  # one of the compared values is wrong and has been reported


def _pool_holds_idle(v: Mapping[str, Any]) -> str | None:
    if v["pool_min_idle"] <= v["pool_max_size"]:
        return None
    most = v["pool_max_size"]
    return f"DB_POOL_MIN_IDLE: expected at most DB_POOL_MAX_SIZE ({most}), got {v['pool_min_idle']}"


def _memory_holds_batch(v: Mapping[str, Any]) -> str | None:
    if v["prefetch"] is None or v["prefetch"] >= v["batch_size"]:
        return None
    return f"SCHEDULER_PREFETCH: expected at least SCHEDULER_BATCH_SIZE ({v['batch_size']}), got {v['prefetch']}"


def _lease_outlasts_attempt(v: Mapping[str, Any]) -> str | None:
    # Otherwise the event would be due again, and delivered twice, while its first delivery is under way.
    least = v["lookahead_s"] + v["http_timeout_s"] + MARGIN_S
    if v["lease_s"] > least:
        return None
    return (
        f"SCHEDULER_LEASE_SECONDS: expected more than {least:g}, the sum of SCHEDULER_LOOKAHEAD_MS, "
        f"HTTP_TIMEOUT_SECONDS and {MARGIN_S:g} s to record the outcome, got {v['lease_s']:g}"
    )


def _body_holds_payload(v: Mapping[str, Any]) -> str | None:
    if v["max_payload_bytes"] <= v["max_body_bytes"]:
        return None
    least = v["max_payload_bytes"]
    return f"MAX_BODY_BYTES: expected at least MAX_PAYLOAD_BYTES ({least}), got {v['max_body_bytes']}"


def _partitions_within_reach(v: Mapping[str, Any]) -> str | None:
    if v["max_schedule_ahead_days"] >= v["partition_days_ahead"]:
        return None
    least = v["partition_days_ahead"]
    return (
        f"MAX_SCHEDULE_AHEAD_DAYS: expected at least PARTITION_DAYS_AHEAD ({least}), got {v['max_schedule_ahead_days']}"
    )


def _parquet_can_be_written(v: Mapping[str, Any]) -> str | None:
    if v["archive_format"] != "parquet" or _is_installed("pyarrow"):
        return None
    return (
        "ARCHIVE_FORMAT: parquet needs pyarrow, which is not installed; install "
        "scheduled-event-orchestrator[archive], or choose csv"
    )


def _spans_can_be_encoded(v: Mapping[str, Any]) -> str | None:
    if v["otlp_endpoint"] is None or _is_installed("opentelemetry.proto"):
        return None
    return (
        "OTEL_EXPORTER_OTLP_ENDPOINT: traces need opentelemetry-proto, which is not installed; run: pip install "
        "'scheduled-event-orchestrator[tracing]', or unset it"
    )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _sessions_can_write(v: Mapping[str, Any]) -> str | None:
    url: DatabaseUrl | None = v["database_url"]
    wanted = None if url is None else url.parameters.get(TARGET)
    if wanted in (None, "any", "read-write", "primary"):
        return None
    return f"DATABASE_URL: expected {TARGET} read-write or primary, because all roles write, got {wanted}; leave it out"


def _ports_differ(v: Mapping[str, Any]) -> str | None:
    if v["management_port"] != v["server_port"]:
        return None
    port = v["server_port"]
    return f"MANAGEMENT_SERVER_PORT: expected another port than SERVER_PORT, got {port}; unset it to share"


def _login_module_is_known(v: Mapping[str, Any]) -> str | None:
    login: jaas.Jaas | None = v["kafka_sasl_jaas"]
    if login is None:
        return None
    if login.module not in _MECHANISMS or login.token:
        got = f"{login.module} with tokenauth" if login.token else login.module
        return f"KAFKA_SASL_JAAS_CONFIG: expected PlainLoginModule or ScramLoginModule of Kafka's, got {got}"
    mechanisms = _MECHANISMS[login.module]
    if v["kafka_sasl_mechanism"] not in mechanisms:
        expected, got = " or ".join(mechanisms), v["kafka_sasl_mechanism"]
        return f"KAFKA_SASL_MECHANISM: expected {expected}, by the module of KAFKA_SASL_JAAS_CONFIG, got {got}"
    return None


def _logins_agree(v: Mapping[str, Any]) -> str | None:
    login: jaas.Jaas | None = v["kafka_sasl_jaas"]
    if login is None:
        return None
    for part in ("username", "password"):
        if v[f"kafka_sasl_{part}"] != getattr(login, part):
            name = f"KAFKA_SASL_{part.upper()}"
            return f"{name} and KAFKA_SASL_JAAS_CONFIG: both are set and differ; keep one of them"
    return None


def _login_is_whole(v: Mapping[str, Any]) -> str | None:
    if not v["kafka_security_protocol"].startswith("SASL_"):
        return None
    for key, name in (("kafka_sasl_username", "KAFKA_SASL_USERNAME"), ("kafka_sasl_password", "KAFKA_SASL_PASSWORD")):
        if not v[key]:
            return f"{name}: required, because KAFKA_SECURITY_PROTOCOL is {v['kafka_security_protocol']}"
    return None


def _certificate_has_key(v: Mapping[str, Any]) -> str | None:
    if (v["kafka_ssl_cert_file"] is None) == (v["kafka_ssl_key_file"] is None):
        return None
    return "KAFKA_SSL_CERT_FILE and KAFKA_SSL_KEY_FILE: expected both or neither; set the other too"


def _server_certificate_has_key(v: Mapping[str, Any]) -> str | None:
    if (v["ssl_cert_file"] is None) != (v["ssl_key_file"] is None):
        return "SERVER_SSL_CERT_FILE and SERVER_SSL_KEY_FILE: expected both or neither; set the other too"
    if v["ssl_client_ca_file"] is None or v["ssl_cert_file"] is not None:
        return None
    return "SERVER_SSL_CLIENT_CA_FILE: expected SERVER_SSL_CERT_FILE too; without TLS no client can show a certificate"


def _drain_is_part_of_stop(v: Mapping[str, Any]) -> str | None:
    if v["shutdown_drain_s"] == 0 or v["shutdown_drain_s"] < v["shutdown_timeout_s"]:
        return None
    most, got = v["shutdown_timeout_s"], v["shutdown_drain_s"]
    return f"SHUTDOWN_DRAIN_SECONDS: expected less than SHUTDOWN_TIMEOUT_SECONDS ({most:g}), got {got:g}"


def _topics_differ(v: Mapping[str, Any]) -> str | None:
    # Records written to a topic that is also read would come back for ever.
    for read in ("topic_submission", "topic_processing"):
        for other in (name for name in v if name.startswith("topic_") and name != read):
            if v[read] == v[other]:
                return f"KAFKA_{read.upper()}: expected another topic than KAFKA_{other.upper()}, got {v[read]} twice"
    return None


def _fallback_has_cause(v: Mapping[str, Any]) -> str | None:
    if v["submit_fallback"] is None or v["kafka_servers"] is not None:
        return None
    return "SUBMIT_FALLBACK: expected KAFKA_BOOTSTRAP_SERVERS too; without Kafka all submissions go to the database"


_RULES = (
    _pool_holds_idle,
    _memory_holds_batch,
    _lease_outlasts_attempt,
    _body_holds_payload,
    _partitions_within_reach,
    _parquet_can_be_written,
    _spans_can_be_encoded,
    _sessions_can_write,
    _ports_differ,
    _login_module_is_known,
    _logins_agree,
    _login_is_whole,
    _certificate_has_key,
    _server_certificate_has_key,
    _drain_is_part_of_stop,
    _topics_differ,
    _fallback_has_cause,
)
