"""Sends spans to a collector over OTLP/HTTP, in batches, from a thread of its own.

Nothing waits for the collector: what the queue does not hold is dropped and counted. A batch that the collector could
not take for the moment is tried again; one that it refuses is dropped.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import os
import socket
import ssl
import threading
import time
from collections import deque
from urllib.parse import urlsplit

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Status
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Encoded

from orchestrator.backoff import backoff_s
from orchestrator.events.tracing import span_id, trace_id
from orchestrator.metrics import Metrics, program_version
from orchestrator.settings import Settings
from orchestrator.tracing import Attributes, Span

MAX_QUEUED = 16_384
MAX_BATCH = 512
FLUSH_S = 0.8
"""How long a stopping process goes on sending."""
_EVERY_S = 1.0
_TRIES = 6  # of one batch; with their pauses they take some ten seconds, or longer where the collector hangs
_LOG_EVERY_S = 60.0
_MAX_ANSWER_BYTES = 1 << 16
_PASSING = frozenset((429, 502, 503, 504))  # the statuses after which OTLP tries again
_KINDS = {
    "server": Encoded.SPAN_KIND_SERVER,
    "client": Encoded.SPAN_KIND_CLIENT,
    "producer": Encoded.SPAN_KIND_PRODUCER,
    "consumer": Encoded.SPAN_KIND_CONSUMER,
}
_FLAG_REMOTE_KNOWN = 0x100
_MAX_TEXT_CHARS = 1024

_log = logging.getLogger(__name__)


class _RefusedError(Exception):
    """The collector will never take the batch."""


class Exporter:
    """One per process. `put` may be called until `close`, from one thread."""

    def __init__(self, settings: Settings, metrics: Metrics, role: str) -> None:
        url = urlsplit(settings.otlp_endpoint or "")
        self._host, self._port, self._path = url.hostname or "", url.port, f"{url.path}/v1/traces"
        self._tls = ssl.create_default_context(cafile=settings.otlp_certificate) if url.scheme == "https" else None
        self._headers = {**dict(settings.otlp_headers), "content-type": "application/x-protobuf"}
        self._timeout_s = settings.otlp_timeout_s
        self._resource = _resource(settings, role)
        self._scope = InstrumentationScope(name="orchestrator", version=program_version())
        self._sent = metrics.spans_sent_total
        self._dropped = metrics.spans_dropped_total
        self._queue: deque[Span] = deque()
        self._sending = 0
        self._stopping = False
        self._wake = threading.Event()
        self._next_log_s = 0.0
        self._unsaid = 0
        # A daemon: a collector that hangs does not hold up the end of the process.
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    def put(self, span: Span) -> None:
        """Takes a span; never blocks."""
        queued = len(self._queue)
        if queued >= MAX_QUEUED:
            self._dropped("queue_full").inc()
            self._unsaid += 1
            return
        self._queue.append(span)
        if queued == MAX_BATCH:
            self._wake.set()

    async def close(self) -> None:
        """Sends what is left, for FLUSH_S at most."""
        self._stopping = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join, FLUSH_S)
        if left := len(self._queue) + self._sending:
            self._queue.clear()
            self._dropped("stopped").inc(left)
            _log.warning("stopped before the trace collector had all spans", extra={"spans": left})

    def _run(self) -> None:
        while True:
            self._wake.wait(_EVERY_S)
            self._wake.clear()
            while self._queue:
                batch = [self._queue.popleft() for _ in range(min(MAX_BATCH, len(self._queue)))]
                self._sending = len(batch)
                self._send(batch)
                self._sending = 0
            if self._stopping:
                return

    def _send(self, batch: list[Span]) -> None:
        """Sends a batch, or counts it as dropped."""
        reason = "collector_away"
        failure: Exception | None = None
        for failures in range(1, _TRIES + 1):
            try:
                refused = max(0, min(len(batch), self._post(self._encoded(batch))))
            except _RefusedError as error:
                reason, failure = "refused", error
                break
            except (OSError, http.client.HTTPException) as error:
                failure = error
                self._tell(error)
            except Exception as error:  # one batch must not end all the others
                _log.exception("spans cannot be encoded")
                reason, failure = "refused", error
                break
            else:
                self._sent.inc(len(batch) - refused)
                self._dropped("refused").inc(refused)
                return
            if failures == _TRIES or self._stopping:
                break
            self._pause(backoff_s(failures + 2))
        self._dropped(reason).inc(len(batch))
        self._unsaid += len(batch)
        self._tell(failure)

    def _pause(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while not self._stopping and (left_s := until_s - time.monotonic()) > 0:
            self._wake.wait(left_s)
            if not self._stopping:  # a full batch waits; that is no reason to hurry
                self._wake.clear()

    def _tell(self, error: Exception | None) -> None:
        """Logs a failure, one line a minute at most."""
        now_s = time.monotonic()
        if now_s < self._next_log_s:
            return
        self._next_log_s = now_s + _LOG_EVERY_S
        dropped, self._unsaid = self._unsaid, 0
        reason = str(error) or type(error).__name__
        context = {"collector": f"{self._host}:{self._port or ''}".rstrip(":"), "error": reason, "dropped": dropped}
        _log.warning("the trace collector does not take spans; deliveries are not affected", extra=context)

    def _post(self, body: bytes) -> int:
        """How many spans the collector says that it has refused. Raises OSError or HTTPException if it may be tried
        again, else _RefusedError.
        """
        # A connection for each batch: there is one a second, and none to find half closed.
        if self._tls is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        else:
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout_s, context=self._tls)
        try:
            connection.request("POST", self._path, body, self._headers)
            with connection.getresponse() as answer:
                if answer.status in _PASSING:
                    raise OSError(f"HTTP {answer.status}")
                if not 200 <= answer.status < 300:
                    raise _RefusedError(f"HTTP {answer.status}")
                return _refused(answer.read(_MAX_ANSWER_BYTES))
        finally:
            connection.close()

    def _encoded(self, batch: list[Span]) -> bytes:
        spans = [_span(span) for span in batch]
        scoped = ScopeSpans(scope=self._scope, spans=spans)
        request = ExportTraceServiceRequest(
            resource_spans=[ResourceSpans(resource=self._resource, scope_spans=[scoped])]
        )
        return bytes(request.SerializeToString())


def _refused(body: bytes) -> int:
    """How many spans an answer says were refused."""
    try:
        return int(ExportTraceServiceResponse.FromString(body).partial_success.rejected_spans)
    except DecodeError:  # some collectors answer in JSON whatever they were sent
        return 0


def _span(span: Span) -> Encoded:
    parent = None if span.parent is None else bytes.fromhex(span_id(span.parent))
    links = [
        Encoded.Link(trace_id=bytes.fromhex(trace_id(link)), span_id=bytes.fromhex(span_id(link)))
        for link in span.links
    ]
    status = None if span.error is None else Status(code=Status.STATUS_CODE_ERROR, message=_text(span.error))
    return Encoded(
        trace_id=bytes.fromhex(trace_id(span.context)),
        span_id=bytes.fromhex(span_id(span.context)),
        parent_span_id=parent or b"",
        name=span.name,
        kind=_KINDS[span.kind],
        start_time_unix_nano=span.start_ns,
        end_time_unix_nano=max(span.start_ns, span.end_ns),
        attributes=[_attribute(name, value) for name, value in span.attributes.items()],
        links=links,
        status=status,
        flags=int(span.context[53:55], 16) | _FLAG_REMOTE_KNOWN,
    )


def _attribute(name: str, value: str | int | float) -> KeyValue:
    if isinstance(value, str):
        return KeyValue(key=name, value=AnyValue(string_value=_text(value)))
    if isinstance(value, int):
        return KeyValue(key=name, value=AnyValue(int_value=value))
    return KeyValue(key=name, value=AnyValue(double_value=value))


def _text(text: str) -> str:
    """Protobuf takes no lone surrogate, and no collector a text without end."""
    return text[:_MAX_TEXT_CHARS].encode(errors="replace").decode()


def _resource(settings: Settings, role: str) -> Resource:
    host, pid = socket.gethostname(), os.getpid()
    about: Attributes = {
        "service.name": settings.otlp_service_name or settings.deployment,
        "service.namespace": settings.customer,
        "service.version": program_version(),
        "service.instance.id": f"{host}:{pid}",
        "deployment.environment.name": settings.environment,
        "orchestrator.role": role,
        "host.name": host,
        "process.pid": pid,
    }
    return Resource(attributes=[_attribute(name, value) for name, value in about.items()])
