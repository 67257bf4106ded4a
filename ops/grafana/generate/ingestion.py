"""How events come in: over the API, and from Kafka."""

from __future__ import annotations

from ops.grafana.generate.dashboard import Row, dashboard
from ops.grafana.generate.panels import Json, Limits, Query, heat_map, lines, quantiles, stat


def content() -> Json:
    return dashboard(
        "ingestion",
        "How events come in: what clients ask of the API, what ingesters read from Kafka, and what is refused.",
        _now(),
        _intake(),
        _api(),
        _kafka(),
    )


def _now() -> Row:
    return Row(
        "Now",
        stat(
            "Received", "Submissions a second that APIs and ingesters received.", "ops",
            "sum(rate(orchestrator_events_received_total{}[]))",
        ),
        stat(
            "Persisted", "Events a second that were kept as new.", "ops",
            "sum(rate(orchestrator_events_persisted_total{}[]))",
        ),
        stat(
            "Rejected", "Share of submissions that were refused as invalid.", "percentunit",
            "sum(rate(orchestrator_events_rejected_total{}[])) / sum(rate(orchestrator_events_received_total{}[]))",
            Limits(0.01, 0.05), runbook="IngestRejectRate",
        ),
        stat(
            "API p99", "99 % of the requests to the API took at most this long.", "s",
            "histogram_quantile(0.99, sum by (le) (rate(orchestrator_http_request_seconds_bucket{}[])))",
            Limits(0.5, 2),
        ),
        stat(
            "API errors", "Requests a second that the API answered with 5xx.", "ops",
            'sum(rate(orchestrator_http_request_seconds_count{status=~"5.."}[]))', Limits(0.01, 0.1),
            runbook="HighErrorRate", noValue="0",
        ),
        stat(
            "Consumer lag", "Records that are in Kafka and not yet in the database.", "short",
            "sum(orchestrator_ingest_lag{})", Limits(10000, 100000), runbook="IngestLagGrowing",
        ),
        stat(
            "Halted partitions",
            "Partitions that wait for an operator's decision. The log says which, and which call ends it.",
            "short", "sum(orchestrator_ingest_halted_partitions{})", Limits(1, 1), runbook="IngestPositionStuck",
        ),
        stat(
            "Batch p99", "99 % of the batches from Kafka were kept within this time.", "s",
            "histogram_quantile(0.99, sum by (le) (rate(orchestrator_ingest_batch_seconds_bucket{}[])))", Limits(1, 5),
        ),
    )  # fmt: skip


def _intake() -> Row:
    return Row(
        "What comes in?",
        lines(
            "Received and persisted",
            "Events a second by channel. Received is above persisted by duplicates and rejects. What an API hands to "
            "Kafka is received over http and persisted over kafka.",
            "ops",
            Query("sum by (channel) (rate(orchestrator_events_received_total{}[]))", "received, {{channel}}"),
            Query("sum by (channel) (rate(orchestrator_events_persisted_total{}[]))", "persisted, {{channel}}"),
        ),
        lines(
            "Duplicates and rejects",
            "Submissions a second that repeated an event, and that were refused as invalid. Duplicates are harmless: "
            "a client sent the same event again.",
            "ops",
            Query("sum(rate(orchestrator_events_duplicate_total{}[]))", "duplicates"),
            Query("sum(rate(orchestrator_events_rejected_total{}[]))", "rejects"),
            runbook="IngestRejectRate",
        ),
        lines(
            "Set aside",
            "Submissions a second that had to wait because another session's open transaction locks their event.",
            "ops", Query("sum by (channel) (rate(orchestrator_submissions_set_aside_total{}[]))", "{{channel}}"),
        ),
    )  # fmt: skip


def _api() -> Row:
    return Row(
        "API",
        lines(
            "Requests by route", "Requests a second that the API answered.", "reqps",
            Query("sum by (method, route) (rate(orchestrator_http_request_seconds_count{}[]))", "{{method}} {{route}}"),
            stacked=True,
        ),
        lines(
            "Requests by status", "Requests a second by HTTP status. 4xx is the client's fault, 5xx is ours.", "reqps",
            Query("sum by (status) (rate(orchestrator_http_request_seconds_count{}[]))", "{{status}}"), stacked=True,
        ),
        lines(
            "Request time", "How long the API took to answer, over all routes.", "s",
            *quantiles("orchestrator_http_request_seconds"), limits=Limits(0.5, 2),
        ),
        heat_map(
            "Request times", "How many requests took how long. Two bands mean two kinds of requests.", "s",
            "sum by (le) (increase(orchestrator_http_request_seconds_bucket{}[]))",
        ),
        lines(
            "Connections", "Open connections of clients, to each process.", "short",
            Query("orchestrator_http_connections{}", "{{instance}}"), width=6,
        ),
        lines(
            "Refused unread",
            "Requests and connections a second that the API refused before it read them, by reason, such as too many "
            "connections or a head that is too large.",
            "ops", Query("sum by (reason) (rate(orchestrator_http_refusals_total{}[]))", "{{reason}}"), width=6,
        ),
    )  # fmt: skip


def _kafka() -> Row:
    return Row(
        "Kafka",
        lines(
            "Lag by partition", "The ten partitions with most records that are not yet in the database.", "short",
            Query("topk(10, orchestrator_ingest_lag{})", "{{topic}} {{partition}}"), runbook="IngestLagGrowing",
        ),
        lines(
            "Progress",
            "Records a second that each topic's position in the database moves on. 0 with a lag: it is stuck.",
            "ops", Query("sum by (topic) (deriv(orchestrator_ingest_position{}[]))", "{{topic}}"),
            runbook="IngestPositionStuck",
        ),
        lines(
            "Batch time", "How long batches from Kafka took to be kept, in one transaction each.", "s",
            *quantiles("orchestrator_ingest_batch_seconds"),
        ),
        lines(
            "Commands", "Commands a second that were read from the processing topic.", "ops",
            Query("sum by (result) (rate(orchestrator_commands_total{}[]))", "{{result}}"),
        ),
        lines(
            "Conflicts and rebuilds",
            "Batches a second that were dropped because another consumer had read them, and consumers that were built "
            "anew. Both are normal while consumers come and go.",
            "ops",
            Query("sum(rate(orchestrator_ingest_conflicts_total{}[]))", "conflicts"),
            Query("sum(rate(orchestrator_ingest_rebuilds_total{}[]))", "rebuilds"),
        ),
        lines(
            "Halted partitions by topic", "Partitions that wait for an operator's decision, by topic.", "short",
            Query("sum by (topic) (orchestrator_ingest_halted_partitions{})", "{{topic}}"),
            runbook="IngestPositionStuck",
        ),
    )  # fmt: skip
