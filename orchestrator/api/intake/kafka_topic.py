"""Puts submissions on the submission topic. They are the ingesters' from the brokers' acknowledgement on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from orchestrator.database import Submitted
from orchestrator.errors import KafkaUnavailable, OrchestratorError
from orchestrator.events.encoding import encode_submission
from orchestrator.events.ids import EVENT_ID_HEADER
from orchestrator.events.submission import Submission
from orchestrator.events.tracing import CORRELATION_ID_HEADER, TRACEPARENT_HEADER, followed
from orchestrator.kafka.bulk_producer import BulkProducer, bulk_producer
from orchestrator.kafka.partition_queues import OutgoingRecord, RecordRefusedError
from orchestrator.settings import Settings

SEND_TIMEOUT_S = 5.0
MAX_WAITING = 10_000

_READY_TIMEOUT_S = 2.0
_ANSWER_TIMEOUT_S = SEND_TIMEOUT_S + 1  # the producer gives up on each record before
_AWAY = "Kafka cannot be reached. Nothing was submitted; try again shortly."
_BUSY = "More submissions wait for Kafka than it keeps up with. Nothing was submitted; try again shortly."
_UNKNOWN = (
    "Kafka has not confirmed it, and may have it all the same. Submitting it again with the same source, "
    "external_job_id, scheduled_at and ordering_key is safe: it is kept once."
)

_log = logging.getLogger(__name__)


class _Sent:
    """The records of one request; `done` when the last of them has been acknowledged or has failed."""

    __slots__ = ("done", "errors", "left")

    def __init__(self, count: int) -> None:
        self.left = count
        self.errors: dict[int, OrchestratorError] = {}
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


_Item = tuple[_Sent, int]


class SubmissionTopic:
    """Made by `submission_topic`; `submit` may be called from any number of tasks at once."""

    def __init__(self, name: str, producer: BulkProducer[_Item]) -> None:
        self._name = name
        self._producer = producer
        self._waiting = 0

    async def submit(self, submissions: Sequence[Submission]) -> list[Submitted]:
        """Answers ``queued`` for each that the brokers have, ``too_large`` for each that they never take.

        Raises KafkaUnavailable, with a text for the client, unless all of them are known to be one or the other.
        """
        if self._waiting and self._waiting + len(submissions) > MAX_WAITING:
            raise KafkaUnavailable(_BUSY)
        self._waiting += len(submissions)
        try:
            errors = await self._send(submissions)
        finally:
            self._waiting -= len(submissions)
        if not errors:
            return [Submitted(submission.id, "queued") for submission in submissions]
        for n, error in errors.items():
            if not isinstance(error, RecordRefusedError):
                about = followed(submissions[n].id, submissions[n].correlation_id, submissions[n].traceparent)
                _log.warning("Kafka has not confirmed a submission", extra=about | {"error": str(error)})
                raise KafkaUnavailable(_UNKNOWN)
        return [
            _too_large(submission) if n in errors else Submitted(submission.id, "queued")
            for n, submission in enumerate(submissions)
        ]

    async def _send(self, submissions: Sequence[Submission]) -> dict[int, OrchestratorError]:
        """Why records failed, by their place in `submissions`."""
        try:
            async with asyncio.timeout(_READY_TIMEOUT_S):
                await self._producer.ready()
        except TimeoutError:
            raise KafkaUnavailable(_AWAY) from None
        if self._producer.away is not None:
            raise KafkaUnavailable(_AWAY)
        sent = _Sent(len(submissions))
        self._producer.send(self._name, [_record(submission, (sent, n)) for n, submission in enumerate(submissions)])
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                await sent.done
        except TimeoutError:
            raise KafkaUnavailable(_UNKNOWN) from None
        return sent.errors


def _record(submission: Submission, item: _Item) -> OutgoingRecord[_Item]:
    key = submission.ordering_key or submission.external_job_id or submission.id
    headers = [] if submission.external_job_id is not None else [(EVENT_ID_HEADER, submission.id.encode())]
    if submission.correlation_id is not None:
        headers.append((CORRELATION_ID_HEADER, submission.correlation_id.encode()))
    if submission.traceparent is not None:
        headers.append((TRACEPARENT_HEADER, submission.traceparent.encode()))
    return OutgoingRecord(key.encode(), encode_submission(submission), headers, item)


def _take_results(items: Sequence[_Item], error: OrchestratorError | None) -> None:
    for sent, place in items:
        if error is not None:
            sent.errors[place] = error
        sent.left -= 1
        if not sent.left and not sent.done.done():
            sent.done.set_result(None)


def _too_large(submission: Submission) -> Submitted:
    size = len(submission.payload)
    reason = f"its {size} bytes make the event larger than Kafka takes (max.message.bytes of the submission topic)"
    return Submitted(submission.id, "too_large", "payload", reason)


@asynccontextmanager
async def submission_topic(settings: Settings) -> AsyncIterator[SubmissionTopic]:
    """The topic with a producer that connects in the background: the API serves with or without Kafka."""
    async with bulk_producer(settings, "api", _take_results, timeout_s=SEND_TIMEOUT_S) as producer:
        yield SubmissionTopic(settings.topic_submission, producer)
