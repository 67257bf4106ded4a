"""A batch of submissions: each record becomes a row of COPY or a reject."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.database.ingestion import Ingestion, Move, Reject
from orchestrator.errors import ValidationError
from orchestrator.events.encoding import EncodedRow
from orchestrator.events.ids import EVENT_ID_HEADER
from orchestrator.events.parsing import submission_row
from orchestrator.events.topics import topic_rules
from orchestrator.events.tracing import CORRELATION_ID_HEADER, TRACEPARENT_HEADER, Carried, carried
from orchestrator.ingest.partition import ConsumedRecord
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings

_MAX_RECORDS = 10_000


class Submissions:
    """Up to 10,000 records, or `max_bytes` of them and one more."""

    def __init__(self, settings: Settings, metrics: Metrics, max_bytes: int) -> None:
        self._settings = settings
        self._topics = topic_rules(settings)
        self._metrics = metrics
        self._max_bytes = max_bytes
        self._rows: list[EncodedRow] = []
        self._kept: list[ConsumedRecord] = []
        self._rejects: list[Reject] = []
        self.size_bytes = 0

    @property
    def full(self) -> bool:
        return len(self._rows) + len(self._rejects) >= _MAX_RECORDS or self.size_bytes >= self._max_bytes

    def add(self, records: Sequence[ConsumedRecord]) -> None:
        """Parses records; what is wrong with one becomes its reject."""
        limits, rows, kept = self._settings, self._rows, self._kept
        size_bytes = 0
        for record in records:
            value = record.value
            try:
                if value is None:
                    raise ValidationError("body", "expected a submission, got a record without a value")
                size_bytes += len(value)
                given_id, told = _told(record) if record.headers else (None, None)
                rows.append(submission_row(value, limits, len(rows), given_id, self._topics, told))
            except ValidationError as error:
                self._rejects.append(reject(record, error.field, error.reason))
            else:
                kept.append(record)
        self.size_bytes += size_bytes

    async def write(self, database: Ingestion, topic: str, moves: Sequence[Move]) -> None:
        """Keeps everything in one transaction."""
        done = await database.submit(
            topic, moves, self._rows, self._rejects, lambda n, field, reason: reject(self._kept[n], field, reason)
        )
        self._metrics.events_received_total("kafka").inc(len(self._rows) + len(self._rejects))
        self._metrics.submissions_set_aside_total("kafka").inc(len(self._rows) - sum(done))
        self._metrics.events_persisted_total("kafka").inc(done.accepted)
        self._metrics.events_duplicate_total.inc(done.duplicates)
        self._metrics.events_rejected_total.inc(len(self._rejects) + done.refused)


def _told(record: ConsumedRecord) -> tuple[str | None, Carried | None]:
    """What the headers say: the id, and what the event is followed by; of one that is repeated, the first."""
    headers = {name: value or b"" for name, value in reversed(record.headers)}
    given_id = headers.get(EVENT_ID_HEADER)
    told = carried(headers.get(CORRELATION_ID_HEADER), headers.get(TRACEPARENT_HEADER))
    return None if given_id is None else given_id.decode(errors="replace"), told


def reject(record: ConsumedRecord, field: str, reason: str) -> Reject:
    return Reject(record.partition, record.offset, record.key, record.value, field, reason)
