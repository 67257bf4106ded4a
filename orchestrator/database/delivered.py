"""Results as the table ``delivered_batch`` keeps them: arrays of what differs, in the order of the ids.

The longest arrays are binary, which PostgreSQL reads twice as fast as text: each element comes after its length.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from struct import pack
from typing import TYPE_CHECKING

from orchestrator.database.binary import Binary, array

if TYPE_CHECKING:
    from orchestrator.database.leases import Finished

MOST_EVENTS = 200
"""How many events a batch has at most: so many that their row fits a page."""

_STRETCH_MS = 10_000  # the ids of a batch begin with milliseconds of one such stretch, so that a look-up is bounded
_MOST_S = 2000.0  # an integer holds 2,147 s of microseconds


def is_plain(result: Finished) -> bool:
    """Whether a batch can keep it: delivered at the first attempt, without a remark, with a timer that has a place."""
    return (
        result.attempt == 1
        and result.result == "delivered"
        and result.timer is not None
        and result.waited is None
        and not result.error
        and not result.response
    )


def delivered_arguments(results: Sequence[Finished]) -> tuple[object, ...] | None:
    """What ``finish_delivered`` takes of plain results in the order of their ids, but for the worker.

    None: their times lie too far apart.
    """
    ids = [result.event_id for result in results]
    starts = list(_batches(ids))
    due = [result.due_at for result in results]
    dues = [due[start - 1 : end - 1] for start, end in pairwise([*starts, len(due) + 1])]
    first_due = [min(each) for each in dues]
    spans = [max(each) - first for each, first in zip(dues, first_due, strict=True)]
    claimed = [result.claimed_at for result in results]
    started = [result.started_at for result in results]
    finished = [result.finished_at for result in results]
    base = min(min(claimed), min(started), min(finished))
    if max(max(claimed), max(started), max(finished)) - base > _MOST_S or max(spans) > _MOST_S:
        return None
    microseconds = [result.scheduled_at[23:-3] for result in results]
    codes = [result.status_code for result in results]
    alike = codes.count(codes[0]) == len(codes)
    return (
        _uuids(ids),
        '{"' + '","'.join([result.timer or "" for result in results]) + '"}',
        _literal(starts),
        _literal([int(each.ljust(3, "0")) for each in microseconds]) if any(microseconds) else None,
        _literal(first_due),
        _offsets([time - first for each, first in zip(dues, first_due, strict=True) for time in each], 0.0)
        if any(spans)
        else None,
        base,
        _offsets(claimed, base) if max(claimed) > base else None,
        _offsets(started, base),
        _offsets(finished, base),
        codes[0] if alike else None,
        None if alike else "{" + ",".join(["null" if code is None else str(code) for code in codes]) + "}",
    )


def _batches(ids: Sequence[str]) -> Iterator[int]:
    """The positions, counted from 1, where batches of sorted ids begin."""
    start = 0
    while start < len(ids):
        yield start + 1
        ms = int(ids[start][:8] + ids[start][9:13], 16)
        after = f"{ms - ms % _STRETCH_MS + _STRETCH_MS:012x}"
        start = bisect_left(ids, f"{after[:8]}-{after[8:]}", start, min(start + MOST_EVENTS, len(ids)))


def _uuids(ids: Sequence[str]) -> Binary:
    elements = bytes.fromhex("00000010" + "00000010".join(ids).replace("-", ""))
    return array("uuid", len(ids), elements)


def _offsets(times_s: Sequence[float], base_s: float) -> Binary:
    """Microseconds since `base_s`, which is the first of the times. Each is packed with its length, 4, in front."""
    elements = [int((time_s - base_s) * 1e6 + (4 << 32) + 0.5) for time_s in times_s]
    return array("int4", len(elements), pack(f">{len(elements)}q", *elements))


def _literal(values: Sequence[float]) -> str:
    return "{" + str(values)[1:-1] + "}"
