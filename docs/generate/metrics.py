"""docs/reference/metrics.md, from the registry of the metrics."""

from __future__ import annotations

from prometheus_client.metrics import MetricWrapperBase

from docs.generate import markdown
from orchestrator.destination_attempts import DestinationAttempts
from orchestrator.histograms import Histograms
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings

_INTRODUCTION = """\
`GET /metrics` answers with these, in Prometheus's text format. Every series also carries the labels `deployment`,
`customer` and `environment`. A histogram has the series `…_bucket`, `…_sum` and `…_count`. The process metrics of
the Prometheus client (`process_…`) stand beside them."""


def page() -> str:
    collectors = Metrics(Settings.from_env({})).registry._collector_to_names
    rows = [_row(each) for each in collectors if isinstance(each, MetricWrapperBase | Histograms | DestinationAttempts)]
    return markdown.page("Metrics", _INTRODUCTION, markdown.table(("metric", "type", "labels", "what it says"), rows))


def _row(collector: MetricWrapperBase | Histograms | DestinationAttempts) -> tuple[str, str, str, str]:
    [metric] = collector.describe()
    name = f"{metric.name}_total" if metric.type == "counter" else metric.name
    labels = collector._labelnames if isinstance(collector, MetricWrapperBase) else collector.labels
    return markdown.code(name), metric.type, ", ".join(map(markdown.code, labels)), markdown.plain(metric.documentation)
