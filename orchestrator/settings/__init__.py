"""Every setting, each defined once; the reference's table and `orchestrator config check` come from here.

An instance is told apart from its neighbours by its environment alone, so one image serves many customers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from orchestrator.errors import SettingsError
from orchestrator.settings import database_url as database_urls
from orchestrator.settings.kafka import KafkaSettings, filled
from orchestrator.settings.kinds import (
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
    "host": Setting(("DB_HOST",), host, "Host of the database, without `DATABASE_URL`.", "localhost"),
    "port": Setting(("DB_PORT",), whole(1, 65535), "Port of the database, without `DATABASE_URL`.", "5432"),
    "name": Setting(("DB_NAME",), text(63), "Name of the database, without `DATABASE_URL`.", "orchestrator"),
    "user": Setting(
        ("DB_USER", "DATABASE_USERNAME", "SPRING_DATASOURCE_USERNAME"),
        text(63),
        "Who logs in, when `DATABASE_URL` does not say.",
        otherwise="libpq's own",
    ),
    "password": Setting(
        ("DB_PASSWORD", "DATABASE_PASSWORD", "SPRING_DATASOURCE_PASSWORD"),
        password,
        "Its password, when `DATABASE_URL` does not say.",
        otherwise="libpq's own",
        secret=True,
    ),
}
"""The parts an address is made of when DATABASE_URL is unset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings(KafkaSettings):
    """The settings in force. A name ends in its unit: `_s` is seconds, whatever the variable counts in."""

    deployment: str = defined(
        "DEPLOYMENT_NAME",
        kind=text(),
        default="event-scheduler",
        about="This deployment, as metrics and log lines name it.",
    )
    customer: str = defined("CUSTOMER_NAME", kind=text(), default="default", about="The customer it serves.")
    environment: str = defined(
        "ENVIRONMENT",
        "SPRING_PROFILES_ACTIVE",
        kind=text(),
        kinds={"SPRING_PROFILES_ACTIVE": active_profiles},
        agree=stages_agree,
        default="development",
        about="The stage it runs in; a name that begins with `prod` makes API keys obligatory. Of Spring's "
        "profiles that is the first such one, else the first.",
    )
    server_host: str = defined(
        "SERVER_HOST",
        kind=text(),
        default="0.0.0.0",  # noqa: S104  # in a container the address is not known before
        about="Address the API listens on.",
    )
    server_port: int = defined("SERVER_PORT", kind=whole(1, 65535), default="8080", about="Port the API listens on.")
    management_port: int | None = defined(
        "MANAGEMENT_SERVER_PORT",
        kind=whole(1, 65535),
        otherwise="the API's port",
        about="Port of health and metrics, to keep them apart from the API.",
    )
    database_url: str = defined(
        "DATABASE_URL",
        "SPRING_DATASOURCE_URL",
        kind=_DATABASE_URL,
        otherwise="made from the DB_ settings",
        secret=True,
        about="Address of the database; of several hosts, the one that takes writes.",
    )
    pool_max_size: int = defined(
        "DB_POOL_MAX_SIZE",
        "SPRING_DATASOURCE_HIKARI_MAXIMUM_POOL_SIZE",
        "SPRING_DATASOURCE_HIKARI_MAXIMUMPOOLSIZE",
        kind=whole(1, 1000),
        default="50",
        about="Most database connections a process opens.",
    )
    pool_min_idle: int = defined(
        "DB_POOL_MIN_IDLE",
        "SPRING_DATASOURCE_HIKARI_MINIMUM_IDLE",
        "SPRING_DATASOURCE_HIKARI_MINIMUMIDLE",
        kind=whole(0, 1000),
        default="2",
        about="Database connections kept open when idle.",
    )
    batch_size: int = defined(
        "SCHEDULER_BATCH_SIZE",
        "BATCH_SIZE",
        kind=whole(1, 10000),
        default="100",
        about="Most events taken by one claim.",
    )
    poll_interval_s: float = defined(
        "SCHEDULER_POLL_INTERVAL_MS",
        "EXECUTION_INTERVAL",
        kind=milliseconds(50, 10000),
        default="1000",
        about="Longest wait between two looks for due events, in case a notification is lost.",
    )
    lookahead_s: float = defined(
        "SCHEDULER_LOOKAHEAD_MS",
        kind=milliseconds(0, 10000),
        default="1500",
        about="How long before they are due events are claimed, to be fired on the millisecond.",
    )
    lease_s: float = defined(
        "SCHEDULER_LEASE_SECONDS",
        kind=seconds(1, 3600),
        default="60",
        about="How long a claimed event belongs to its dispatcher; after that it is due again.",
    )
    prefetch: int = defined(
        "SCHEDULER_PREFETCH",
        kind=whole(1, 1000000),
        otherwise="1000, or two batches if that is more",
        about="Most claimed events a dispatcher holds in memory. Each claim walks past all that are held.",
    )
    http_max_connections: int = defined(
        "HTTP_MAX_CONNECTIONS",
        kind=whole(1, 10000),
        default="200",
        about="Most deliveries under way at once.",
    )
    customer_max_parallel: int | None = defined(
        "CUSTOMER_MAX_PARALLEL",
        kind=whole(1, 100000),
        otherwise="none: no bound",
        about="Attempts under way at once to a destination that has no `max_parallel` of its own.",
    )
    http_connect_timeout_s: float = defined(
        "HTTP_CONNECT_TIMEOUT_SECONDS",
        kind=seconds(0.1, 600),
        default="5",
        about="Longest wait for a connection.",
    )
    http_timeout_s: float = defined(
        "HTTP_TIMEOUT_SECONDS",
        kind=seconds(0.1, 600),
        default="30",
        about="Longest that one delivery may take, from connecting to the last byte of the response.",
    )
    http_max_response_bytes: int = defined(
        "HTTP_MAX_RESPONSE_BYTES",
        kind=whole(1, 2**24),
        default="65536",
        about="Most that is read of a response.",
    )
    http_allow_networks: tuple[Network, ...] = defined(
        "HTTP_ALLOW_NETWORKS",
        kind=networks,
        default="",
        about="Private networks that events may be delivered to; all others are refused.",
    )
    webhook_secrets: tuple[str, ...] = defined(
        "WEBHOOK_SECRETS",
        kind=webhook_secrets,
        default="",
        secret=True,
        about="Keys that sign deliveries, newest first; each signs, so that receivers can change over.",
    )
    secrets_directory: str | None = defined(
        "SECRETS_DIRECTORY",
        kind=directory,
        otherwise="none",
        about="Files with the secrets that destinations name, read anew when they change.",
    )
    max_payload_bytes: int = defined(
        "MAX_PAYLOAD_BYTES", kind=whole(1, 2**26), default="1048576", about="Longest payload of an event."
    )
    max_body_bytes: int = defined(
        "MAX_BODY_BYTES",
        kind=whole(1, 2**28),
        default="16777216",
        about="Longest body of a request to the API.",
    )
    max_head_bytes: int = defined(
        "MAX_HEAD_BYTES",
        kind=whole(4096, 2**20),
        default="32768",
        about="Longest head of a request to the API: its request line and headers.",
    )
    api_max_connections: int | None = defined(
        "API_MAX_CONNECTIONS",
        kind=whole(1, 100000),
        otherwise="5000, or what the file descriptors allow",
        about="Most connections that clients have to the API. When all are taken, those that wait for their clients "
        "give way, oldest first, of the address with most.",
    )
    api_max_connections_per_address: int | None = defined(
        "API_MAX_CONNECTIONS_PER_ADDRESS",
        kind=whole(1, 100000),
        otherwise="none: no bound, as behind a load balancer all clients have one address",
        about="Most of them from one address, or one /64 network of IPv6.",
    )
    api_head_timeout_s: float = defined(
        "API_HEAD_TIMEOUT_SECONDS",
        kind=seconds(0.1, 600),
        default="10",
        about="Longest that a client may take from connecting, or from the first byte of a later request, to the end "
        "of the headers.",
    )
    api_body_timeout_s: float = defined(
        "API_BODY_TIMEOUT_SECONDS",
        kind=seconds(0.1, 3600),
        default="30",
        about="Longest that the body of a request may take to arrive.",
    )
    api_write_timeout_s: float = defined(
        "API_WRITE_TIMEOUT_SECONDS",
        kind=seconds(0.1, 3600),
        default="30",
        about="Longest that a client may leave an answer unread.",
    )
    api_keep_alive_s: float = defined(
        "API_KEEP_ALIVE_SECONDS",
        kind=seconds(0.1, 3600),
        default="75",
        about="How long an idle connection is kept; longer than a load balancer does, so that it closes first.",
    )
    max_batch_events: int = defined(
        "MAX_BATCH_EVENTS", kind=whole(1, 100000), default="1000", about="Most events in one batch request."
    )
    max_retries: int = defined(
        "DEFAULT_MAX_RETRIES",
        kind=whole(0, 100),
        default="3",
        about="Retries of an event that does not say how many.",
    )
    allow_anonymous: bool = defined(
        "ALLOW_ANONYMOUS",
        kind=boolean,
        otherwise="true, but false in production",
        about="Whether the API answers callers without a key.",
    )
    partition_days_ahead: int = defined(
        "PARTITION_DAYS_AHEAD",
        kind=whole(1, 400),
        default="30",
        about="Days ahead that partitions are made for; events of later days wait in one table until then.",
    )
    max_schedule_ahead_days: int = defined(
        "MAX_SCHEDULE_AHEAD_DAYS",
        kind=whole(1, 36500),
        default="400",
        about="Furthest ahead that events can be scheduled, in days.",
    )
    retention_days: int = defined(
        "CLEANUP_RETENTION_DAYS",
        kind=whole(1, 36500),
        default="7",
        about="Days that events are kept after the day they were due; a day with unfinished events stays whole.",
    )
    archive_directory: str | None = defined(
        "ARCHIVE_DIRECTORY",
        kind=writable_directory,
        otherwise="none: nothing is archived",
        about="Where maintenance writes events and outcomes before it drops them; one directory for each database.",
    )
    archive_format: str = defined(
        "ARCHIVE_FORMAT",
        kind=one_of({"csv": "csv", "parquet": "parquet"}, "csv or parquet"),
        default="csv",
        about="What they are written as: CSV compressed by gzip, or Parquet, which needs the extra `archive`.",
    )
    shutdown_timeout_s: float = defined(
        "SHUTDOWN_TIMEOUT_SECONDS",
        kind=seconds(0, 600),
        default="20",
        about="Longest that a stopping process finishes its work; what is left is released.",
    )
    log_level: str = defined(
        "LOG_LEVEL",
        "LOGGING_LEVEL_ROOT",
        kind=one_of(_LEVELS, "DEBUG, INFO, WARNING, ERROR or CRITICAL"),
        default="INFO",
        about="Least severity that is logged.",
    )
    log_file: str | None = defined(
        "LOG_FILE",
        "LOGGING_FILE_NAME",
        kind=text(4096),
        otherwise="standard error",
        about="File to log to; it may be rotated by renaming.",
    )
    log_format: str | None = defined(
        "LOG_FORMAT",
        kind=one_of({"json": "json", "console": "console"}, "json or console"),
        otherwise="console on a terminal, else json",
        about="One JSON object a line, or text for people.",
    )
    notices: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """What is odd about the environment but no error, a line each: likely typos, variables without effect."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Reads every setting; SettingsError lists all that is wrong, not only the first."""
        problems: list[str] = []
        values = _read(SETTINGS, environ, problems)
        parts = _read(DATABASE_PARTS, environ, problems)
        if values.get("prefetch", 0) is None and "batch_size" in values:
            values["prefetch"] = max(1000, 2 * values["batch_size"])
        values |= filled(values)
        problems += contradictions(values)
        if problems:
            raise SettingsError(problems)
        url: database_urls.DatabaseUrl | None = values["database_url"]
        address = url or database_urls.from_parts(parts["host"], parts["port"], parts["name"])
        values["environment"] = str(values["environment"])
        values["database_url"] = str(address.with_login(parts["user"], parts["password"]).for_writing())
        if values["allow_anonymous"] is None:
            values["allow_anonymous"] = not is_production(values["environment"])
        dropped = () if url is None else url.dropped
        return cls(**values, notices=notices(environ, _names(), _superseded_names(url), dropped))


_KAFKA = [each.name for each in fields(KafkaSettings)]
SETTINGS: dict[str, Setting] = {
    each.name: each.metadata["setting"]
    for each in sorted(fields(Settings), key=lambda each: each.name in _KAFKA)
    if "setting" in each.metadata
}
"""Attribute of `Settings` → its definition, in the order of the documentation: those of Kafka last."""


def forget_session_variables() -> None:
    """Takes from this process's environment what libpq would go by with every server, whatever a URL says.

    `DatabaseUrl.for_writing` says which of several hosts is meant; of one there is nothing to choose.
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
    return tuple(name for key in superseded(url) for name in DATABASE_PARTS[key].names)


def _names() -> tuple[str, ...]:
    return tuple(name for setting in (*SETTINGS.values(), *DATABASE_PARTS.values()) for name in setting.names)


def _read(table: Mapping[str, Setting], environ: Mapping[str, str], problems: list[str]) -> dict[str, Any]:
    values = {}
    for key, setting in table.items():
        try:
            values[key] = setting.read(environ)
        except ValueError as wrong:
            problems.append(str(wrong))
    return values
