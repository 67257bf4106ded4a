"""The dashboard for whoever is on call: is anything late, what waits, and what holds it back."""

from __future__ import annotations

from ops.grafana.generate.dashboard import Row, dashboard
from ops.grafana.generate.panels import Json, Limits, Query, heat_map, lines, quantiles, stat, table


def content() -> Json:
    return dashboard(
        "overview",
        "Is anything late, what waits, and what holds it back. Read it from the top.",
        _now(),
        _on_time(),
        _throughput(),
        _waiting(),
        _held_back(),
        _processes(),
    )


def _now() -> Row:
    return Row(
        "Now",
        stat(
            "Alerts that fire", "How many alerts fire now. The table below names them.", "short",
            'count(ALERTS{alertstate="firing"})', Limits(1, 3), noValue="0",
        ),
        stat(
            "On time, last hour",
            "Share of attempts that did not begin more than 1 s late. A delay by a pause, a breaker or a limit does "
            "not count as late. The objective is 99 %.",
            "percentunit",
            "1 - sum(increase(orchestrator_events_late_total{}[1h]))"
            " / sum(increase(orchestrator_event_lateness_seconds_count{}[1h]))",
            Limits(0.995, 0.99, low=True), runbook="DeliveryLatenessBurnFast", max=1,
        ),
        stat(
            "Lateness p99", "99 % of attempts began within this time after they were due.", "s",
            "histogram_quantile(0.99, sum by (le) (rate(orchestrator_event_lateness_seconds_bucket{}[])))",
            Limits(0.5, 1),
        ),
        stat(
            "Oldest due event", "How long the oldest event has been due that no pause and no breaker holds back.", "s",
            "max(orchestrator_due_oldest_age_seconds{})", Limits(10, 60), runbook="DueBacklogOldestAge",
        ),
        stat(
            "Backlog", "Events that are due and not claimed, as dispatchers last saw.", "short",
            "sum(max by() (orchestrator_events_backlog{}))", Limits(1000, 10000), runbook="DueBacklogOldestAge",
        ),
        stat(
            "Held back", "Destinations that are paused or whose circuit breaker is open.", "short",
            "sum(max by() (orchestrator_breakers_open{})) + sum(max by() (orchestrator_destinations_paused{}))",
            Limits(1, 10), runbook="BreakerOpen",
        ),
        stat(
            "Dead letters", "Events that ran out of attempts and wait for a decision, counted up to 10,000.", "short",
            "sum(max by() (orchestrator_dead_letters{}))", Limits(1, 1000), runbook="DeadLettersGrowing",
        ),
        stat(
            "Databases", "The database that is worst off: up means that it answers at least one process.", "short",
            "min(max by() (orchestrator_database_up{}))", Limits(1, 1, low=True),
            mappings=[{"type": "value", "options": {"0": {"text": "away"}, "1": {"text": "up"}}}],
        ),
    )  # fmt: skip


def _on_time() -> Row:
    return Row(
        "Is it on time?",
        heat_map(
            "Lateness of attempts",
            "Each column is a moment, each row a span of lateness, and the colour says how many attempts began that "
            "late. A healthy system is a band at the bottom. The band climbs when dispatchers fall behind.",
            "s",
            "sum by (le) (increase(orchestrator_event_lateness_seconds_bucket{}[]))",
        ),
        table(
            "Which alerts fire", "Every alert that fires now, with its severity. Each has a runbook of its name.",
            "short",
            'ALERTS{alertstate="firing"}', "Value", "alertstate", "instance",
        ),
        lines(
            "Lateness", "Time from when an attempt was due until it began, over all processes.", "s",
            *quantiles("orchestrator_event_lateness_seconds"), limits=Limits(0.5, 1),
        ),
        lines(
            "Delivery time", "How long attempts took, whatever their outcome.", "s",
            *quantiles("orchestrator_event_delivery_seconds"),
        ),
        lines(
            "Late attempts",
            "Share of attempts that began more than 1 s late, though no pause, breaker or limit held them back. Above "
            "1 % the error budget shrinks.",
            "percentunit",
            Query(
                "sum by() (rate(orchestrator_events_late_total{}[]))"
                " / sum by() (rate(orchestrator_event_lateness_seconds_count{}[]))"
            ),
            limits=Limits(0.01, 0.144), runbook="DeliveryLatenessBurnFast",
        ),
    )  # fmt: skip


def _throughput() -> Row:
    return Row(
        "What flows?",
        lines(
            "Throughput",
            "Events a second: received, kept as new events, delivered, and failed. An event that goes from the API "
            "through Kafka is received twice: by the API and by the ingester.",
            "ops",
            Query("sum(rate(orchestrator_events_received_total{}[]))", "received"),
            Query("sum(rate(orchestrator_events_persisted_total{}[]))", "persisted"),
            Query("sum(rate(orchestrator_events_delivered_total{}[]))", "delivered"),
            Query("sum(rate(orchestrator_events_retried_total{}[]))", "failed, to be repeated"),
            Query("sum(rate(orchestrator_events_dead_total{}[]))", "failed for good"),
        ),
        lines(
            "Attempts by delivery type", "Attempts a second that ended, over HTTP and Kafka, by outcome.", "ops",
            Query(
                "sum by (delivery_type, outcome) (rate(orchestrator_event_delivery_seconds_count{}[]))",
                "{{delivery_type}} {{outcome}}",
            ),
            stacked=True,
        ),
        lines(
            "Attempts by destination", "The ten busiest destinations: attempts a second, whatever their outcome.",
            "ops",
            Query(
                "topk(10, sum by (destination) (rate(orchestrator_destination_attempts_total{}[])))", "{{destination}}"
            ),
            stacked=True,
        ),
    )  # fmt: skip


def _waiting() -> Row:
    return Row(
        "What waits?",
        lines(
            "Backlog and work in hand",
            "Events that are due and not claimed, that dispatchers keep in memory until they are due, and that are "
            "being delivered.",
            "short",
            Query("sum(max by() (orchestrator_events_backlog{}))", "due, not claimed"),
            Query("sum(orchestrator_events_held{})", "held until due"),
            Query("sum(orchestrator_events_in_flight{})", "being delivered"),
        ),
        lines(
            "Herd forecast",
            "Events that fall due within the next minute, ten minutes and hour, counted up to 100,000 each. The "
            "command `orchestrator forecast` says when each destination will have taken them.",
            "short",
            Query("sum by (within) (max by(within) (orchestrator_events_due_soon{}))", "within {{within}}"),
        ),
        lines(
            "Consumer lag", "Records of each topic that are in Kafka and not yet in the database.", "short",
            Query("sum by (topic) (orchestrator_ingest_lag{})", "{{topic}}"), runbook="IngestLagGrowing",
        ),
    )  # fmt: skip


def _held_back() -> Row:
    return Row(
        "What holds it back?",
        lines(
            "Breakers and pauses",
            "Destinations with an open circuit breaker, paused destinations, and deployments that are paused as a "
            "whole.",
            "short",
            Query("sum(max by() (orchestrator_breakers_open{}))", "breakers open"),
            Query("sum(max by() (orchestrator_destinations_paused{}))", "destinations paused"),
            Query("sum(max by() (orchestrator_paused{}))", "deployments paused"),
            runbook="BreakerOpen",
        ),
        lines(
            "Database pool", "The fullest pool of each deployment: connections in use, of those that it may open.",
            "percentunit", Query("max by() (orchestrator_database_pool_in_use{} / orchestrator_database_pool_max{})"),
            limits=Limits(0.8, 0.95), runbook="PoolExhausted",
        ),
        lines(
            "Outbox", "Messages for Kafka that wait to be published, counted up to 10,000.", "short",
            Query("max by() (outbox_event_pending_total{})"), limits=Limits(100, 1000), runbook="OutboxLag",
        ),
        lines(
            "Partitions ahead", "Days ahead that have partitions. Maintenance makes them.", "d",
            Query("max by() (orchestrator_partition_days_ahead{})"), limits=Limits(7, 2, low=True),
            runbook="PartitionsAheadLow",
        ),
        lines(
            "Maintenance", "Time since maintenance last ran, in any process.", "s",
            Query("max by() (orchestrator_maintenance_age_seconds{})"), limits=Limits(300, 1800),
            runbook="MaintenanceStopped",
        ),
        lines(
            "Warnings and errors", "Lines a second in the logs, by level.", "ops",
            Query("sum by (level) (rate(orchestrator_log_lines_total{}[]))", "{{level}}"), stacked=True,
            runbook="HighErrorRate",
        ),
    )  # fmt: skip


def _processes() -> Row:
    return Row(
        "Processes",
        lines(
            "CPU", "Cores that each process uses. One process of Python seldom uses more than 1.", "short",
            Query("rate(process_cpu_seconds_total{}[])", "{{instance}}"), width=6,
        ),
        lines(
            "Memory", "Resident memory of each process.", "bytes",
            Query("process_resident_memory_bytes{}", "{{instance}}"), width=6,
        ),
        lines(
            "File descriptors", "Open file descriptors of each process, of those that it may open.", "percentunit",
            Query("process_open_fds{} / process_max_fds{}", "{{instance}}"), width=6, limits=Limits(0.7, 0.9),
        ),
        lines(
            "Event loop",
            "99 % of the timers of an event loop ran at most this late. Late timers make late deliveries.", "s",
            Query(
                "histogram_quantile(0.99, sum by (le, instance) "
                "(rate(orchestrator_event_loop_lag_seconds_bucket{}[])))",
                "{{instance}}",
            ),
            width=6, limits=Limits(0.05, 0.5),
        ),
        table(
            "Versions", "How many processes run, by role and version.", "short",
            "count by(role, version, python) (orchestrator_build_info{})",
        ),
        lines(
            "Faults of this machine",
            "Attempts a second that were put off, and not spent, because the machine of the dispatcher failed: no "
            "file descriptor, no DNS, no memory. No line: none since the process started.",
            "ops", Query("sum by (fault) (rate(orchestrator_own_faults_total{}[]))", "{{fault}}"), width=12,
        ),
    )  # fmt: skip
