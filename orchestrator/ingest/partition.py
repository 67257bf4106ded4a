"""What a consumer knows about one partition, and when it must halt.

The database says at which offset to read on. The topic counts as the one that was read before if the log begins no
later and ends no earlier than that offset, and if the last record read, the anchor, is still the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.database.ingestion import Move, Position


class ConsumedRecord(Protocol):
    """What the ingester uses of a consumed record; the names are aiokafka's."""

    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]: ...


def record_hash(record: ConsumedRecord) -> int:
    """A hash of timestamp, key and value that fits a bigint."""
    digest = hashlib.blake2b(b"%d" % record.timestamp, digest_size=8)
    for part in (record.key, record.value):
        digest.update(b"-" if part is None else b"%d:%b" % (len(part), part))
    return int.from_bytes(digest.digest(), "big", signed=True)


class HaltError(Exception):
    """A partition must not be read on until an operator has decided; the text says why.

    `may_pass`: or until its log fits again, as it may after a change of leaders. Who catches it calls `Partition.halt`.
    """

    def __init__(self, why: str, *, may_pass: bool = False) -> None:
        self.may_pass = may_pass
        super().__init__(why)


@dataclass
class Partition:
    """One partition of the current assignment."""

    topic: str
    number: int
    begun: bool = False
    """Whether the database has a position for it, or a batch under way gives it one."""
    next_offset: int = 0
    """The first offset that has not been taken into a batch."""
    anchor: tuple[int, int] | None = None
    """Offset and hash of the last record before `next_offset`; None: unknown."""
    unproved: tuple[int, int] | None = None
    """The anchor, until the log has shown that it still holds it."""
    halt_reason: str | None = None
    """Why it is not read, for the operator; None: it is not halted."""
    may_pass: bool = False
    """Whether the halt may pass by itself."""
    failures: int = 0
    """How often in a row its next records could not be read."""

    def place(self, position: Position | None, begins: int, ends: int) -> int:
        """Takes over the database's position, and returns the offset to read from. Raises HaltError.

        If the log may still hold the anchor, it is read from there: its first record proves whether it is the same log.
        """
        self.begun = position is not None
        if position is None:
            self.next_offset = begins
            return begins
        self.next_offset = position.next_offset
        if position.anchor_offset is not None and position.anchor_hash is not None:
            self.anchor = position.anchor_offset, position.anchor_hash
        if ends < position.next_offset:
            raise HaltError(
                f"the log ends at offset {ends}, before it: the topic was recreated or truncated", may_pass=True
            )
        if begins > position.next_offset:
            raise HaltError(f"the log begins at offset {begins}, after it: records were deleted before they were read")
        return self.doubt() if self.anchor is not None and begins <= self.anchor[0] else self.next_offset

    def doubt(self) -> int:
        """Demands that the log proves the anchor again; returns the offset to read from."""
        self.unproved = self.anchor
        return self.next_offset if self.anchor is None else self.anchor[0]

    def fresh(self, records: Sequence[ConsumedRecord]) -> Sequence[ConsumedRecord]:
        """Those of the records that were not read before.

        Raises HaltError when another record is in the place of the anchor.
        """
        if not records:
            return records
        if self.unproved is not None:
            offset, expected = self.unproved
            if records[0].offset == offset and record_hash(records[0]) != expected:
                raise HaltError(f"the record at offset {offset} is not the one that was read: the topic was recreated")
            self.unproved = None  # or compaction has removed it
        if records[0].offset >= self.next_offset:
            return records
        return [record for record in records if record.offset >= self.next_offset]

    def halt(self, error: HaltError) -> None:
        """Notes that it is not read, and what to tell the operator."""
        self.may_pass = error.may_pass
        self.halt_reason = (
            f"partition {self.number} of topic {self.topic} is halted at offset {self.next_offset}: {error}. "
            "To read on, say from where: "
            f"select orchestrator.set_ingest_offset('{self.topic}', {self.number}, <offset>)"
        )

    def position(self) -> Position | None:
        """The position that the database should have."""
        if not self.begun:
            return None
        return Position(self.next_offset, *(self.anchor or (None, None)))


@dataclass
class Step:
    """How far a batch moves a partition."""

    partition: int
    expected: int | None
    next_offset: int
    anchor: tuple[int, int] | None

    def move(self) -> Move:
        offset, hashed = self.anchor or (None, None)
        return Move(self.partition, self.expected, self.next_offset, offset, hashed)


def take(steps: dict[int, Step], partition: Partition, records: Sequence[ConsumedRecord], next_offset: int) -> None:
    """Moves the partition, and its step in the batch, past the records to `next_offset`."""
    step = steps.get(partition.number)
    if step is None:
        expected = partition.next_offset if partition.begun else None
        step = steps[partition.number] = Step(partition.number, expected, next_offset, partition.anchor)
    if records:
        last = records[-1]
        partition.anchor = step.anchor = last.offset, record_hash(last)
    partition.begun = True
    partition.next_offset = step.next_offset = next_offset
