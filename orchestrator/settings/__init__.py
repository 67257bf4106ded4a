"""Every setting, each defined once; the documented table and `orchestrator config check` are made from here.

Only the environment, and the files of secrets that it names, tell one instance from another, so that one image serves
many customers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from orchestrator.errors import SettingsError
from orchestrator.settings import database_url as database_urls
from orchestrator.settings import otlp
from orchestrator.settings.kafka import KafkaSettings, filled, topics_of_others
from orchestrator.settings.kinds import (
    AbsentError,
    Kind,
    Network,
    Setting,
    active_profiles,
    boolean,
    defined,
    directory,
    host,
    is_production,
    milliseconds,
    networks,
    one_of,
    password,
    pem_file,
    seconds,
    stages_agree,
    text,
    webhook_secrets,
    whole,
    writable_directory,
)
from orchestrator.settings.notices import notices
from orchestrator.settings.rules import contradictions

_DATABASE_URL = Kind(
    "postgresql://user:password@host:5432/database, with or without jdbc: before it",
    database_urls.parse,
    database_urls.masked,
)
# The names of Python's logging, and those of Java's that it lacks.
_LEVELS = {level.lower(): level for level in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")}
_LEVELS |= {"trace": "DEBUG", "warn": "WARNING", "fatal": "CRITICAL"}


DATABASE_PARTS = {
    "host": Setting(("DB_HOST",), host, "Host of the database, when `DATABASE_URL` is unset.", "localhost"),
    "port": Setting(("DB_PORT",), whole(1, 65535), "Port of the database, when `DATABASE_URL` is unset.", "5432"),
    "name": Setting(("DB_NAME",), text(63), "Name of the database, when `DATABASE_URL` is unset.", "orchestrator"),
    "user": Setting(
        ("DB_USER", "DATABASE_USERNAME", "SPRING_DATASOURCE_USERNAME"),
        text(63),
        "User of the database, when `DATABASE_URL` names none.",
        otherwise="the default of libpq",
    ),
    "password": Setting(
        ("DB_PASSWORD", "DATABASE_PASSWORD", "SPRING_DATASOURCE_PASSWORD"),
        password,
        "Password of the database user, when `DATABASE_URL` has none.",
        otherwise="the default of libpq",
        secret=True,
    ),
}
"""The parts of the address when DATABASE_URL is unset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings(KafkaSettings):
    """The settings in force. A name ends in its unit: `_s` is seconds, whatever the variable counts in."""

    deployment: str = defined(
        "DEPLOYMENT_NAME",
        kind=text(),
        default="event-scheduler",
        about="Name of this deployment in metrics and log lines.",
    )
    customer: str = defined(
        "CUSTOMER_NAME",
        kind=text(),
        default="default",
        about="Customer that this deployment serves; it begins the default names of topics.",
    )
    environment: str = defined(
        "ENVIRONMENT",
        "SPRING_PROFILES_ACTIVE",
        kind=text(),
        kinds={"SPRING_PROFILES_ACTIVE": active_profiles},
        agree=stages_agree,
        default="development",
        about="Stage that this deployment runs in. A name that begins with `prod` makes API keys obligatory. "
        "Of several Spring profiles, the first that begins with `prod` counts, else the first.",
    )
    server_host: str = defined(
        "SERVER_HOST",
        kind=text(),
        default="0.0.0.0",  # noqa: S104  # in a container the address is not known before
        about="Address that the API listens on.",
    )
    server_port: int = defined(
        "SERVER_PORT", kind=whole(1, 65535), default="8080", about="Port that the API listens on."
    )
    management_port: int | None = defined(
        "MANAGEMENT_SERVER_PORT",
        kind=whole(1, 65535),
        otherwise="the API's port",
        about="Port that serves health and metrics, if they are to be apart from the API.",
    )
    ssl_cert_file: str | None = defined(
        "SERVER_SSL_CERT_FILE",
        "SERVER_SSL_CERTIFICATE",
        kind=pem_file,
        otherwise="none: no TLS",
        about="File (PEM) of the API's certificate, and of the authorities between it and the root. With it, the API's "
        "port speaks TLS. A changed file is read again.",
    )
    ssl_key_file: str | None = defined(
        "SERVER_SSL_KEY_FILE",
        "SERVER_SSL_CERTIFICATE_PRIVATE_KEY",
        "SERVER_SSL_CERTIFICATEPRIVATEKEY",
        kind=pem_file,
        otherwise="none",
        about="File (PEM) of the private key of `SERVER_SSL_CERT_FILE`, without a passphrase.",
    )
    ssl_client_ca_file: str | None = defined(
        "SERVER_SSL_CLIENT_CA_FILE",
        kind=pem_file,
        otherwise="none: clients need no certificate",
        about="File (PEM) of the authorities that must have signed the certificates of the API's clients. With it, the "
        "API takes no client without such a certificate.",
    )
    database_url: str = defined(
        "DATABASE_URL",
        "SPRING_DATASOURCE_URL",
        kind=_DATABASE_URL,
        otherwise="made from the `DB_` settings",
        secret=True,
        about="Address of the database. If it names several hosts, the one that takes writes is used.",
    )
    database_read_url: str | None = defined(
        "DATABASE_READ_URL",
        kind=_DATABASE_URL,
        otherwise="none: the database of `DATABASE_URL` answers",
        secret=True,
        about="Address of a physical replica that answers the API's statistics, forecasts and lists. "
        "It takes its login from `DATABASE_URL` if it names none.",
    )
    database_read_max_lag_s: float = defined(
        "DATABASE_READ_MAX_LAG_SECONDS",
        kind=seconds(2, 3600),
        default="5",
        about="How old an answer of the replica may be. While it is further behind, the database of `DATABASE_URL` "
        "answers.",
    )
    pool_max_size: int = defined(
        "DB_POOL_MAX_SIZE",
        "SPRING_DATASOURCE_HIKARI_MAXIMUM_POOL_SIZE",
        "SPRING_DATASOURCE_HIKARI_MAXIMUMPOOLSIZE",
        kind=whole(1, 1000),
        default="50",
        about="Maximum number of database connections of a process.",
    )
    pool_min_idle: int = defined(
        "DB_POOL_MIN_IDLE",
        "SPRING_DATASOURCE_HIKARI_MINIMUM_IDLE",
        "SPRING_DATASOURCE_HIKARI_MINIMUMIDLE",
        kind=whole(0, 1000),
        default="2",
        about="Number of database connections that a process keeps open when idle.",
    )
    batch_size: int = defined(
        "SCHEDULER_BATCH_SIZE",
        "BATCH_SIZE",
        kind=whole(1, 10000),
        default="100",
        about="Number of events in one claim. Claims grow to 2,000 while they come back full.",
    )
    poll_interval_s: float | None = defined(
        "SCHEDULER_POLL_INTERVAL_MS",
        "EXECUTION_INTERVAL",
        kind=milliseconds(50, 10000),
        otherwise="10000, or 1000 while notifications cannot come, as through a pooler",
        about="Longest wait between two polls for due events, in case a notification is lost.",
    )
    lookahead_s: float = defined(
        "SCHEDULER_LOOKAHEAD_MS",
        kind=milliseconds(0, 10000),
        default="2500",
        about="How long before its due time an event is claimed, so that it starts with millisecond accuracy.",
    )
    lease_s: float = defined(
        "SCHEDULER_LEASE_SECONDS",
        kind=seconds(1, 3600),
        default="60",
        about="How long a claimed event belongs to its dispatcher. Without a result by then, it is due again.",
    )
    prefetch: int | None = defined(
        "SCHEDULER_PREFETCH",
        kind=whole(1, 1000000),
        otherwise="30000 that are not due yet, or twice a claim, at least 1000, once they are due",
        about="Maximum number of claimed events in the memory of a dispatcher. Each claim passes over all of them.",
    )
    http_max_connections: int = defined(
        "HTTP_MAX_CONNECTIONS",
        kind=whole(1, 10000),
        default="200",
        about="Maximum number of HTTP deliveries under way at once.",
    )
    customer_max_parallel: int | None = defined(
        "CUSTOMER_MAX_PARALLEL",
        kind=whole(1, 100000),
        otherwise="none: no limit",
        about="Maximum number of attempts under way at once to a destination without `max_parallel`.",
    )
    http_connect_timeout_s: float = defined(
        "HTTP_CONNECT_TIMEOUT_SECONDS",
        kind=seconds(0.1, 600),
        default="5",
        about="Longest time to connect to a receiver.",
    )
    http_timeout_s: float = defined(
        "HTTP_TIMEOUT_SECONDS",
        kind=seconds(0.1, 600),
        default="30",
        about="Longest time for one delivery, from connecting to the last byte of the response.",
    )
    http_max_response_bytes: int = defined(
        "HTTP_MAX_RESPONSE_BYTES",
        kind=whole(1, 2**24),
        default="65536",
        about="Maximum number of bytes that are read of a receiver's response.",
    )
    http_allow_networks: tuple[Network, ...] = defined(
        "HTTP_ALLOW_NETWORKS",
        kind=networks,
        default="",
        about="Private networks that events may be delivered to. The SSRF guard refuses all others.",
    )
    webhook_secrets: tuple[str, ...] = defined(
        "WEBHOOK_SECRETS",
        kind=webhook_secrets,
        default="",
        secret=True,
        about="Keys that sign deliveries, newest first. Every key signs, so that receivers can change keys.",
    )
    secrets_directory: str | None = defined(
        "SECRETS_DIRECTORY",
        kind=directory,
        otherwise="none",
        about="Directory of the secrets that destinations name, one file each. A changed file is read again.",
    )
    max_payload_bytes: int = defined(
        "MAX_PAYLOAD_BYTES",
        kind=whole(1, 2**26),
        default="1048576",
        about="Maximum size of an event's payload, in bytes.",
    )
    max_body_bytes: int = defined(
        "MAX_BODY_BYTES",
        kind=whole(1, 2**28),
        default="16777216",
        about="Maximum size of the body of a request to the API, in bytes.",
    )
    max_head_bytes: int = defined(
        "MAX_HEAD_BYTES",
        kind=whole(4096, 2**20),
        default="32768",
        about="Maximum size of the head of a request to the API (request line and headers), in bytes.",
    )
    api_max_connections: int | None = defined(
        "API_MAX_CONNECTIONS",
        kind=whole(1, 100000),
        otherwise="5000, or fewer if file descriptors are short",
        about="Maximum number of client connections to the API. When all are taken, the API closes connections that "
        "wait for their client: of the address with the most connections, the oldest first.",
    )
    api_max_connections_per_address: int | None = defined(
        "API_MAX_CONNECTIONS_PER_ADDRESS",
        kind=whole(1, 100000),
        otherwise="none: no limit, because behind a load balancer all clients share one address",
        about="Maximum number of connections to the API from one IPv4 address or one IPv6 /64 network.",
    )
    api_head_timeout_s: float = defined(
        "API_HEAD_TIMEOUT_SECONDS",
        kind=seconds(0.1, 600),
        default="10",
        about="Longest time for the head of a request: from the connection, or from the first byte of a later request, "
        "to the end of the headers.",
    )
    api_body_timeout_s: float = defined(
        "API_BODY_TIMEOUT_SECONDS",
        kind=seconds(0.1, 3600),
        default="30",
        about="Longest time for the body of a request to arrive.",
    )
    api_write_timeout_s: float = defined(
        "API_WRITE_TIMEOUT_SECONDS",
        kind=seconds(0.1, 3600),
        default="30",
        about="Longest time that a client may leave an answer unread.",
    )
    api_keep_alive_s: float = defined(
        "API_KEEP_ALIVE_SECONDS",
        kind=seconds(0.1, 3600),
        default="75",
        about="How long the API keeps an idle connection. Choose more than the load balancer does, so that the load "
        "balancer closes first.",
    )
    max_batch_events: int = defined(
        "MAX_BATCH_EVENTS",
        kind=whole(1, 100000),
        default="1000",
        about="Maximum number of events in one batch request.",
    )
    max_retries: int = defined(
        "DEFAULT_MAX_RETRIES",
        kind=whole(0, 100),
        default="3",
        about="Number of retries of an event that names none.",
    )
    allow_anonymous: bool = defined(
        "ALLOW_ANONYMOUS",
        kind=boolean,
        otherwise="true, but false in production",
        about="Whether the API answers requests without a key.",
    )
    partition_days_ahead: int = defined(
        "PARTITION_DAYS_AHEAD",
        kind=whole(1, 400),
        default="30",
        about="Number of days ahead for which maintenance makes partitions. Later events wait in the table `horizon`.",
    )
    max_schedule_ahead_days: int = defined(
        "MAX_SCHEDULE_AHEAD_DAYS",
        kind=whole(1, 36500),
        default="400",
        about="How far ahead events can be scheduled, in days.",
    )
    retention_days: int = defined(
        "CLEANUP_RETENTION_DAYS",
        kind=whole(1, 36500),
        default="7",
        about="Retention: how many days events are kept after their day. A day with unfinished events is kept whole.",
    )
    archive_directory: str | None = defined(
        "ARCHIVE_DIRECTORY",
        kind=writable_directory,
        otherwise="none: no archive",
        about="Directory where maintenance archives events and outcomes before it drops them; one for each database.",
    )
    archive_format: str = defined(
        "ARCHIVE_FORMAT",
        kind=one_of({"csv": "csv", "parquet": "parquet"}, "csv or parquet"),
        default="csv",
        about="Format of the archive: CSV compressed by gzip, or Parquet, which needs the extra `archive`.",
    )
    shutdown_timeout_s: float = defined(
        "SHUTDOWN_TIMEOUT_SECONDS",
        kind=seconds(0, 600),
        default="20",
        about="Longest time for a stopping process to finish its work. Deliveries under way have four fifths of it. "
        "It releases events that are left.",
    )
    shutdown_drain_s: float = defined(
        "SHUTDOWN_DRAIN_SECONDS",
        kind=seconds(0, 600),
        default="0",
        about="How long a stopping API goes on taking requests while it is not ready, and ends each connection with an "
        "answer, so that load balancers move on. Part of `SHUTDOWN_TIMEOUT_SECONDS`.",
    )
    log_level: str = defined(
        "LOG_LEVEL",
        "LOGGING_LEVEL_ROOT",
        kind=one_of(_LEVELS, "DEBUG, INFO, WARNING, ERROR or CRITICAL"),
        default="INFO",
        about="Lowest severity that is logged.",
    )
    log_file: str | None = defined(
        "LOG_FILE",
        "LOGGING_FILE_NAME",
        kind=text(4096),
        otherwise="standard error",
        about="File to log to. It may be rotated by renaming.",
    )
    log_format: str | None = defined(
        "LOG_FORMAT",
        kind=one_of({"json": "json", "console": "console"}, "json or console"),
        otherwise="console on a terminal, else json",
        about="Form of log lines: one JSON object per line, or text for people.",
    )
    otlp_endpoint: str | None = defined(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        kind=otlp.endpoint,
        otherwise="none: no spans are made",
        about="Base URL of the collector that takes spans over OTLP/HTTP; `/v1/traces` is added. It needs the extra "
        "`tracing`.",
    )
    otlp_headers: tuple[tuple[str, str], ...] = defined(
        "OTEL_EXPORTER_OTLP_HEADERS",
        kind=otlp.headers,
        default="",
        secret=True,
        about="Headers of each request to the collector, such as a key.",
    )
    otlp_protocol: str = defined(
        "OTEL_EXPORTER_OTLP_PROTOCOL",
        kind=otlp.protocol,
        default="http/protobuf",
        about="How spans are sent to the collector.",
    )
    otlp_timeout_s: float = defined(
        "OTEL_EXPORTER_OTLP_TIMEOUT",
        kind=milliseconds(1, 60000),
        default="10000",
        about="Longest wait for the collector to connect or to answer, in milliseconds.",
    )
    otlp_certificate: str | None = defined(
        "OTEL_EXPORTER_OTLP_CERTIFICATE",
        kind=otlp.certificate,
        otherwise="the authorities of this machine",
        about="PEM file of the authorities that the collector's certificate is checked against.",
    )
    otlp_service_name: str | None = defined(
        "OTEL_SERVICE_NAME",
        kind=text(),
        otherwise="`DEPLOYMENT_NAME`",
        about="Name of this service in traces.",
    )
    traces_sampler: str = defined(
        "OTEL_TRACES_SAMPLER",
        kind=otlp.sampler,
        default="parentbased_always_on",
        about="Which traces are recorded. The samplers that begin with `parentbased_` honour the flag of a traceparent "
        "that comes in, and decide only about traces that begin here.",
    )
    traces_sampler_arg: float = defined(
        "OTEL_TRACES_SAMPLER_ARG",
        kind=otlp.ratio,
        default="1",
        about="Part of the traces that the `traceidratio` samplers record.",
    )
    notices: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """One line for each doubtful variable that is no error: likely typos, variables without effect."""

    @property
    def named_customer(self) -> str | None:
        """The customer, if it was given a name of its own."""
        return None if self.customer == SETTINGS["customer"].default else self.customer

    @property
    def prefetch_due(self) -> int:
        """Events that a dispatcher may hold once they are due, while claims have not grown."""
        return self.prefetch or max(1000, 2 * self.batch_size)

    @classmethod
    def from_env(cls, environ: Mapping[str, str], *, elsewhere: bool = False) -> Settings:
        """Reads every setting; SettingsError lists all problems, not only the first.

        `elsewhere`: the variables are those of another machine. A setting whose file or directory is not on this one
        is None, no rule is applied to it, and a notice names it.
        """
        problems: list[str] = []
        absent: dict[str, str] = {}
        values = _read(SETTINGS, environ, problems, absent)
        parts = _read(DATABASE_PARTS, environ, problems, absent)
        values |= filled(values)
        problems += contradictions(values)
        if not elsewhere:
            problems += absent.values()
        if problems:
            raise SettingsError(problems)
        values |= {key: None for key in absent if key in SETTINGS}
        parts = dict.fromkeys(DATABASE_PARTS) | parts
        url: database_urls.DatabaseUrl | None = values["database_url"]
        address = url or database_urls.from_parts(parts["host"], parts["port"], parts["name"])
        values["environment"] = str(values["environment"])
        address = address.with_login(parts["user"], parts["password"])
        values["database_url"] = str(address.for_writing())
        if values["database_read_url"] is not None:
            read_url = values["database_read_url"].with_login(address.user, address.password)
            values["database_read_url"] = str(read_url.for_reading())
        if values["allow_anonymous"] is None:
            values["allow_anonymous"] = not is_production(values["environment"])
        dropped = () if url is None else url.dropped
        doubtful = notices(environ, _names(), _superseded_names(url), dropped)
        return cls(**values, notices=(*absent.values(), *doubtful, *topics_of_others(values)))


_KAFKA = [each.name for each in fields(KafkaSettings)]
SETTINGS: dict[str, Setting] = {
    each.name: each.metadata["setting"]
    for each in sorted(fields(Settings), key=lambda each: each.name in _KAFKA)
    if "setting" in each.metadata
}
"""Attribute of `Settings` → its definition, in the order of the documentation: those of Kafka last."""


def forget_session_variables() -> None:
    """Removes variables that libpq would apply to every server, regardless of the URL.

    `DatabaseUrl.for_writing` already says which of several hosts is meant.
    """
    for name in ("PGDATESTYLE", "PGGEQO", "PGTZ", "PGTARGETSESSIONATTRS"):
        os.environ.pop(name, None)


def given(environ: Mapping[str, str]) -> frozenset[str]:
    """The attributes of `Settings` that the environment sets."""
    return frozenset(key for key, setting in SETTINGS.items() if setting.given(environ) is not None)


def superseded(url: database_urls.DatabaseUrl | None) -> tuple[str, ...]:
    """The keys of DATABASE_PARTS that have no effect, given what DATABASE_URL holds."""
    if url is None:
        return ()
    return ("host", "port", "name", *(key for key in ("user", "password") if getattr(url, key)))


def _superseded_names(url: database_urls.DatabaseUrl | None) -> tuple[str, ...]:
    parts = [DATABASE_PARTS[key] for key in superseded(url)]
    return tuple(name for part in parts for name in (*part.names, *part.file_names))


def _names() -> tuple[str, ...]:
    every = (*SETTINGS.values(), *DATABASE_PARTS.values())
    return tuple(name for setting in every for name in (*setting.names, *setting.file_names))


def _read(
    table: Mapping[str, Setting], environ: Mapping[str, str], problems: list[str], absent: dict[str, str]
) -> dict[str, Any]:
    """The values by key. What is wrong goes to `problems`, and what names no file of this machine to `absent`."""
    values = {}
    for key, setting in table.items():
        try:
            values[key] = setting.read(environ)
        except AbsentError as lost:
            absent[key] = str(lost)
        except ValueError as wrong:
            problems.append(str(wrong))
    return values
