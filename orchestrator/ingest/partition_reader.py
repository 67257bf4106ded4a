"""Reads the partitions of one assignment, from the database's offsets until an offset is in doubt.

While one batch is written, the next is fetched and parsed. It holds the records that have come meanwhile, within
bounds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from orchestrator.ingest.health import HaltReports, StallWatch
from orchestrator.ingest.partition import ConsumedRecord, HaltError, Partition, Step, take
from orchestrator.ingest.source import Fetched, Source, UnreadableError
from orchestrator.ingest.writer import Writable, Writer
from orchestrator.metrics import Metrics
from orchestrator.tasks import end

_SLICE_RECORDS = 250  # parsed at a time; in between, writing the batch before goes on
_SLICE_BYTES = 256 << 10
_LINGER_S = 0.01
_IDLE_S = 0.5
_TICK_S = 1.0
_REFETCH_S = 0.1
_POLLS = 20
_UNREADABLE_TRIES = 6
_ENDING_S = 5.0
_MIRRORED_S = 1.0

_log = logging.getLogger(__name__)


class Batch(Writable, Protocol):
    """A batch of submissions or of commands."""

    size_bytes: int

    @property
    def full(self) -> bool: ...

    def add(self, records: Sequence[ConsumedRecord]) -> None:
        """Parses records; never raises, whatever they hold."""


class PartitionReader:
    """Call `run`, then `settle` even if `run` has raised. Drops records in memory: the database has the offsets."""

    def __init__(
        self,
        topic: str,
        source: Source,
        writer: Writer,
        watch: StallWatch,
        halt_reports: HaltReports,
        metrics: Metrics,
        new_batch: Callable[[], Batch],
    ) -> None:
        self._topic = topic
        self._source = source
        self._writer = writer
        self._watch = watch
        self._halt_reports = halt_reports
        self._lag = metrics.ingest_lag
        self._position = metrics.ingest_position
        self._new_batch = new_batch
        self._partitions: dict[int, Partition] = {}
        self._turns: deque[int] = deque()
        self._batch = new_batch()
        self._steps: dict[int, Step] = {}
        self._pending_since_s = 0.0
        self._writing: asyncio.Task[None] | None = None
        self._written: dict[int, int] = {}
        self._ticked_s = 0.0
        self._polls = 0
        self._slice = _SLICE_RECORDS

    async def run(self) -> None:
        """Reads until the group assigns other partitions, or a halted one may be read on.

        Raises OffsetsMovedError when another consumer has written a batch first, and what `Source` and `StallWatch` do.
        """
        await self._place()
        while not self._source.moved:
            self._note_written()
            if time.monotonic() > self._ticked_s + _TICK_S:
                self._ticked_s = time.monotonic()
                self._tick()
                if self._writing is None:
                    await self._writer.keep_aside()
                if await self._may_go_on():
                    return
            if self._steps and self._writing is None and self._ripe():
                self._write()
            if self._batch.full:
                await self._wait_for_writing(_TICK_S)
            elif not await self._fetch():
                await self._rest()

    async def settle(self) -> None:
        """Waits for the batch under way to end, written or not."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            await asyncio.wait([writing], timeout=_ENDING_S)
            await end(writing)
            if writing.done() and not writing.cancelled() and (error := writing.exception()):
                _log.debug("a batch was not written", extra={"error": str(error)})
        await self._source.mirrored(_MIRRORED_S)
        self._source.mirror(self._written)
        await self._source.mirrored(_MIRRORED_S)
        for number in self._partitions:
            self._lag.remove(self._topic, number)
            self._position.remove(self._topic, number)

    # Where to read

    async def _place(self) -> None:
        """Places the assigned partitions at the database's offsets, and halts those whose log does not fit."""
        source = self._source
        numbers = source.assignment()
        positions = await self._writer.positions()
        bounds = await source.bounds(numbers)
        if source.moved:
            return
        for number in numbers:
            partition = self._partitions[number] = Partition(self._topic, number)
            try:
                source.place(number, partition.place(positions.get(number), *bounds[number]))
            except HaltError as error:
                self._halt(partition, error)
            self._position.labels(self._topic, number).set(partition.next_offset)
        self._turns.extend(numbers)
        _log.info("reading partitions %s of %s", numbers, self._topic)
        self._tick()

    def _halt(self, partition: Partition, error: HaltError) -> None:
        self._source.pause(partition.number, partition.next_offset)
        partition.halt(error)

    async def _may_go_on(self) -> bool:
        """Whether a halted partition can be read on: an operator has set its offset, or its log fits again."""
        if all(p.halt_reason is None for p in self._partitions.values()):
            return False
        await self._wait_for_writing(_TICK_S)
        self._note_written()
        if self._writing is not None:
            return False
        halted = [p for p in self._partitions.values() if p.halt_reason and p.number not in self._steps]
        positions = await self._writer.positions()
        if any(positions.get(p.number) != p.position() for p in halted):
            return True
        bounds = await self._source.bounds([p.number for p in halted if p.may_pass])
        return any(bounds[p.number][0] <= p.next_offset <= bounds[p.number][1] for p in halted if p.may_pass)

    # Reading

    async def _fetch(self) -> bool:
        """Adds a slice of the fetched records of each partition in turn. False: there were none."""
        found = False
        for _ in range(len(self._turns)):
            if self._source.moved or self._batch.full:
                break
            partition = self._partitions[self._turns[0]]
            self._turns.rotate(-1)  # otherwise a full batch would always hold the first partitions
            if partition.halt_reason is not None:
                continue
            try:
                limit = max(1, self._slice >> 2 * partition.failures)
                fetched = await self._source.read(partition.number, limit)
            except UnreadableError as error:
                # The records before it can be read; smaller slices lead up to it.
                partition.failures += 1
                if partition.failures == _UNREADABLE_TRIES:
                    self._halt(partition, HaltError(f"its records cannot be read: {error}"))
                continue
            if fetched is not None and self._add(fetched):
                found = True
                partition.failures = 0
                await asyncio.sleep(0)
        return found

    async def _rest(self) -> None:
        """Waits for records, or for the batch under way."""
        if self._polls > 0:
            self._polls -= 1
            await asyncio.sleep(_REFETCH_S)
        elif not self._steps:
            try:
                fetched = await self._source.wait(_IDLE_S)
            except UnreadableError:
                self._polls = _POLLS  # `_fetch` meets the error again, and knows its partition
            else:
                if fetched is not None:
                    self._add(fetched)
        elif self._writing is not None:
            await self._wait_for_writing(_LINGER_S)
        else:
            await asyncio.sleep(max(0.0, self._pending_since_s + _LINGER_S - time.monotonic()))

    def _add(self, fetched: Fetched) -> bool:
        """Takes records into the batch; whether there were any."""
        partition = self._partitions[fetched.partition]
        if self._source.lost_sight(partition.number):
            self._source.place(partition.number, partition.doubt())
            return False
        try:
            records = partition.fresh(fetched.records)
        except HaltError as error:
            self._halt(partition, error)
            return False
        if fetched.next_offset <= partition.next_offset:
            return False
        if not self._steps:
            self._pending_since_s = time.monotonic()
        before_bytes = self._batch.size_bytes
        self._batch.add(records)
        take(self._steps, partition, records, fetched.next_offset)
        if records:
            record_bytes = max(1, (self._batch.size_bytes - before_bytes) // len(records))
            self._slice = max(1, min(_SLICE_RECORDS, _SLICE_BYTES // record_bytes))
        return bool(records)

    # Writing

    def _ripe(self) -> bool:
        return self._batch.full or time.monotonic() >= self._pending_since_s + _LINGER_S

    def _write(self) -> None:
        self._writing = asyncio.create_task(self._write_batch(self._batch, self._steps), name="write")
        self._batch, self._steps = self._new_batch(), {}

    async def _write_batch(self, batch: Batch, steps: Mapping[int, Step]) -> None:
        await self._writer.write(batch, [step.move() for step in steps.values()])
        for step in steps.values():
            self._written[step.partition] = step.next_offset
            self._position.labels(self._topic, step.partition).set(step.next_offset)

    async def _wait_for_writing(self, timeout_s: float) -> None:
        if self._writing is not None:
            await asyncio.wait([self._writing], timeout=timeout_s)

    def _note_written(self) -> None:
        """Raises OffsetsMovedError when the batch was not written because another consumer had read its records."""
        if self._writing is not None and self._writing.done():
            writing, self._writing = self._writing, None
            writing.result()

    def _tick(self) -> None:
        self._source.mirror(self._written)
        partitions = list(self._partitions.values())
        self._halt_reports.update(partitions)
        for partition in partitions:
            end, _ = self._source.ends(partition.number)
            self._lag.labels(self._topic, partition.number).set(max(0, end - partition.next_offset))
        if not self._batch.full:  # otherwise the database is slow, not the consumer
            self._watch.look(self._source, [p for p in partitions if p.halt_reason is None])
