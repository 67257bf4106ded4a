"""How spans reach a collector, and what becomes of them when it is away, slow, failing or unwilling."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from orchestrator.dev.operating_system import free_port
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings
from orchestrator.tracing import Span, Tracer, export
from orchestrator.tracing.export import MAX_QUEUED, Exporter
from tests.support.certificates import Authority
from tests.support.collector import Collector, collecting
from tests.support.tools import tool
from tests.support.waiting import eventually

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CONTEXT = f"00-{TRACE}-00f067aa0ba902b7-01"
LOW, HIGH = f"{TRACE[:16]}{'0' * 15}1", f"{TRACE[:16]}{'f' * 16}"  # a ratio takes the lower traces


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "backoff_s", lambda failures: 0.01)
    monkeypatch.setattr(export, "_EVERY_S", 0.01)


def chosen(url: str, **more: str) -> Settings:
    return Settings.from_env({"OTEL_EXPORTER_OTLP_ENDPOINT": url} | more)


def span(name: str = "attempt", error: str | None = None, **attributes: str | int | float) -> Span:
    return Span(name, "client", CONTEXT, None, 5, 4, attributes, error, (CONTEXT,))


class Exporting:
    def __init__(self, settings: Settings) -> None:
        self.metrics = Metrics(settings)
        self.exporter = Exporter(settings, self.metrics, "dispatch")

    def sent(self) -> float:
        return self.metrics.registry.get_sample_value("orchestrator_spans_sent_total") or 0.0

    def dropped(self, reason: str) -> float:
        return self.metrics.registry.get_sample_value("orchestrator_spans_dropped_total", {"reason": reason}) or 0.0


async def test_a_span_arrives_whole_with_the_headers_of_the_settings(collector: Collector) -> None:
    settings = chosen(collector.url, OTEL_EXPORTER_OTLP_HEADERS="x-key=a%2Cb, x-other=c", OTEL_SERVICE_NAME="shop")
    exporting = Exporting(settings)
    exporting.exporter.put(span(error="no \ud800 surrogate", text="\ud800" + "x" * 5000, whole=3, part=0.5))
    await eventually(lambda: collector.spans)
    await exporting.exporter.close()
    (got,) = collector.spans
    assert (got.name, got.kind, got.context, got.parent, got.failed) == ("attempt", "client", CONTEXT, "", True)
    assert got.attributes == {"text": "?" + "x" * 1023, "whole": 3, "part": 0.5}
    assert (got.start_ns, got.end_ns) == (5, 5)  # a clock that went back makes no negative time
    assert got.service["service.name"] == "shop"
    assert (collector.headers[0]["x-key"], collector.headers[0]["x-other"]) == ("a,b", "c")
    assert (exporting.sent(), exporting.dropped("stopped")) == (1, 0)


async def test_a_collector_with_tls_is_trusted_by_the_authorities_that_the_settings_name(tmp_path: Path) -> None:
    authority = Authority(str(tool("openssl")), tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(authority.certificate("collector"))
    with collecting(tls) as collector:
        trusting = Exporting(chosen(collector.url, OTEL_EXPORTER_OTLP_CERTIFICATE=str(authority.trusted)))
        trusting.exporter.put(span())
        await eventually(lambda: trusting.sent() == 1)
        await trusting.exporter.close()
        distrusting = Exporting(chosen(collector.url))
        distrusting.exporter.put(span())
        await eventually(lambda: distrusting.dropped("collector_away") == 1)
        await distrusting.exporter.close()
        assert len(collector.spans) == 1


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_a_batch_that_a_collector_cannot_take_now_is_sent_again(collector: Collector, status: int) -> None:
    collector.statuses = [status, status, 200]
    exporting = Exporting(chosen(collector.url))
    exporting.exporter.put(span())
    await eventually(lambda: exporting.sent() == 1)
    await exporting.exporter.close()
    assert len(collector.headers) == 3


@pytest.mark.parametrize("status", [302, 400, 401, 404, 500])
async def test_a_batch_that_is_refused_is_dropped_and_the_next_one_is_sent(collector: Collector, status: int) -> None:
    collector.statuses = [status, 200]
    exporting = Exporting(chosen(collector.url))
    exporting.exporter.put(span())
    await eventually(lambda: exporting.dropped("refused") == 1)
    exporting.exporter.put(span())
    await eventually(lambda: exporting.sent() == 1)
    await exporting.exporter.close()


async def test_spans_that_a_collector_refuses_of_a_batch_count_as_dropped(collector: Collector) -> None:
    collector.refuses = 1
    exporting = Exporting(chosen(collector.url))
    exporting.exporter.put(span())
    await eventually(lambda: exporting.dropped("refused") == 1)
    await exporting.exporter.close()
    assert exporting.sent() == 0


@pytest.mark.parametrize("nonsense", [600, -3, 2**62])
async def test_a_collector_that_miscounts_ends_nothing(collector: Collector, nonsense: int) -> None:
    collector.refuses = nonsense
    exporting = Exporting(chosen(collector.url))
    exporting.exporter.put(span())
    await eventually(lambda: exporting.dropped("refused") + exporting.sent() == 1)
    collector.refuses = 0
    before = exporting.sent()
    exporting.exporter.put(span())
    await eventually(lambda: exporting.sent() == before + 1)
    await exporting.exporter.close()


async def test_a_collector_that_is_away_is_told_once_and_costs_only_spans(caplog: pytest.LogCaptureFixture) -> None:
    exporting = Exporting(chosen(f"http://127.0.0.1:{free_port()}", OTEL_EXPORTER_OTLP_HEADERS="x-key=s3cret"))
    with caplog.at_level(logging.WARNING):
        for n in range(1, 4):
            exporting.exporter.put(span())
            await eventually(partial(lambda n: exporting.dropped("collector_away") == n, n))
    await exporting.exporter.close()
    (line,) = caplog.records
    assert line.getMessage() == "the trace collector does not take spans; deliveries are not affected"
    assert "refused" in vars(line)["error"]
    assert "s3cret" not in str(vars(line))


async def test_a_collector_that_hangs_fills_the_queue_and_never_holds_up_who_makes_spans(collector: Collector) -> None:
    collector.gate.clear()
    exporting = Exporting(chosen(collector.url))
    exporting.exporter.put(span())
    await eventually(lambda: collector.headers)  # the thread waits for its answer now
    for _ in range(MAX_QUEUED + 7):
        exporting.exporter.put(span())
    assert exporting.dropped("queue_full") == 7
    async with asyncio.timeout(10):
        await exporting.exporter.close()
    assert exporting.dropped("stopped") == MAX_QUEUED + 1


@pytest.mark.parametrize(
    ("sampler", "part", "root_low", "root_high", "child_of_sampled", "child_of_unsampled"),
    [
        ("parentbased_always_on", "1", True, True, True, False),
        ("parentbased_always_off", "1", False, False, True, False),
        ("parentbased_traceidratio", "0.5", True, False, True, False),
        ("parentbased_traceidratio", "0", False, False, True, False),
        ("always_on", "0", True, True, True, True),
        ("always_off", "1", False, False, False, False),
        ("traceidratio", "1", True, True, True, True),
        ("traceidratio", "0.5", True, False, False, False),
    ],
)
async def test_a_sampler_decides_as_opentelemetry_says(
    sampler: str,
    part: str,
    root_low: bool,
    root_high: bool,
    child_of_sampled: bool,
    child_of_unsampled: bool,
    collector: Collector,
) -> None:
    settings = chosen(collector.url, OTEL_TRACES_SAMPLER=sampler, OTEL_TRACES_SAMPLER_ARG=part)
    exporter = Exporter(settings, Metrics(settings), "api")
    begin = Tracer(settings, exporter).begin
    await exporter.close()

    def sampled(context: str) -> bool:
        return context.endswith("-01")

    assert sampled(begin(None, LOW)) is root_low
    assert sampled(begin(None, HIGH)) is root_high
    # The trace of the parent lies in the upper half.
    parent = f"00-{HIGH}-00f067aa0ba902b7-0"
    assert sampled(begin(f"{parent}1")) is child_of_sampled
    assert sampled(begin(f"{parent}0")) is child_of_unsampled
    if not child_of_unsampled:
        assert begin(f"{parent}0") == f"{parent}0"
