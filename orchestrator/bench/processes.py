"""The processes of a benchmark: servers of its own, the product's processes, and the tools written in C."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql

from orchestrator.database.migrate import migrate
from orchestrator.dev.postgres import EmbeddedPostgres
from orchestrator.errors import OrchestratorError

_RECORD = struct.Struct("=36sqq")
_STOP_S = 30.0
_FLUSH_S = 0.2  # then the receiver has written all its notes


@contextmanager
def database(given_url: str | None) -> Iterator[str]:
    """A migrated database: the given one, or one on an embedded server that is removed afterwards."""
    if given_url:
        migrate(given_url)
        yield given_url
        return
    with EmbeddedPostgres.temporary() as server:
        url = server.ensure_database("bench")
        migrate(url)
        yield url


@contextmanager
def another_database(database_url: str, name: str) -> Iterator[str]:
    """A migrated database on the same server, which is dropped afterwards."""
    parts = urlsplit(database_url)
    database = f"{parts.path.lstrip('/')}_{name}"
    url = urlunsplit(parts._replace(path=f"/{database}"))
    with psycopg.connect(database_url, autocommit=True) as server:
        server.execute(sql.SQL("create database {}").format(sql.Identifier(database)))
        try:
            migrate(url)
            yield url
        finally:
            server.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(database)))


@contextmanager
def product(arguments: list[str], environ: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the product, stopped as an operator would stop it; it logs to standard error."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments], env=dict(environ), stdin=subprocess.DEVNULL, stdout=sys.stderr
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def rss_mib(process: subprocess.Popen[bytes]) -> float:
    """The peak resident memory of the process so far, in MiB."""
    with suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    return 0.0


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float, every_s: float = 0.02) -> None:
    """Raises OrchestratorError, which names `what`, if the condition does not become true in time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise OrchestratorError(f"bench: {what} took more than {timeout_s:g} s")
        time.sleep(every_s)


@contextmanager
def compiled(name: str) -> Iterator[Path]:
    """The C program of that name in this folder, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OrchestratorError(
            "bench: its receiver and load are C programs; install a C compiler (apt-get install gcc)"
        )
    with tempfile.TemporaryDirectory(prefix="orchestrator-bench-") as folder:
        program = Path(folder) / name
        source = Path(__file__).with_name(f"{name}.c")
        command = [compiler, "-O2", "-o", str(program), str(source)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode != 0:
            cure = "apt-get install gcc libc6-dev"
            raise OrchestratorError(f"bench: {compiler} cannot compile {source.name} ({cure}):\n{done.stderr.strip()}")
        if not os.access(program, os.X_OK):
            raise OrchestratorError(f"bench: no program may run in {folder} (mounted noexec?); set TMPDIR to another")
        yield program


class Request(NamedTuple):
    """A delivery as the receiver saw it, in Unix seconds; it ended by the answer or by the sender going away."""

    event_id: str
    arrived: float
    ended: float


class Receiver:
    """A webhook receiver in C that notes every delivery. It hears all of 127.0.0.0/8.

    It answers at once, under /wait-MS/ after MS milliseconds, and under /hang never.
    """

    def __init__(self, port: int, records: Path) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._records = records

    def name(self, host: int) -> str:
        """One of many destinations: 127.0.0.0 + `host`, and the port."""
        return f"127.0.{host >> 8}.{host & 255}:{self.port}"

    def count(self) -> int:
        return self._records.stat().st_size // _RECORD.size

    def requests(self) -> list[Request]:
        """Every delivery that has ended by now, in the order of their arrival."""
        time.sleep(_FLUSH_S)
        data = self._records.read_bytes()
        usable = memoryview(data)[: len(data) - len(data) % _RECORD.size]
        made = [
            Request(name.decode(), arrived / 1e9, ended / 1e9) for name, arrived, ended in _RECORD.iter_unpack(usable)
        ]
        return sorted(made, key=lambda request: request.arrived)

    def arrivals(self) -> list[tuple[str, float]]:
        """Event id and Unix time of each delivery, in the order of their arrival."""
        return [(request.event_id, request.arrived) for request in self.requests()]


@contextmanager
def receiver() -> Iterator[Receiver]:
    """Starts a receiver on a free port."""
    with compiled("receiver") as program:
        records = program.with_name("records")
        process = subprocess.Popen([program, records], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            if process.stdout is None or not (line := process.stdout.readline()):
                raise OrchestratorError("bench: the receiver did not start")
            yield Receiver(int(line), records)
        finally:
            process.communicate(timeout=_STOP_S)
