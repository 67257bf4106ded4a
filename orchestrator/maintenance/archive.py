"""Writes partitions past retention to files before they are dropped: compressed CSV as COPY writes it, or Parquet.

A file gets its name when all of it is on disk; only then is the partition given up. A crash at any step leaves at most
a file that ends in ``.part``, which the next try starts again. An existing file is never overwritten.
"""

from __future__ import annotations

import asyncio
import filecmp
import gzip
import io
import itertools
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import psycopg

from orchestrator.database.maintenance import Buffer, MaintenanceProblem, Retired
from orchestrator.errors import DatabaseUnavailable, OrchestratorError
from orchestrator.settings import Settings

_PART = ".part"
_ENDING_S = 5.0

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Archived:
    """The files written, and the problems; a partition that failed stays until another try succeeds."""

    files: list[str] = field(default_factory=list)
    problems: list[MaintenanceProblem] = field(default_factory=list)


async def archive(settings: Settings) -> Archived:
    """Archives the partitions that wait for it, in a thread.

    Does nothing without ARCHIVE_DIRECTORY, or while another process archives. When cancelled, it gives up the partition
    under way. Raises DatabaseUnavailable.
    """
    if settings.archive_directory is None:
        return Archived()
    work = _Work(settings, Path(settings.archive_directory))
    thread = asyncio.create_task(asyncio.to_thread(work.run))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.to_thread(work.stop)
        await asyncio.wait((thread,), timeout=_ENDING_S)
        if thread.done() and not thread.cancelled():
            thread.exception()
        raise


class _StoppedError(Exception):
    """The process has to end."""


class _Work:
    def __init__(self, settings: Settings, directory: Path) -> None:
        self._settings = settings
        self._directory = directory
        self._retired: Retired | None = None
        self._stopping = threading.Event()

    def run(self) -> Archived:
        told = Archived()
        with suppress(_StoppedError), Retired.open(self._settings) as retired:
            self._retired = retired
            for name in retired.names() if retired.take() else []:
                self._check()
                try:
                    file = self._write(retired, name)
                    # Only once the file has its name on disk, where a crash of this machine cannot lose it.
                    retired.archived(name)
                except OSError as error:
                    reason = error.strerror or str(error)
                    told.problems.append(
                        MaintenanceProblem("archive", f"{name}: {self._directory}: {reason}; make room, or mend it")
                    )
                except _StoppedError:
                    raise
                except DatabaseUnavailable:
                    self._check()  # raises if `stop` ended the connection
                    raise
                except (OrchestratorError, psycopg.Error, ValueError) as error:
                    told.problems.append(MaintenanceProblem("archive", f"{name}: {error}"))
                else:
                    told.files.append(str(file))
                    _log.info("partition archived", extra={"partition": name, "file": str(file)})
        return told

    def stop(self) -> None:
        """Makes `run` end soon; call it from another thread."""
        self._stopping.set()
        if self._retired is not None:
            with suppress(psycopg.Error):
                self._retired.cancel()

    def _check(self) -> None:
        if self._stopping.is_set():
            raise _StoppedError

    def _write(self, retired: Retired, name: str) -> Path:
        for stale in self._directory.glob(f"{name}.*{_PART}"):
            stale.unlink()
        suffix = "parquet" if self._settings.archive_format == "parquet" else "csv.gz"
        part = self._directory / f"{name}.{suffix}{_PART}"
        try:
            with part.open("wb") as file:
                with (
                    _writer(self._settings.archive_format, file, retired, name) as (writer, header),
                    closing(retired.rows(name, header=header)) as rows,
                ):
                    for chunk in _chunks(rows, writer.chunk_bytes):
                        self._check()
                        writer.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            return _publish(part, self._directory, name, suffix)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def _publish(part: Path, directory: Path, name: str, suffix: str) -> Path:
    """Gives the file its name, durably. A different file of this name stays, and the new one gets a number.

    An existing file with the same content is taken for the new one: a crash came before its partition was given up.
    """
    numbered = (f"{name}.{n}.{suffix}" for n in itertools.count(2))
    for file in (directory / each for each in itertools.chain([f"{name}.{suffix}"], numbered)):
        if not file.exists():
            os.rename(part, file)
            break
        if filecmp.cmp(part, file, shallow=False):
            break
    number = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
    return file


def _chunks(rows: Iterable[Buffer], least_bytes: int) -> Iterator[bytearray]:
    """Chunks of whole rows, of at least `least_bytes` except the last."""
    chunk = bytearray()
    for row in rows:
        chunk += row
        if len(chunk) >= least_bytes:
            yield chunk
            chunk = bytearray()
    if chunk:
        yield chunk


class _Writer(Protocol):
    chunk_bytes: int

    def write(self, chunk: bytearray, /) -> None: ...


@contextmanager
def _writer(form: str, file: BinaryIO, retired: Retired, name: str) -> Iterator[tuple[_Writer, bool]]:
    """The writer of a format, and whether it needs the names of the columns in a first line."""
    if form == "parquet":
        with _parquet(file, retired.columns(name)) as writer:
            yield writer, False
    else:
        # No time in the header: the same rows make the same file.
        with gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=6, mtime=0) as compressed:
            yield _CsvWriter(compressed), True


class _CsvWriter:
    chunk_bytes = 1 << 18

    def __init__(self, file: gzip.GzipFile) -> None:
        self._file = file

    def write(self, chunk: bytearray) -> None:
        self._file.write(chunk)


@contextmanager
def _parquet(file: BinaryIO, columns: list[tuple[str, str]]) -> Iterator[_Writer]:
    """Each chunk becomes a row group. Types that Parquet lacks are text as PostgreSQL writes it."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    types = {
        "smallint": pyarrow.int16(),
        "integer": pyarrow.int32(),
        "bigint": pyarrow.int64(),
        "double precision": pyarrow.float64(),
        "boolean": pyarrow.bool_(),
        "timestamp with time zone": pyarrow.timestamp("us", "UTC"),
    }
    schema = pyarrow.schema([(name, types.get(kind, pyarrow.string())) for name, kind in columns])
    converted = pyarrow.csv.ConvertOptions(
        column_types=schema,
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,  # COPY quotes an empty string, and writes nothing for a null
        true_values=["t"],
        false_values=["f"],
    )

    class Writer:
        chunk_bytes = 1 << 24

        def write(self, chunk: bytearray) -> None:
            reading = pyarrow.csv.ReadOptions(column_names=schema.names, block_size=len(chunk) + 1, use_threads=False)
            table = pyarrow.csv.read_csv(
                io.BytesIO(chunk), reading, pyarrow.csv.ParseOptions(newlines_in_values=True), converted
            )
            made.write_table(table)

    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as made:
        yield Writer()
