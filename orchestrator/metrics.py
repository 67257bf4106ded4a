"""The metrics of a process, for Prometheus.

Every series has the labels deployment, customer and environment, also those about the process itself. They are added
when the series are read, so that counting costs nothing more.
"""

from __future__ import annotations

import logging
import math
import operator
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from orchestrator.destination_attempts import DestinationAttempts
from orchestrator.histograms import Histogram, Histograms
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.database.maintenance import Condition
    from orchestrator.database.vital_signs import HeldDestination, Outlook, VitalSigns

Samples = dict[str, list[tuple[str, dict[str, str], float]]]
"""By metric: name, labels and value of each of its samples."""
PREFIX = "orchestrator"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LATE_S = 1.0
"""An attempt that begins later than this after it was due is late."""
LATENESS_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
DURATION_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """One per process. Attributes are named as the series they feed, without the prefix ``orchestrator_``.

    A metric with labels is called with their values and returns the series to feed, as in
    ``metrics.events_received_total("http").inc(500)``; that is a look-up in a dict. Values of labels must come from
    small sets: the pattern of a route, never a path or an id. Times are in seconds.
    """

    def __init__(self, settings: Settings, role: str = "") -> None:
        self.registry = CollectorRegistry()
        self._labelled = _Labelled(
            self.registry,
            {
                "deployment": settings.deployment,
                "customer": settings.customer,
                "environment": settings.environment,
            },
        )
        ProcessCollector(registry=self.registry)
        build = self._gauge(
            "build_info", "The version that runs, and in which role; always 1.", "version", "python", "role"
        )
        build.labels(_version(), platform.python_version(), role).set(1)
        self.log_lines_total: Callable[[str], Counter] = cache(
            self._counter("log_lines_total", "Lines logged as warning, error or critical.", "level").labels
        )

        self.events_received_total: Callable[[str], Counter] = cache(
            self._counter("events_received_total", "Submissions received, by how they came.", "channel").labels
        )
        self.events_duplicate_total = self._counter(
            "events_duplicate_total", "Submissions that repeated an event already kept."
        )
        self.events_rejected_total = self._counter("events_rejected_total", "Submissions refused as invalid.")
        self.events_persisted_total: Callable[[str], Counter] = cache(
            self._counter("events_persisted_total", "Submissions kept as new events.", "channel").labels
        )
        self.events_claimed_total = self._counter("events_claimed_total", "Events claimed for delivery.")
        self.events_delivered_total = self._counter("events_delivered_total", "Events delivered.")
        self.events_retried_total = self._counter("events_retried_total", "Attempts that failed and will be repeated.")
        self.events_dead_total = self._counter("events_dead_total", "Events that ran out of attempts.")
        self.events_stale_total = self._counter(
            "events_stale_total", "Attempts whose lease had passed on before they were finished."
        )
        self.leases_expired_total = self._counter(
            "leases_expired_total", "Leases that had run out without a result when their events were claimed again."
        )
        self.events_released_total = self._counter(
            "events_released_total", "Events given back unattempted, as a stopping dispatcher does."
        )
        self.results_set_aside = self._gauge(
            "results_set_aside", "Results that wait for the end of another session's open transaction."
        )
        self.submissions_set_aside_total: Callable[[str], Counter] = cache(
            self._counter(
                "submissions_set_aside_total",
                "Submissions that had to wait for the end of another session's open transaction.",
                "channel",
            ).labels
        )
        self.event_slots_missed_total = self._counter(
            "event_slots_missed_total", "Slots under a rate limit that passed before their attempt could begin."
        )
        self.own_faults_total: Callable[[str], Counter] = cache(
            self._counter(
                "own_faults_total", "Attempts put off, and not spent, as this machine itself failed.", "fault"
            ).labels
        )
        self.database_reconnects_total = self._counter(
            "database_reconnects_total", "Times the database was found again after it was away."
        )

        self.commands_total: Callable[[str], Counter] = cache(
            self._counter("commands_total", "Commands read from Kafka: executed or rejected.", "result").labels
        )
        self.ingest_conflicts_total = self._counter(
            "ingest_conflicts_total", "Batches dropped because another consumer had read their records."
        )
        self.ingest_rebuilds_total = self._counter(
            "ingest_rebuilds_total", "Kafka consumers rebuilt because they had stopped moving."
        )
        self.ingest_batch_seconds = self._histograms(
            "ingest_batch_seconds", "How long batches from Kafka took to be kept.", DURATION_BUCKETS_S
        )()
        self.ingest_lag = self._gauge(
            "ingest_lag", "Records that wait in a partition assigned to this process.", "topic", "partition"
        )
        self.ingest_position = self._gauge(
            "ingest_position",
            "Offset up to which the records of a partition assigned to this process are kept.",
            "topic",
            "partition",
        )
        self.ingest_halted_partitions = self._gauge(
            "ingest_halted_partitions", "Partitions that wait for an operator's decision; the log says which.", "topic"
        )

        self.maintenance_problems_total: Callable[[str], Counter] = cache(
            self._counter(
                "maintenance_problems_total", "Steps of maintenance that failed in this process.", "step"
            ).labels
        )

        self.outbox_published_total = self._counter(
            "outbox_published_total", "Messages of the outbox that Kafka has acknowledged."
        )
        self.outbox_failed_total = self._counter(
            "outbox_failed_total", "Messages of the outbox that were set aside because no broker takes them."
        )

        self.event_lateness_seconds = self._histograms(
            "event_lateness_seconds", "Time from when an attempt was due until it began.", LATENESS_BUCKETS_S
        )()
        self.events_late_total = self._counter(
            "events_late_total",
            "Attempts that began over a second late, although no pause, breaker or limit held their event back.",
        )
        self.destination_attempts_total = DestinationAttempts(
            self.registry,
            f"{PREFIX}_destination_attempts_total",
            "Attempts that ended, by host and port or topic; beyond 50 of them in a process, all others are one.",
        )
        self.event_delivery_seconds: Callable[[str, str], Histogram] = self._histograms(
            "event_delivery_seconds", "How long attempts took.", DURATION_BUCKETS_S, "delivery_type", "outcome"
        )
        self.event_loop_lag_seconds = self._histograms(
            "event_loop_lag_seconds",
            "How late the event loop ran a timer, looked at once a second.",
            LATENESS_BUCKETS_S,
        )()
        self.claim_seconds = self._histograms("claim_seconds", "How long claims took.", DURATION_BUCKETS_S)()
        self.finish_seconds = self._histograms(
            "finish_seconds", "How long it took to record outcomes.", DURATION_BUCKETS_S
        )()
        self.http_request_seconds: Callable[[str, str, str], Histogram] = self._histograms(
            "http_request_seconds",
            "How long requests to the API took.",
            DURATION_BUCKETS_S,
            "route",
            "method",
            "status",
        )

        self.http_refusals_total: Callable[[str], Counter] = cache(
            self._counter(
                "http_refusals_total", "Requests and connections that the API refused before it read them.", "reason"
            ).labels
        )
        self.http_connections = self._gauge("http_connections", "Open connections of the API's clients.")

        self.tls_certificate_expiry_timestamp_seconds: Callable[[str], Gauge] = self._gauge(
            "tls_certificate_expiry_timestamp_seconds",
            "When the certificate of a listener ends, in Unix time; no series without TLS.",
            "listener",
        ).labels

        self.events_in_flight = self._gauge("events_in_flight", "Deliveries under way.")
        self.events_held = self._gauge("events_held", "Claimed events that wait in memory to become due.")
        self.events_backlog = self._gauge(
            "events_backlog", "Events that are due and not claimed, as a dispatcher last saw."
        )
        self.database_up = self._gauge(
            "database_up", "1 while the database answers what the metrics ask of it, else 0."
        )
        self.due_oldest_age_seconds = self._gauge(
            "due_oldest_age_seconds",
            "How long the oldest event has been due that waits for no pause, breaker or rate; NaN: unknown.",
        )
        self.events_due_soon = self._gauge(
            "events_due_soon", "Events that fall due within this time from now, up to 100,000; NaN: unknown.", "within"
        )
        self.xmin_horizon_age_seconds = self._gauge(
            "xmin_horizon_age_seconds", "Age of the oldest transaction that holds vacuum back; NaN: unknown."
        )
        self.xmin_horizon_age_transactions = self._gauge(
            "xmin_horizon_age_transactions",
            "Transactions since the oldest snapshot that holds vacuum back, replication slots included; NaN: unknown.",
        )
        self.timer_rows = self._gauge(
            "timer_rows", "Rows of the table of live events, by PostgreSQL's estimate; NaN: unknown.", "state"
        )
        self.timer_bytes = self._gauge("timer_bytes", "Size of the table of live events; NaN: unknown.", "part")
        self.database_size_bytes = self._gauge("database_size_bytes", "Size of the database; NaN: unknown.")
        self.database_connections = self._gauge(
            "database_connections", "Sessions on the database's server; NaN: unknown."
        )
        self.database_connections_max = self._gauge(
            "database_connections_max", "The server's max_connections; NaN: unknown."
        )
        self.destination_standstill_seconds = self._gauge(
            "destination_standstill_seconds",
            "How long a destination has been paused or its breaker open, for up to 50 of them.",
            "destination",
            "reason",
        )
        self.paused = self._gauge("paused", "1 while everything is paused, else 0; NaN while the database is away.")
        self.destinations_paused = self._gauge("destinations_paused", "Destinations that are paused by themselves.")
        self.lock_holders = self._gauge(
            "lock_holders", "Sessions that have held locks in a transaction for longer than 2 seconds; NaN: unknown."
        )
        self.breakers_open = self._gauge(
            "breakers_open", "Destinations whose circuit breaker is open, or is trying one event."
        )
        self.maintenance_age_seconds = self._gauge(
            "maintenance_age_seconds", "Time since maintenance last ran, in any process; NaN: unknown, or never."
        )
        self.maintenance_failing_steps = self._gauge(
            "maintenance_failing_steps", "Steps of maintenance that failed when it last ran."
        )
        self.partition_days_ahead = self._gauge("partition_days_ahead", "Days ahead that have partitions.")
        self.partitions_retired = self._gauge(
            "partitions_retired", "Partitions past retention that wait to be archived and dropped."
        )
        self.horizon_events = self._gauge(
            "horizon_events", "About how many events are due after the last partition, by PostgreSQL's estimate."
        )
        self.dead_letters = self._gauge("dead_letters", "Events that ran out of attempts, up to 10,000.")
        self.dead_letters_expiring = self._gauge(
            "dead_letters_expiring", "Those of them that retention drops within a day, up to 10,000."
        )
        # Without the prefix, as alerts of older installations know it.
        self.outbox_event_pending_total = Gauge(
            "outbox_event_pending_total",
            "Messages that wait in the outbox, up to 10,000; a gauge, whose name alerts of older installations know.",
            registry=self.registry,
        )
        self.outbox_oldest_age_seconds = self._gauge(
            "outbox_oldest_age_seconds", "How long the oldest message in the outbox has waited; NaN: unknown."
        )
        self.database_pool_size = self._gauge("database_pool_size", "Open database connections.")
        self.database_pool_in_use = self._gauge("database_pool_in_use", "Database connections in use.")
        self.database_pool_waiting = self._gauge(
            "database_pool_waiting", "Callers that wait for a database connection."
        )
        self.database_pool_max = self._gauge("database_pool_max", "Most database connections that may be open.")
        self.database_pool_requests_total = self._counter(
            "database_pool_requests_total", "Callers that asked for a database connection."
        )
        self.database_pool_waits_total = self._counter(
            "database_pool_waits_total", "Callers that had to wait for a database connection."
        )
        self.database_pool_wait_seconds_total = self._counter(
            "database_pool_wait_seconds_total", "How long callers have waited for database connections, in all."
        )
        self.database_pool_timeouts_total = self._counter(
            "database_pool_timeouts_total", "Callers that got no database connection in time."
        )
        self._pool_seen: dict[str, float] = {}

    def set_pool(self, stats: Mapping[str, int]) -> None:
        """Takes over what psycopg's pool says of itself, which counts from when it was opened; what it lacks is 0."""
        size = stats.get("pool_size", 0)
        self.database_pool_size.set(size)
        self.database_pool_max.set(stats.get("pool_max", 0))
        self.database_pool_in_use.set(size - stats.get("pool_available", 0))
        self.database_pool_waiting.set(stats.get("requests_waiting", 0))
        for name, counter, unit in (
            ("requests_num", self.database_pool_requests_total, 1),
            ("requests_queued", self.database_pool_waits_total, 1),
            ("requests_wait_ms", self.database_pool_wait_seconds_total, 1000),
            ("requests_errors", self.database_pool_timeouts_total, 1),
        ):
            total = stats.get(name, 0) / unit
            counter.inc(max(0.0, total - self._pool_seen.get(name, 0.0)))
            self._pool_seen[name] = total

    def set_standstills(self, paused: float, destinations_paused: float, breakers_open: float) -> None:
        self.paused.set(paused)
        self.destinations_paused.set(destinations_paused)
        self.breakers_open.set(breakers_open)

    def set_outbox(self, pending: float, oldest_s: float) -> None:
        """NaN: unknown."""
        self.outbox_event_pending_total.set(pending)
        self.outbox_oldest_age_seconds.set(oldest_s)

    def set_vital_signs(self, found: VitalSigns | None) -> None:
        """None: unknown, as in the methods below."""
        signs = [math.nan] * 9 if found is None else found
        for gauge, value in zip(
            (
                self.due_oldest_age_seconds,
                self.xmin_horizon_age_seconds,
                self.xmin_horizon_age_transactions,
                self.timer_rows.labels("live"),
                self.timer_rows.labels("dead"),
                self.timer_bytes.labels("table"),
                self.timer_bytes.labels("indexes"),
                self.database_connections,
                self.database_connections_max,
            ),
            signs,
            strict=True,
        ):
            gauge.set(value)

    def set_held_destinations(self, found: Sequence[HeldDestination] | None) -> None:
        self.destination_standstill_seconds.clear()
        for name, reason, held_s in found or ():
            self.destination_standstill_seconds.labels(name, reason).set(held_s)

    def set_outlook(self, found: Outlook | None) -> None:
        if found is None:
            self.events_due_soon.clear()
            self.database_size_bytes.set(math.nan)
            return
        for within, count in found.due.items():
            self.events_due_soon.labels(within).set(count)
        self.database_size_bytes.set(found.database_bytes)

    def set_condition(self, found: Condition | None) -> None:
        """Sets the gauges of maintenance."""
        unknown = math.nan
        self.maintenance_age_seconds.set(unknown if found is None or found.age_s is None else found.age_s)
        self.maintenance_failing_steps.set(unknown if found is None else len(found.problems))
        self.partition_days_ahead.set(unknown if found is None else found.days_ahead)
        self.partitions_retired.set(unknown if found is None else found.retired)
        self.horizon_events.set(unknown if found is None else found.horizon)
        self.dead_letters.set(unknown if found is None else found.dead_letters)
        self.dead_letters_expiring.set(unknown if found is None else found.expiring)

    def count_log_lines(self) -> None:
        """Counts from now on what this process logs as warning or worse."""
        logging.getLogger().addHandler(_LogLines(self.log_lines_total))

    def exposition(self, beside: Samples | None = None) -> tuple[bytes, str]:
        """All series as Prometheus reads them, and their content type.

        The series of the process `beside` this one are merged in, as if both were one.
        """
        return generate_latest(_Merged(self._labelled, beside) if beside else self._labelled), CONTENT_TYPE

    def samples(self) -> Samples:
        """All series, for merging with those of another process."""
        return {
            metric.name: [(sample.name, sample.labels, sample.value) for sample in metric.samples]
            for metric in self._labelled.collect()
        }

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(name, about, labels, namespace=PREFIX, registry=self.registry)

    def _gauge(self, name: str, about: str, *labels: str) -> Gauge:
        return Gauge(name, about, labels, namespace=PREFIX, registry=self.registry)

    def _histograms(self, name: str, about: str, bounds: tuple[float, ...], *labels: str) -> Callable[..., Histogram]:
        return Histograms(self.registry, f"{PREFIX}_{name}", about, bounds, labels).labelled


class _LogLines(logging.Handler):
    """Counts lines by their level."""

    def __init__(self, totals: Callable[[str], Counter]) -> None:
        super().__init__(logging.WARNING)
        self._totals = totals
        for level in ("warning", "error", "critical"):  # a counter that appears with its first line hides that line
            totals(level)

    def emit(self, record: logging.LogRecord) -> None:
        level = "critical" if record.levelno >= logging.CRITICAL else None
        self._totals(level or ("error" if record.levelno >= logging.ERROR else "warning")).inc()


class _Labelled(Collector):
    """Reads a registry and adds labels to every sample."""

    def __init__(self, registry: CollectorRegistry, labels: Mapping[str, str]) -> None:
        self._registry = registry
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            # The time a series began doubles the number of series and answers no question here.
            metric.samples = [
                sample._replace(labels={**self._labels, **sample.labels})
                for sample in metric.samples
                if not sample.name.endswith("_created")
            ]
            yield metric


class _Merged(Collector):
    """Adds the samples of another process."""

    def __init__(self, ours: Collector, theirs: Samples) -> None:
        self._ours = ours
        self._theirs = theirs

    def collect(self) -> Iterator[Metric]:
        for metric in self._ours.collect():
            theirs = {
                (name, *sorted(labels.items())): (name, labels, value)
                for name, labels, value in self._theirs.get(metric.name, ())
            }
            merged = []
            for sample in metric.samples:
                other = theirs.pop((sample.name, *sorted(sample.labels.items())), None)
                if other is not None:
                    merge: Callable[[float, float], float] = _MERGES.get(sample.name, operator.add)
                    sample = sample._replace(value=merge(sample.value, other[2]))
                merged.append(sample)
            metric.samples = merged + [Sample(*other) for other in theirs.values()]
            yield metric


_MERGES: dict[str, Callable[[float, float], float]] = {
    "orchestrator_build_info": max,
    "process_max_fds": max,
    "process_start_time_seconds": min,
}
"""How the two values of a series become one. All others are added: only one of the processes feeds a gauge."""


def _version() -> str:
    try:
        return version("scheduled-event-orchestrator")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "unknown"
