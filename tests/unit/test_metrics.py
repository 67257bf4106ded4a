from __future__ import annotations

import logging
import math

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from orchestrator.database.maintenance import Condition
from orchestrator.database.vital_signs import HeldDestination, Outlook, VitalSigns
from orchestrator.destination_attempts import MOST_DESTINATIONS, OTHER, DestinationAttempts
from orchestrator.metrics import LATENESS_BUCKETS_S, Metrics
from orchestrator.settings import Settings

SETTINGS = Settings.from_env({"DEPLOYMENT_NAME": "event-scheduler-ocean", "CUSTOMER_NAME": "ocean"})
SPEAKER = {"deployment": "event-scheduler-ocean", "customer": "ocean", "environment": "development"}


def families(metrics: Metrics) -> dict[str, Metric]:
    body, content_type = metrics.exposition()
    assert content_type.startswith("text/plain; version=0.0.4")
    return {family.name: family for family in text_string_to_metric_families(body.decode())}


def samples(metrics: Metrics) -> list[Sample]:
    return [sample for family in families(metrics).values() for sample in family.samples]


def value(metrics: Metrics, name: str, **labels: str) -> float:
    (found,) = [s.value for s in samples(metrics) if s.name == name and s.labels == {**SPEAKER, **labels}]
    return found


def feed_everything(metrics: Metrics) -> None:
    metrics.log_lines_total("error").inc()
    metrics.destination_attempts_total.count("HTTP", "receiver.example", "delivered")
    metrics.set_vital_signs(VitalSigns(*range(9)))
    metrics.set_held_destinations([HeldDestination("receiver.example", "breaker", 5.0)])
    metrics.set_outlook(Outlook({"1m": 1}, 8))
    metrics.events_received_total("http").inc()
    metrics.event_delivery_seconds("HTTP", "delivered").observe(0.1)
    metrics.http_request_seconds("/api/v1/events", "POST", "202").observe(0.1)
    metrics.maintenance_problems_total("horizon_moved").inc()


def test_every_series_names_its_customer_and_process() -> None:
    metrics = Metrics(SETTINGS)
    feed_everything(metrics)
    found = samples(metrics)
    assert any(sample.name == "process_cpu_seconds_total" for sample in found)
    for sample in found:
        assert SPEAKER.items() <= sample.labels.items(), sample


def test_every_metric_is_prefixed_and_explained() -> None:
    metrics = Metrics(SETTINGS)
    feed_everything(metrics)
    for name, family in families(metrics).items():
        assert name.startswith(("orchestrator_", "process_")) or name == "outbox_event_pending_total"
        assert family.documentation.endswith(".")


def test_counted_values_can_be_read_from_the_metrics() -> None:
    metrics = Metrics(SETTINGS)
    metrics.events_received_total("http").inc(500)
    metrics.events_received_total("http").inc()
    metrics.events_claimed_total.inc(100)
    metrics.events_in_flight.set(7)
    assert value(metrics, "orchestrator_events_received_total", channel="http") == 501
    assert value(metrics, "orchestrator_events_claimed_total") == 100
    assert value(metrics, "orchestrator_events_dead_total") == 0
    assert value(metrics, "orchestrator_events_in_flight") == 7


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), max_size=20))
def test_the_buckets_of_lateness_count_what_is_at_most_their_bound(lateness_s: list[float]) -> None:
    metrics = Metrics(SETTINGS)
    for one in lateness_s:
        metrics.event_lateness_seconds.observe(one)
    found = {
        float(sample.labels["le"]): sample.value
        for sample in samples(metrics)
        if sample.name == "orchestrator_event_lateness_seconds_bucket"
    }
    assert found == {bound: sum(one <= bound for one in lateness_s) for bound in (*LATENESS_BUCKETS_S, float("inf"))}


def test_a_label_with_several_values_gives_a_series_for_each() -> None:
    metrics = Metrics(SETTINGS)
    for status in ("202", "400", "202"):
        metrics.http_request_seconds("/api/v1/events", "POST", status).observe(0.01)
    labels = {"route": "/api/v1/events", "method": "POST"}
    assert value(metrics, "orchestrator_http_request_seconds_count", **labels, status="202") == 2
    assert value(metrics, "orchestrator_http_request_seconds_count", **labels, status="400") == 1


def test_the_metrics_of_the_pool_count_connections_open_used_and_waited_for() -> None:
    metrics = Metrics(SETTINGS)
    metrics.set_pool({"pool_size": 10, "pool_available": 4, "requests_waiting": 3})
    assert value(metrics, "orchestrator_database_pool_size") == 10
    assert value(metrics, "orchestrator_database_pool_in_use") == 6
    assert value(metrics, "orchestrator_database_pool_waiting") == 3
    metrics.set_pool({"pool_size": 2, "pool_available": 2})
    assert value(metrics, "orchestrator_database_pool_waiting") == 0


def test_what_the_pool_has_counted_so_far_is_counted_once() -> None:
    metrics = Metrics(SETTINGS)
    told = {"pool_max": 50, "requests_num": 100, "requests_queued": 7, "requests_wait_ms": 1500, "requests_errors": 2}
    for _ in range(2):
        metrics.set_pool(told)
        assert value(metrics, "orchestrator_database_pool_max") == 50
        assert value(metrics, "orchestrator_database_pool_requests_total") == 100
        assert value(metrics, "orchestrator_database_pool_waits_total") == 7
        assert value(metrics, "orchestrator_database_pool_wait_seconds_total") == 1.5
        assert value(metrics, "orchestrator_database_pool_timeouts_total") == 2
    metrics.set_pool(told | {"requests_num": 103})
    assert value(metrics, "orchestrator_database_pool_requests_total") == 103


def test_the_state_of_the_database_is_told_or_is_unknown() -> None:
    metrics = Metrics(SETTINGS)
    metrics.set_vital_signs(VitalSigns(61.5, 3600.0, 90_000, 1_000_000, 5000, 1 << 30, 1 << 29, 40, 100))
    found: dict[tuple[str, str, str], float] = {
        ("due_oldest_age_seconds", "", ""): 61.5,
        ("xmin_horizon_age_seconds", "", ""): 3600.0,
        ("xmin_horizon_age_transactions", "", ""): 90_000,
        ("timer_rows", "state", "live"): 1_000_000,
        ("timer_rows", "state", "dead"): 5000,
        ("timer_bytes", "part", "table"): 1 << 30,
        ("timer_bytes", "part", "indexes"): 1 << 29,
        ("database_connections", "", ""): 40,
        ("database_connections_max", "", ""): 100,
    }

    def shown() -> dict[tuple[str, str, str], float]:
        return {
            (name, label, of): value(metrics, f"orchestrator_{name}", **({label: of} if label else {}))
            for name, label, of in found
        }

    assert shown() == found
    metrics.set_vital_signs(None)
    assert all(math.isnan(each) for each in shown().values())


def test_a_destination_that_is_held_no_more_has_no_series() -> None:
    metrics = Metrics(SETTINGS)
    name = "orchestrator_destination_standstill_seconds"
    metrics.set_held_destinations(
        [HeldDestination("a.example", "paused", 5), HeldDestination("b.example", "breaker", 3)]
    )
    assert value(metrics, name, destination="a.example", reason="paused") == 5
    assert value(metrics, name, destination="b.example", reason="breaker") == 3
    metrics.set_held_destinations([HeldDestination("b.example", "breaker", 18)])
    assert [(s.labels["destination"], s.value) for s in samples(metrics) if s.name == name] == [("b.example", 18)]
    metrics.set_held_destinations(None)
    assert not [s for s in samples(metrics) if s.name == name]


def test_a_forecast_that_is_not_known_any_more_has_no_series() -> None:
    metrics = Metrics(SETTINGS)
    metrics.set_outlook(Outlook({"1m": 5, "10m": 700, "1h": 100_000}, 1 << 33))
    assert value(metrics, "orchestrator_events_due_soon", within="10m") == 700
    assert value(metrics, "orchestrator_database_size_bytes") == 1 << 33
    metrics.set_outlook(None)
    assert not [s for s in samples(metrics) if s.name == "orchestrator_events_due_soon"]
    assert math.isnan(value(metrics, "orchestrator_database_size_bytes"))


def test_lines_that_are_logged_as_warning_or_worse_are_counted_by_level() -> None:
    metrics, root = Metrics(SETTINGS), logging.getLogger()
    before = list(root.handlers)
    metrics.count_log_lines()
    try:
        log = logging.getLogger("orchestrator.test")
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.ERROR, logging.CRITICAL):
            log.log(level, "a line")
    finally:
        root.handlers = before
    found = {s.labels["level"]: s.value for s in samples(metrics) if s.name == "orchestrator_log_lines_total"}
    assert found == {"warning": 1, "error": 2, "critical": 1}


def attempts(metrics: Metrics) -> dict[tuple[str, str, str], float]:
    return {
        (s.labels["delivery_type"], s.labels["destination"], s.labels["outcome"]): s.value
        for s in samples(metrics)
        if s.name == "orchestrator_destination_attempts_total"
    }


def test_attempts_are_counted_by_destination_and_outcome() -> None:
    metrics = Metrics(SETTINGS)
    for outcome in ("delivered", "delivered", "retry"):
        metrics.destination_attempts_total.count("HTTP", "a.example", outcome)
    metrics.destination_attempts_total.count("KAFKA", "kafka:orders", "fail")
    assert {key: count for key, count in attempts(metrics).items() if count} == {
        ("HTTP", "a.example", "delivered"): 2,
        ("HTTP", "a.example", "retry"): 1,
        ("KAFKA", "kafka:orders", "fail"): 1,
    }


def test_however_many_destinations_there_are_their_series_are_few_and_no_attempt_is_lost() -> None:
    metrics = Metrics(SETTINGS)
    for n in range(1000):
        metrics.destination_attempts_total.count("HTTP", f"{n}.example", "delivered")
    found = attempts(metrics)
    assert len({destination for _, destination, _ in found}) == MOST_DESTINATIONS + 1
    assert found["HTTP", OTHER, "delivered"] == 1000 - MOST_DESTINATIONS
    assert sum(found.values()) == 1000


def test_a_destination_without_attempts_for_an_hour_makes_room_for_another() -> None:
    now_s = 0.0
    registry = CollectorRegistry()
    counter = DestinationAttempts(registry, "attempts_total", "About.", lambda: now_s)

    def shown() -> set[str]:
        return {sample.labels["destination"] for family in registry.collect() for sample in family.samples}

    for n in range(MOST_DESTINATIONS):
        counter.count("HTTP", f"{n}.example", "delivered")
    shown()
    now_s = 3000.0
    counter.count("HTTP", "0.example", "delivered")
    shown()
    now_s = 4000.0
    counter.count("HTTP", "1.example", "delivered")  # not read yet
    counter.count("HTTP", "new.example", "delivered")
    assert shown() == {"0.example", "1.example", "new.example"}


def test_the_metrics_of_maintenance_tell_its_state_or_that_it_is_unknown() -> None:
    metrics = Metrics(SETTINGS)
    problems = [{"step": "horizon_moved", "problem": "disk full"}]
    metrics.set_condition(Condition(12.5, problems, 29.5, 1_000_000, 4, 3, 2))
    found = {
        "maintenance_age_seconds": 12.5,
        "maintenance_failing_steps": 1,
        "partition_days_ahead": 29.5,
        "horizon_events": 1_000_000,
        "partitions_retired": 4,
        "dead_letters": 3,
        "dead_letters_expiring": 2,
    }
    assert {name: value(metrics, f"orchestrator_{name}") for name in found} == found
    metrics.set_condition(Condition(None, [], 29.5, 0, 0, 0, 0))
    assert math.isnan(value(metrics, "orchestrator_maintenance_age_seconds"))
    assert value(metrics, "orchestrator_dead_letters") == 0
    metrics.set_condition(None)
    assert all(math.isnan(value(metrics, f"orchestrator_{name}")) for name in found)


def test_two_instances_of_metrics_in_a_process_keep_their_counts_apart() -> None:
    first, second = Metrics(SETTINGS), Metrics(SETTINGS)
    first.events_dead_total.inc()
    first.events_received_total("http").inc()
    assert value(second, "orchestrator_events_dead_total") == 0
    assert not families(second)["orchestrator_events_received"].samples


def test_a_customer_may_have_any_name() -> None:
    metrics = Metrics(Settings.from_env({"CUSTOMER_NAME": 'o"c\\ean {é}'}))
    assert {sample.labels["customer"] for sample in samples(metrics)} == {'o"c\\ean {é}'}
