"""The id of an event, and the bucket in it. The SQL twin is sql/functions/10_clock_and_ids.sql."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from importlib import import_module
from typing import Any

from orchestrator.events.quoting import shown
from orchestrator.events.submission import Submission
from orchestrator.events.times import EARLIEST

EVENT_ID_HEADER = "orchestrator-event-id"
"""The header of a Kafka record that names the id of an event: in a submission, of one without an external id."""
_VARIANT = {f"{digit:x}": f"{digit & 0b0011 | 0b1000:x}" for digit in range(16)}
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def _fast_sha256() -> Callable[[bytes], Any]:
    """Python's own SHA-256: for a text as short as an id's, OpenSSL's takes twice as long."""
    for module in ("_sha2", "_sha256"):  # since 3.12, and before
        with suppress(ImportError):
            own: Callable[[bytes], Any] = import_module(module).sha256
            return own
    return hashlib.sha256


_sha256 = _fast_sha256()


def event_id(source: str, external_job_id: str, scheduled_at: datetime, ordering_key: str | None = None) -> str:
    """The id of the event with this source, external id, time and ordering key: the same in every process and in SQL.

    A UUID laid out like version 7 (RFC 9562, 5.7): the millisecond of `scheduled_at`, the bucket, then bits of a
    SHA-256 over the four. The lengths keep ("a", "bc") and ("ab", "c") apart.
    """
    micros = _micros(scheduled_at)
    name, job = source.encode(), external_job_id.encode()
    if ordering_key is None:
        key, text = job, b"%d:%d:%b%b" % (micros, len(name), name, job)
    else:
        key = ordering_key.encode()
        text = b"k%d:%d:%d:%b%b%b" % (micros, len(name), len(job), name, job, key)
    return _uuid(micros // 1000, _sha256(key).hexdigest()[:3], _sha256(text).hexdigest()[4:20])


def random_event_id(scheduled_at: datetime, bucket: int | None = None) -> str:
    """An id for an event without an external id: the millisecond of `scheduled_at`, the bucket, then random bits.

    The bucket is from 0 to 4095, by default random too.
    """
    drawn = os.urandom(10).hex()
    return _uuid(_micros(scheduled_at) // 1000, drawn[17:] if bucket is None else f"{bucket:03x}", drawn[:16])


def bucket_of_key(key: str) -> int:
    """The bucket, 0 to 4095, of the events of an ordering key, or of an external id without one.

    The first 12 bits of its SHA-256.
    """
    return int(_sha256(key.encode()).hexdigest()[:3], 16)


def bucket(identity: str) -> int:
    """The bucket that an event id holds: `bucket_of_key` of its ordering key, else its external id, else random."""
    return int(identity[15:18], 16)


def given_id_fault(given_id: str, submission: Submission) -> str | None:
    if submission.external_job_id is not None:
        return "expected no such header on an event with an external_job_id: its id is computed"
    if _ID.fullmatch(given_id) is None or given_id[:13] != submission.id[:13]:
        expected = f"{submission.id[:13]}-7xxx-yxxx-xxxxxxxxxxxx, in lower case with y from 8 to b"
        return f"expected an id of the form {expected}, got {shown(given_id)!r}"
    return None


def _micros(at: datetime) -> int:
    since = at - EARLIEST
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _uuid(millis: int, bucket: str, tail: str) -> str:
    """The 48 bits of `millis`, the version, `bucket`, and `tail`, 16 hex digits with the variant over two bits."""
    time = f"{millis:012x}"
    return f"{time[:8]}-{time[8:]}-7{bucket}-{_VARIANT[tail[0]]}{tail[1:4]}-{tail[4:]}"
