"""PostgreSQL as this product sees it: calls, connections, and what keeps vacuum and maintenance from working."""

from __future__ import annotations

from ops.grafana.generate.dashboard import Row, dashboard
from ops.grafana.generate.panels import Json, Limits, Query, lines, quantiles, stat


def content() -> Json:
    return dashboard(
        "database",
        "PostgreSQL as the product sees it: its calls, its connections, vacuum and maintenance.",
        _now(),
        _calls(),
        _connections(),
        _vacuum(),
        _maintenance(),
    )


def _now() -> Row:
    return Row(
        "Now",
        stat(
            "Databases", "The database that is worst off: up means that it answers at least one process.", "short",
            "min(max by() (orchestrator_database_up{}))", Limits(1, 1, low=True),
            mappings=[{"type": "value", "options": {"0": {"text": "away"}, "1": {"text": "up"}}}],
        ),
        stat(
            "Connections", "Sessions on the fullest server, of max_connections.", "percentunit",
            "max(max by() (orchestrator_database_connections{}) / max by() (orchestrator_database_connections_max{}))",
            Limits(0.7, 0.9), runbook="ConnectionsHigh",
        ),
        stat(
            "Fullest pool", "Connections that a process uses, of those that it may open.", "percentunit",
            "max(orchestrator_database_pool_in_use{} / orchestrator_database_pool_max{})", Limits(0.8, 0.95),
            runbook="PoolExhausted",
        ),
        stat(
            "Oldest transaction", "Age of the oldest transaction that keeps vacuum from removing dead rows.", "s",
            "max(orchestrator_xmin_horizon_age_seconds{})", Limits(600, 1800), runbook="XminHorizonOld",
        ),
        stat(
            "Dead timer rows", "Share of the rows of the table of live events that vacuum has still to remove.",
            "percentunit",
            'sum(max by() (orchestrator_timer_rows{state="dead"}))'
            " / clamp_min(sum(max by(state) (orchestrator_timer_rows{})), 1)",
            Limits(0.3, 0.5), runbook="TimerBloat",
        ),
        stat("Size", "Size of all databases.", "bytes", "sum(max by() (orchestrator_database_size_bytes{}))"),
        stat(
            "Partitions ahead", "Days ahead that have partitions, in the database with fewest.", "d",
            "min(max by() (orchestrator_partition_days_ahead{}))", Limits(7, 2, low=True), runbook="PartitionsAheadLow",
        ),
        stat(
            "Maintenance", "Time since maintenance last ran, in the database where that is longest ago.", "s",
            "max(max by() (orchestrator_maintenance_age_seconds{}))", Limits(300, 1800), runbook="MaintenanceStopped",
        ),
    )  # fmt: skip


def _calls() -> Row:
    return Row(
        "Calls",
        lines(
            "Claim", "How long a call of claim_due_events() took.", "s", *quantiles("orchestrator_claim_seconds"),
            runbook="ClaimStalled",
        ),
        lines("Finish", "How long it took to record outcomes.", "s", *quantiles("orchestrator_finish_seconds")),
        lines(
            "Events a claim",
            "How many events a claim gave on average. Few and many claims: the flow is thin, or limited.",
            "short",
            Query(
                "sum by() (rate(orchestrator_events_claimed_total{}[]))"
                " / sum by() (rate(orchestrator_claim_seconds_count{}[]))"
            ),
        ),
    )  # fmt: skip


def _connections() -> Row:
    return Row(
        "Connections",
        lines(
            "Pool", "Connections of each process that are open and in use.", "short",
            Query("orchestrator_database_pool_size{}", "open, {{instance}}"),
            Query("orchestrator_database_pool_in_use{}", "in use, {{instance}}"),
            runbook="PoolExhausted",
        ),
        lines(
            "Waiting for the pool", "Callers that wait for a connection now, and that got none in time, a second.",
            "short",
            Query("sum by() (orchestrator_database_pool_waiting{})", "waiting, {{deployment}} {{environment}}"),
            Query("sum by() (rate(orchestrator_database_pool_timeouts_total{}[]))",
            "timed out a second, {{deployment}}"),
            runbook="PoolExhausted",
        ),
        lines(
            "Time to get a connection",
            "How long a caller waited on average, counting those that did not have to wait.", "s",
            Query(
                "sum by() (rate(orchestrator_database_pool_wait_seconds_total{}[]))"
                " / sum by() (rate(orchestrator_database_pool_requests_total{}[]))"
            ),
        ),
        lines(
            "Callers that waited", "Share of the callers that had to wait for a connection.", "percentunit",
            Query(
                "sum by() (rate(orchestrator_database_pool_waits_total{}[]))"
                " / sum by() (rate(orchestrator_database_pool_requests_total{}[]))"
            ),
        ),
        lines(
            "Sessions on the server", "Sessions of all databases on each deployment's server, of max_connections.",
            "percentunit",
            Query("max by() (orchestrator_database_connections{}) / max by() "
            "(orchestrator_database_connections_max{})"),
            limits=Limits(0.7, 0.9), runbook="ConnectionsHigh",
        ),
        lines(
            "Reconnects", "How often a process found the database again after it was away.", "short",
            Query("sum by() (increase(orchestrator_database_reconnects_total{}[]))"),
        ),
    )  # fmt: skip


def _vacuum() -> Row:
    return Row(
        "Vacuum and locks",
        lines(
            "Age of the oldest transaction", "Age of the oldest transaction that keeps vacuum from removing dead rows.",
            "s",
            Query("max by() (orchestrator_xmin_horizon_age_seconds{})"), limits=Limits(600, 1800),
            runbook="XminHorizonOld",
        ),
        lines(
            "Oldest snapshot", "How many transactions ago the oldest snapshot began, with those of replication slots.",
            "short",
            Query("max by() (orchestrator_xmin_horizon_age_transactions{})"), runbook="XminHorizonOld",
        ),
        lines(
            "Live and dead timers",
            "Rows of the table of live events, by PostgreSQL's estimate. Live: events scheduled now.",
            "short", Query("sum by (state) (max by(state) (orchestrator_timer_rows{}))", "{{state}}"),
            runbook="TimerBloat",
        ),
        lines(
            "Size of the timers", "Size of the table of live events, which every claim reads, and of its indexes.",
            "bytes",
            Query("sum by (part) (max by(part) (orchestrator_timer_bytes{}))", "{{part}}"), stacked=True,
            runbook="TimerBloat",
        ),
        lines(
            "Database", "Size of each deployment's database.", "bytes",
            Query("max by() (orchestrator_database_size_bytes{})"),
        ),
        lines(
            "Held up by open transactions",
            "Sessions that have held locks for longer than 2 s, and what waits for the end of such a transaction.",
            "short",
            Query("sum(max by() (orchestrator_lock_holders{}))", "sessions that hold locks"),
            Query("sum(orchestrator_results_set_aside{})", "results that wait"),
            runbook="TransactionLeftOpen",
        ),
    )  # fmt: skip


def _maintenance() -> Row:
    return Row(
        "Maintenance, backup and replica",
        lines(
            "Partitions", "Days ahead that have partitions, and old partitions that wait to be archived and dropped.",
            "short",
            Query("max by() (orchestrator_partition_days_ahead{})", "days ahead, {{deployment}} {{environment}}"),
            Query("max by() (orchestrator_partitions_retired{})", "to be dropped, {{deployment}} {{environment}}"),
            runbook="PartitionsAheadLow",
        ),
        lines(
            "Far events", "About how many events are due after the last partition, by PostgreSQL's estimate.", "short",
            Query("max by() (orchestrator_horizon_events{})"),
        ),
        lines(
            "Failing steps", "Steps of maintenance that failed when it last ran.", "short",
            Query("max by() (orchestrator_maintenance_failing_steps{})"), limits=Limits(1, 1),
            runbook="MaintenanceFailing",
        ),
        lines(
            "Failures by step", "Failures of each step of maintenance. No line: none since the process started.",
            "short",
            Query("sum by (step) (increase(orchestrator_maintenance_problems_total{}[]))", "{{step}}"),
            runbook="MaintenanceFailing",
        ),
        lines(
            "Age of the last good backup",
            "By kind of backup: logical dump, base backup, archived WAL. No line: not set up.",
            "s",
            Query(
                "time() - max by(kind) (orchestrator_backup_last_success_timestamp_seconds{})",
                "{{kind}}, {{deployment}} {{environment}}",
            ),
            runbook="BackupTooOld",
        ),
        lines(
            "Lag of the read replica", "How far the replica of DATABASE_READ_URL is behind. No line: there is none.",
            "s",
            Query(
                "max by(replica) (orchestrator_read_replica_lag_seconds{})",
                "{{replica}}, {{deployment}} {{environment}}",
            ),
            limits=Limits(10, 60), runbook="ReadReplicaBehind",
        ),
    )  # fmt: skip
