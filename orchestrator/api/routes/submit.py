"""POST /api/v1/events and /api/v1/events/batch, written straight over ASGI: these two carry the load."""

from __future__ import annotations

import asyncio
import time

import msgspec
from starlette.types import Receive, Scope, Send

from orchestrator.api.auth import Guard
from orchestrator.api.http import header, read_json, send_json
from orchestrator.api.intake import Intake
from orchestrator.api.problems import Problem
from orchestrator.database import Submitted
from orchestrator.errors import ValidationError
from orchestrator.events.parsing import batch_items, parse_submission
from orchestrator.events.submission import Submission
from orchestrator.events.topics import TopicRules, topic_rules
from orchestrator.events.tracing import CORRELATION_ID_HEADER, TRACEPARENT_HEADER, Carried, carried
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings

_encode = msgspec.json.Encoder().encode
_STATUSES = {"accepted": "scheduled", "duplicate": "duplicate", "queued": "accepted"}
_SLICE_S = 0.01
_CORRELATION_ID, _TRACEPARENT = CORRELATION_ID_HEADER.encode(), TRACEPARENT_HEADER.encode()
_CODES = {"accepted": 201, "duplicate": 200, "queued": 202}


class Answer(msgspec.Struct, gc=False):
    """What a client is told of its event: that it is kept, by ``scheduled`` or, if it was before, ``duplicate``, or
    that Kafka has it, by ``accepted``. `event_status` is the state it is in; None: it is still on its way."""

    id: str
    external_job_id: str | None
    scheduled_at: str
    status: str
    duplicate: bool
    event_status: str | None


class ItemAnswer(msgspec.Struct, gc=False):
    index: int
    id: str
    status: str
    duplicate: bool
    event_status: str | None


class Fault(msgspec.Struct):
    field: str
    reason: str


class ItemRefusal(msgspec.Struct):
    index: int
    error: Fault


class BatchAnswer(msgspec.Struct):
    accepted: int
    duplicates: int
    rejected: int
    results: list[ItemAnswer | ItemRefusal]


class _Submitting:
    def __init__(self, settings: Settings, guard: Guard, intake: Intake, metrics: Metrics) -> None:
        self._settings = settings
        self._topics = topic_rules(settings)
        self._guard = guard
        self._intake = intake
        self._received = metrics.events_received_total("http")
        self._persisted = metrics.events_persisted_total("http")
        self._metrics = metrics


class SubmitOne(_Submitting):
    """Keeps one event: 201, or 200 if it was kept before; or hands it to Kafka: 202."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guard.require(scope, "submit")
        raw = await read_json(scope, receive, self._settings.max_body_bytes)
        self._received.inc()
        try:
            submission = parse_submission(raw, self._settings, self._topics, _carried(scope))
            kept = await self._intake.submit(submission)
            if kept.result not in _STATUSES:
                raise _refusal(kept)
        except (ValidationError, Problem):
            self._metrics.events_rejected_total.inc()
            raise
        duplicate = kept.result == "duplicate"
        if duplicate:
            self._metrics.events_duplicate_total.inc()
        elif kept.result != "queued":
            self._persisted.inc()
        answer = Answer(
            kept.id,
            submission.external_job_id,
            submission.scheduled_at.isoformat(),
            _STATUSES[kept.result],
            duplicate,
            kept.status,
        )
        location = (b"location", b"/api/v1/events/" + kept.id.encode())
        await send_json(send, _CODES[kept.result], _encode(answer), location)


class SubmitBatch(_Submitting):
    """Keeps many events in one transaction, or hands them to Kafka, with a result for each."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guard.require(scope, "submit")
        raw = await read_json(scope, receive, self._settings.max_body_bytes)
        items = await _parsed(raw, self._settings, self._topics, _carried(scope))
        self._received.inc(len(items))
        valid = [item for item in items if isinstance(item, Submission)]
        kept = await self._intake.submit_all(valid) if valid else []
        answer = _batch_answer(items, kept)
        queued = any(each.result == "queued" for each in kept)
        if not queued:
            self._persisted.inc(answer.accepted)
        self._metrics.events_duplicate_total.inc(answer.duplicates)
        self._metrics.events_rejected_total.inc(answer.rejected)
        await send_json(send, 202 if queued else 200, _encode(answer))


def _carried(scope: Scope) -> Carried | None:
    return carried(header(scope, _CORRELATION_ID), header(scope, _TRACEPARENT))


async def _parsed(
    raw: bytes, settings: Settings, topics: TopicRules, told: Carried | None
) -> list[Submission | ValidationError]:
    """The items of a batch; whatever else this process does goes on in between."""
    items: list[Submission | ValidationError] = []
    until = time.perf_counter() + _SLICE_S
    for item in batch_items(raw, settings, topics, told):
        if item is not None:
            items.append(item)
        if time.perf_counter() > until:
            await asyncio.sleep(0)
            until = time.perf_counter() + _SLICE_S
    return items


def _batch_answer(items: list[Submission | ValidationError], kept: list[Submitted]) -> BatchAnswer:
    answer = BatchAnswer(0, 0, 0, [])
    results = iter(kept)
    for index, item in enumerate(items):
        if isinstance(item, ValidationError):
            fault = Fault(item.field, item.reason)
        else:
            event_id, result, field, reason, status = next(results)
            if result in _STATUSES:
                duplicate = result == "duplicate"
                answer.duplicates += duplicate
                answer.accepted += not duplicate
                answer.results.append(ItemAnswer(index, event_id, _STATUSES[result], duplicate, status))
                continue
            fault = Fault(field or "body", reason or "refused by the database")
        answer.rejected += 1
        answer.results.append(ItemRefusal(index, fault))
    return answer


def _refusal(kept: Submitted) -> Problem:
    field, reason = kept.field or "body", kept.reason or "refused by the database"
    kind = "too-large" if kept.result == "too_large" else "refused"
    return Problem(kind, f"{field}: {reason}", errors=[(field, reason)])
