"""A trace collector on a real socket: it takes OTLP over HTTP and answers as a test tells it to."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Encoded


@dataclass(frozen=True)
class Got:
    """A span that has arrived. Ids are hexadecimal; `parent` is empty for a root."""

    name: str
    kind: str
    trace: str
    span: str
    parent: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    failed: bool
    links: tuple[str, ...]
    service: dict[str, Any]

    @property
    def context(self) -> str:
        return f"00-{self.trace}-{self.span}-01"


@dataclass
class Collector:
    """`statuses` are answered in turn, the last one ever after; while `gate` is clear, nothing is answered."""

    url: str
    statuses: list[int] = field(default_factory=lambda: [200])
    refuses: int = 0
    spans: list[Got] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def of(self, trace: str) -> list[Got]:
        return [span for span in [*self.spans] if span.trace == trace]

    def named(self, name: str) -> list[Got]:
        return [span for span in [*self.spans] if span.name == name]

    def take(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        self.headers.append(headers)
        self.gate.wait(30)
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if status != 200 or path != "/v1/traces":
            return status if status != 200 else 404, b""
        self.bodies.append(body)
        self.spans += _read(body)
        answer = ExportTraceServiceResponse()
        if self.refuses:
            answer.partial_success.rejected_spans = self.refuses
        return 200, answer.SerializeToString()


@contextmanager
def collecting(tls: ssl.SSLContext | None = None) -> Iterator[Collector]:
    """A collector on a free port, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            status, answer = collector.take(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
            self.send_response(status)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        collector = Collector(f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}")
        collector.gate.set()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield collector
        finally:
            collector.gate.set()
            server.shutdown()
            thread.join()


def _read(body: bytes) -> Iterator[Got]:
    for group in ExportTraceServiceRequest.FromString(body).resource_spans:
        service = _values(group.resource.attributes)
        for scope in group.scope_spans:
            for span in scope.spans:
                yield Got(
                    span.name,
                    Encoded.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    _values(span.attributes),
                    span.status.code == 2,
                    tuple(f"{link.trace_id.hex()}-{link.span_id.hex()}" for link in span.links),
                    service,
                )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
