"""Traces: which spans are recorded, and what context an event takes along.

A span is written down when it has ended, as a few values in a queue; a thread of its own encodes and sends it. So the
event loop makes no call and waits for nobody. Without OTEL_EXPORTER_OTLP_ENDPOINT there is no `Tracer` at all.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec

from orchestrator.events.tracing import is_sampled, trace_id

if TYPE_CHECKING:
    from orchestrator.metrics import Metrics
    from orchestrator.settings import Settings
    from orchestrator.tracing.export import Exporter

Attributes = dict[str, str | int | float]
MAX_LINKS = 128


class Span(msgspec.Struct, frozen=True, gc=False):
    """A span that has ended. `context` and `parent` are traceparents; times are Unix nanoseconds of this machine.

    `kind` is ``server``, ``client``, ``producer`` or ``consumer``. With an `error`, even an empty one, it has failed.
    """

    name: str
    kind: str
    context: str
    parent: str | None
    start_ns: int
    end_ns: int
    attributes: Attributes
    error: str | None = None
    links: Sequence[str] = ()


class Tracer:
    """Made by `tracing`. `begin` decides, `record` takes a span of a trace that is sampled."""

    def __init__(self, settings: Settings, exporter: Exporter) -> None:
        name = settings.traces_sampler
        self._honours_parent = name.startswith("parentbased_")
        root = name.removeprefix("parentbased_")
        part = {"always_on": 1.0, "always_off": 0.0}.get(root, settings.traces_sampler_arg)
        self._bound = round(part * 2**64)
        self.record = exporter.put

    def begin(self, parent: str | None, new_trace_id: str | None = None) -> str:
        """The traceparent of a new span; where the trace is not sampled, that of its parent, which is passed on.

        Without a parent a trace begins.
        """
        trace = new_trace_id or f"{random.getrandbits(128) or 1:032x}" if parent is None else trace_id(parent)
        if parent is not None and self._honours_parent:
            sampled = is_sampled(parent)
        else:  # as OpenTelemetry's samplers do it, so that all services with one ratio agree
            sampled = int(trace[16:], 16) < self._bound
        if parent is not None and not sampled:
            return f"{parent[:54]}0" if is_sampled(parent) else parent
        return f"00-{trace}-{random.getrandbits(64) or 1:016x}-{sampled:02x}"


@asynccontextmanager
async def tracing(settings: Settings, metrics: Metrics, role: str) -> AsyncIterator[Tracer | None]:
    """The tracer of a process, which sends for a moment longer when the block ends; None: there is no collector."""
    if settings.otlp_endpoint is None:
        yield None
        return
    from orchestrator.tracing.export import Exporter  # brings protobuf along

    exporter = Exporter(settings, metrics, role)
    try:
        yield Tracer(settings, exporter)
    finally:
        await exporter.close()
