"""Where events go: which receiver fails, which is slow, and what waits for it."""

from __future__ import annotations

from ops.grafana.generate.dashboard import Row, dashboard
from ops.grafana.generate.panels import Json, Limits, Query, heat_map, lines, quantiles, stat, table

_ATTEMPTS = 'orchestrator_destination_attempts_total{destination=~"$destination"}'
_FAILED = 'orchestrator_destination_attempts_total{destination=~"$destination",outcome!="delivered"}'


def content() -> Json:
    return dashboard(
        "destinations",
        "Where events go: which receiver fails, which is slow, and what waits for it.",
        _now(),
        _by_destination(),
        _attempts(),
        _after(),
        by=("destination",),
    )


def _now() -> Row:
    return Row(
        "Now",
        stat("Attempts", "Attempts a second that ended.", "ops", f"sum(rate({_ATTEMPTS}[]))"),
        stat(
            "Failed", "Share of the attempts that failed, whether they will be repeated or not.", "percentunit",
            f"sum(rate({_FAILED}[])) / sum(rate({_ATTEMPTS}[]))", Limits(0.05, 0.25), noValue="0 %",
        ),
        stat(
            "Breakers open", "Destinations whose circuit breaker is open, or is trying one event.", "short",
            "sum(max by() (orchestrator_breakers_open{}))", Limits(1, 10), runbook="BreakerOpen",
        ),
        stat(
            "Paused", "Destinations that an operator has paused.", "short",
            "sum(max by() (orchestrator_destinations_paused{}))", Limits(1, 10), runbook="PausedForLong",
        ),
        stat(
            "All paused", "Deployments that are paused as a whole.", "short", "sum(max by() (orchestrator_paused{}))",
            Limits(1, 1), runbook="PausedForLong",
        ),
        stat(
            "Dead letters", "Events that ran out of attempts, counted up to 10,000.", "short",
            "sum(max by() (orchestrator_dead_letters{}))", Limits(1, 1000), runbook="DeadLettersGrowing",
        ),
        stat(
            "Dead letters to expire", "Dead letters that retention drops within a day, counted up to 10,000.", "short",
            "sum(max by() (orchestrator_dead_letters_expiring{}))", Limits(1, 1), runbook="DeadLettersExpiring",
        ),
        stat(
            "Being delivered", "Deliveries under way in all dispatchers.", "short",
            "sum(orchestrator_events_in_flight{})",
        ),
    )  # fmt: skip


def _by_destination() -> Row:
    return Row(
        "Which destination?",
        lines(
            "Attempts by destination", "The ten busiest destinations: attempts a second, whatever their outcome.",
            "ops",
            Query(f"topk(10, sum by (destination) (rate({_ATTEMPTS}[])))", "{{destination}}"), stacked=True,
        ),
        lines(
            "Failed attempts", "The ten destinations with most failures: attempts a second that failed.", "ops",
            Query(f"topk(10, sum by (destination) (rate({_FAILED}[])))", "{{destination}}"), stacked=True,
        ),
        lines(
            "Share that failed", "The ten destinations that fail most often, as a share of their own attempts.",
            "percentunit",
            Query(
                f"topk(10, sum by (destination) (rate({_FAILED}[])) / sum by (destination) (rate({_ATTEMPTS}[])))",
                "{{destination}}",
            ),
            limits=Limits(0.05, 0.5),
        ),
        table(
            "Standing still",
            "Destinations that get nothing: for how long, and whether their breaker is open or an operator has paused "
            "them. `orchestrator destinations list` shows their limits too.",
            "s",
            'max by(destination, reason) (orchestrator_destination_standstill_seconds{destination=~"$destination"})',
        ),
        lines(
            "Standing still for", "For how long each destination has had an open breaker or has been paused.", "s",
            Query(
                "max by (destination, reason) "
                '(orchestrator_destination_standstill_seconds{destination=~"$destination"})',
                "{{destination}} {{reason}}",
            ),
            width=12, runbook="BreakerOpen",
        ),
    )  # fmt: skip


def _attempts() -> Row:
    return Row(
        "Attempts",
        heat_map(
            "Delivery times", "How many attempts took how long. A line at the time-out is a receiver that hangs.", "s",
            "sum by (le) (increase(orchestrator_event_delivery_seconds_bucket{}[]))",
        ),
        lines(
            "Delivery time by type", "How long attempts over HTTP and Kafka took, whatever their outcome.", "s",
            *quantiles("orchestrator_event_delivery_seconds", "delivery_type"), width=12,
        ),
        lines(
            "Delivery time p99 by outcome",
            "How long attempts took that delivered, will be repeated, or failed for good.",
            "s", quantiles("orchestrator_event_delivery_seconds", "outcome")[-1],
        ),
        lines(
            "Repeated and dead", "Events a second whose attempt failed and is repeated, and that ran out of attempts.",
            "ops",
            Query("sum(rate(orchestrator_events_retried_total{}[]))", "repeated"),
            Query("sum(rate(orchestrator_events_dead_total{}[]))", "dead"),
            runbook="DeadLettersGrowing",
        ),
        lines(
            "Leases that did not end well",
            "Events a second whose lease ran out without a result, that came too late with one, or that a stopping "
            "dispatcher handed back.",
            "ops",
            Query("sum(rate(orchestrator_leases_expired_total{}[]))", "ran out"),
            Query("sum(rate(orchestrator_events_stale_total{}[]))", "result came too late"),
            Query("sum(rate(orchestrator_events_released_total{}[]))", "handed back"),
            runbook="LeaseExpiriesHigh",
        ),
    )  # fmt: skip


def _after() -> Row:
    return Row(
        "Limits, dead letters and outbox",
        lines(
            "Missed slots", "Slots under a rate limit, a second, that passed before their attempt could begin.", "ops",
            Query("sum by() (rate(orchestrator_event_slots_missed_total{}[]))"),
        ),
        lines(
            "Dead letters over time",
            "Events that ran out of attempts, and those of them that retention drops within a day.",
            "short",
            Query("sum(max by() (orchestrator_dead_letters{}))", "dead letters"),
            Query("sum(max by() (orchestrator_dead_letters_expiring{}))", "dropped within a day"),
            runbook="DeadLettersExpiring",
        ),
        lines(
            "Outbox", "Messages a second that Kafka has acknowledged, and that no broker takes.", "ops",
            Query("sum(rate(orchestrator_outbox_published_total{}[]))", "published"),
            Query("sum(rate(orchestrator_outbox_failed_total{}[]))", "refused"),
            runbook="OutboxLag",
        ),
        lines(
            "Outbox: what waits", "Messages that wait to be published, counted up to 10,000.", "short",
            Query("max by() (outbox_event_pending_total{})"), limits=Limits(100, 1000), width=12, runbook="OutboxLag",
        ),
        lines(
            "Outbox: oldest message", "How long the oldest message has waited.", "s",
            Query("max by() (orchestrator_outbox_oldest_age_seconds{})"), limits=Limits(30, 120), width=12,
            runbook="OutboxLag",
        ),
    )  # fmt: skip
