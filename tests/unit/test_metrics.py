from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from orchestrator.database.maintenance import Condition
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
