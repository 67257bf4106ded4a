"""Traces: from the request through Kafka and the row to each attempt, as a real collector receives them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any

import httpx
import pytest

from orchestrator.database import Database
from orchestrator.dev.operating_system import free_port
from tests.conftest import MakeSettings, Spawn
from tests.integration.api_support import running_api, until
from tests.support.brokers import Kafka
from tests.support.collector import Collector, Got, collecting
from tests.support.dispatching import dispatching, finished, soon
from tests.support.ingesting import Topic
from tests.support.receiver import Answer, Receiver
from tests.support.sql_client import Client
from tests.support.topics import arrived
from tests.support.topics import headers as record_headers
from tests.support.waiting import eventually

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
OTHER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture
def client(database_url: str) -> Iterator[Client]:
    with Client(database_url) as client:
        yield client


def event(url: str, **changes: Any) -> dict[str, Any]:
    return {"source": "t", "scheduled_at": datetime.now(UTC).isoformat(), "destination": url, "payload": 1} | changes


def traced(collector: Collector, **more: str) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "ALLOW_ANONYMOUS": "true"} | more


async def spans_of(collector: Collector, trace: str, *names: str) -> dict[str, Got]:
    """The spans of a trace by their names, once all of them, and no others, have come."""

    def came() -> list[Got]:
        found = collector.of(trace)
        assert sorted(span.name for span in found) == sorted(names)
        return found

    return {span.name: span for span in await eventually(came, 20)}


async def test_one_trace_leads_from_the_request_through_kafka_to_the_receiver(
    spawn: Spawn, client: Client, kafka: Kafka, collector: Collector, receiver: Receiver
) -> None:
    topic = await Topic.new(kafka)
    port = str(free_port())
    process = spawn("run", **topic.environ, **traced(collector, SERVER_PORT=port, CUSTOMER_NAME="ocean"))
    await process.wait_for_log('"ready"', 40)
    headers = {"traceparent": SAMPLED, "tracestate": "vendor=value"}
    url = receiver.url("/key-in-path") + "?token=s3cret"
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as http:
        responses: list[httpx.Response] = []

        async def submitted() -> bool:
            try:
                response = await http.post("/api/v1/events", json=event(url, payload="private"), headers=headers)
            except httpx.ConnectError:
                return False
            responses.append(response)
            return response.status_code == 202

        await until(submitted, 30)
    response = responses[-1]
    (request,) = await receiver.wait_for(1, timeout_s=30)
    # A request that came before Kafka was found is a span of the same trace.
    refused = ["submit"] * (len(responses) - 1)
    spans = await spans_of(collector, TRACE, "submit", "ingest", "claim", "attempt", "finish", *refused)
    submit, ingest, claim, attempt, finish = (
        spans[name] for name in ("submit", "ingest", "claim", "attempt", "finish")
    )
    assert [submit.parent, ingest.parent, claim.parent] == [PARENT, submit.span, ingest.span]
    assert [attempt.parent, finish.parent] == [ingest.span, attempt.span]
    assert request.headers["traceparent"] == attempt.context
    assert request.headers["tracestate"] == "vendor=value"
    # The id that the client finds everywhere is that of its trace, for it gave no other.
    assert response.headers["x-correlation-id"] == request.headers["x-correlation-id"] == TRACE
    assert client.column("select correlation_id from orchestrator.event_status") == [TRACE]
    (record,) = await arrived(kafka.servers, topic.name, 1)
    assert record_headers(record)["traceparent"] == submit.context
    assert [span.kind for span in (submit, ingest, claim, attempt, finish)] == [
        "server",
        "consumer",
        "client",
        "client",
        "client",
    ]
    about = {"http.request.method": "POST", "http.route": "/api/v1/events", "http.response.status_code": 202}
    assert submit.attributes | about == submit.attributes
    assert ingest.attributes["messaging.destination.name"] == topic.name
    assert attempt.attributes["server.port"] == receiver.port
    assert attempt.attributes["http.response.status_code"] == 204
    assert {span.service["orchestrator.role"] for span in spans.values()} == {"api", "run"}
    assert {span.service["service.namespace"] for span in spans.values()} == {"ocean"}
    assert all(span.start_ns <= span.end_ns for span in spans.values())
    sent = b"".join(collector.bodies)
    assert not any(secret in sent for secret in (b"s3cret", b"key-in-path", b"private"))
    assert await process.stop() == 0


async def test_each_attempt_is_a_span_of_its_own_and_the_receiver_continues_it(
    settings: MakeSettings, client: Client, collector: Collector, receiver: Receiver
) -> None:
    url = receiver.script("/hook", Answer(503), Answer())
    client.rows("insert into orchestrator.retry_policy (name, jitter, schedule) values ('at-once', 0, '{0 s}')")
    async with dispatching(settings(**traced(collector))):
        event_id = client.schedule(destination=url, scheduled_at=soon(0), traceparent=SAMPLED, retry_policy="at-once")
        await finished(client, [event_id])
        await eventually(lambda: len(collector.named("finish")) == 2, 20)
    sent = [request.headers["traceparent"] for request in receiver.requests]
    first, second = sorted((span for span in collector.named("attempt")), key=lambda span: span.start_ns)
    assert sent == [first.context, second.context]
    assert {first.parent, second.parent} == {PARENT}
    assert (first.failed, second.failed) == (True, False)
    assert first.attributes["error.type"] == "503"
    assert second.attributes["http.request.resend_count"] == 1
    results = {span.parent: span.attributes["orchestrator.result"] for span in collector.named("finish")}
    assert results == {first.span: "retried", second.span: "delivered"}
    assert client.value("select correlation_id from orchestrator.event_status where id = %s", event_id) == TRACE


async def test_a_record_of_a_delivery_to_kafka_has_the_context_of_its_attempt(
    settings: MakeSettings, client: Client, kafka: Kafka, collector: Collector
) -> None:
    topic = kafka.unique("deliveries")
    await kafka.create_topic(topic)
    async with dispatching(settings(**kafka.environ, **traced(collector))):
        client.schedule(destination=topic, delivery_type="KAFKA", scheduled_at=soon(0), traceparent=SAMPLED)
        (record,) = await arrived(kafka.servers, topic, 1)
        spans = await spans_of(collector, TRACE, "claim", "attempt", "finish")
    attempt = spans["attempt"]
    assert record_headers(record)["traceparent"] == attempt.context
    assert (attempt.kind, attempt.parent, spans["finish"].parent) == ("producer", PARENT, attempt.span)
    assert (attempt.attributes["messaging.system"], attempt.attributes["messaging.destination.name"]) == (
        "kafka",
        topic,
    )


async def test_a_trace_that_is_not_sampled_makes_no_span_and_is_passed_on_as_it_came(
    settings: MakeSettings, client: Client, collector: Collector, receiver: Receiver
) -> None:
    async with dispatching(settings(**traced(collector))):
        ids = [client.schedule(destination=receiver.url("/no"), scheduled_at=soon(0), traceparent=UNSAMPLED)]
        ids += [client.schedule(destination=receiver.url("/yes"), scheduled_at=soon(0), traceparent=OTHER)]
        await finished(client, ids)
        await eventually(lambda: collector.named("finish"), 20)
    (request,) = receiver.received("/no")
    assert request.headers["traceparent"] == UNSAMPLED
    assert {span.trace for span in collector.spans} == {OTHER[3:35]}


@pytest.mark.parametrize(("part", "names"), [("1", ["attempt", "claim", "finish"]), ("0", [])])
async def test_an_event_from_sql_without_a_context_begins_a_trace_that_its_id_leads_to(
    part: str,
    names: list[str],
    settings: MakeSettings,
    client: Client,
    collector: Collector,
    receiver: Receiver,
) -> None:
    sampler = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": part}
    async with dispatching(settings(**traced(collector, **sampler))):
        event_id = client.schedule(destination=receiver.url(), scheduled_at=soon(0))
        await finished(client, [event_id])
        await eventually(lambda: len(collector.spans) >= len(names), 20)
    assert sorted(span.name for span in collector.spans) == names
    (request,) = receiver.requests
    trace = blake2b(event_id.encode(), digest_size=16).hexdigest()
    assert {span.trace for span in collector.spans} <= {trace}
    assert request.headers.get("traceparent", "")[3:35] == (trace if names else "")


async def test_a_batch_is_one_span_with_links_to_the_traces_that_its_events_name(
    settings: MakeSettings, client: Client, collector: Collector
) -> None:
    chosen = settings(**traced(collector))
    due = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    events = [event("http://127.0.0.1:9/", scheduled_at=due) for _ in range(99)]
    events.append(event("http://127.0.0.1:9/", scheduled_at=due, traceparent=OTHER))
    async with Database(chosen, role="api") as database, running_api(chosen, database) as http:
        answer = await http.post("/api/v1/events/batch", json={"events": events})
        assert answer.json()["accepted"] == 100
        refused = await http.post("/api/v1/events", json={}, headers={"traceparent": OTHER})
        assert refused.status_code == 422
        await eventually(lambda: len(collector.spans) == 2, 20)
    batch = next(span for span in collector.spans if span.attributes["http.route"].endswith("/batch"))
    single = next(span for span in collector.spans if span is not batch)
    assert (batch.parent, batch.links) == ("", (OTHER[3:52],))
    assert (single.trace, single.attributes["http.response.status_code"]) == (OTHER[3:35], 422)
    assert answer.headers["x-correlation-id"] == batch.trace
    kept = client.rows("select traceparent, count(*) from orchestrator.event_status group by 1 order by 2")
    assert kept == [(OTHER, 1), (batch.context, 99)]


async def test_a_field_of_the_event_decides_its_trace_and_a_malformed_header_none(
    settings: MakeSettings, client: Client, collector: Collector
) -> None:
    chosen = settings(**traced(collector))
    due = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    named = event("http://127.0.0.1:9/", scheduled_at=due, traceparent=SAMPLED)
    plain = event("http://127.0.0.1:9/", scheduled_at=due)
    async with Database(chosen, role="api") as database, running_api(chosen, database) as http:
        first = await http.post("/api/v1/events", json=named, headers={"traceparent": OTHER})
        second = await http.post("/api/v1/events", json=plain, headers={"traceparent": "00-zz", "tracestate": "a=b"})
        assert (first.status_code, second.status_code) == (201, 201)
        await eventually(lambda: len(collector.spans) == 2, 20)
    of_field, root = sorted(collector.spans, key=lambda span: span.parent == "")
    assert (of_field.trace, of_field.parent, of_field.links) == (TRACE, PARENT, (OTHER[3:52],))
    assert root.parent == ""
    assert second.headers["x-correlation-id"] == root.trace
    query = "select traceparent, headers::text from orchestrator.event_status where id = %s"
    assert client.rows(query, first.json()["id"]) == [(of_field.context, None)]
    assert client.rows(query, second.json()["id"]) == [(root.context, None)]


async def test_deliveries_and_the_stop_do_not_wait_for_a_collector_that_hangs(
    settings: MakeSettings, client: Client, collector: Collector, receiver: Receiver
) -> None:
    collector.gate.clear()
    async with dispatching(settings(**traced(collector))) as running:
        ids = [client.schedule(destination=receiver.url(), scheduled_at=soon(0)) for _ in range(20)]
        await finished(client, ids)
        await eventually(lambda: collector.headers)
    # The collector still has not answered.
    assert collector.spans == []
    assert running.value("spans_dropped_total") == 60
    assert running.value("spans_sent_total") == 0
