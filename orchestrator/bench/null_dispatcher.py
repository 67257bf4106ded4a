"""A dispatcher whose deliveries do nothing: it measures the database and the dispatcher alone.

``python -m orchestrator.bench.null_dispatcher``, configured by the environment as ``orchestrator dispatch`` is.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time
from pathlib import Path
from typing import TextIO

import uvloop

from orchestrator import logs
from orchestrator.database import Leases
from orchestrator.dispatch.attempt import DELIVERED, RETRY, Attempted
from orchestrator.dispatch.dispatcher import Dispatcher
from orchestrator.dispatch.http.sender import Delivery
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings

_DELIVERED = Attempted(DELIVERED, 204)
_FAILED = Attempted(RETRY, 503)


class NullSender:
    """Every `fail_every`-th attempt fails."""

    def __init__(self, fail_every: int = 0) -> None:
        self._fail_every = fail_every
        self._attempts = 0

    async def send(self, _delivery: Delivery) -> Attempted:
        self._attempts += 1
        return _FAILED if self._fail_every and self._attempts % self._fail_every == 0 else _DELIVERED


class WithoutFloors(Dispatcher):
    """A dispatcher that never raises floors, to show their use."""

    async def _raise_floors(self, _leases: Leases) -> None:
        await asyncio.Event().wait()


def _note_claims(metrics: Metrics, notes: TextIO) -> None:
    """Writes a line for each claim: its end in Unix seconds and its duration in seconds."""
    observe = metrics.claim_seconds.observe

    def note(seconds: float) -> None:
        observe(seconds)
        notes.write(f"{time.time()} {seconds}\n")

    metrics.claim_seconds.observe = note  # type: ignore[method-assign, assignment]


async def _main(arguments: argparse.Namespace) -> None:
    settings = Settings.from_env(os.environ)
    logs.configure(settings, "null dispatcher")
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    metrics = Metrics(settings)
    dispatcher = WithoutFloors if arguments.no_floors else Dispatcher
    if arguments.claims is None:
        await dispatcher(settings, metrics, NullSender(arguments.fail_every)).run(stop)
        return
    # Each process has its own file, and writes each line at once.
    with (arguments.claims / str(os.getpid())).open("w", buffering=1) as notes:
        _note_claims(metrics, notes)
        await dispatcher(settings, metrics, NullSender(arguments.fail_every)).run(stop)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Claims and finishes events without delivering them.")
    parser.add_argument("--fail-every", type=int, default=0, help="one attempt in N fails; 0: none")
    parser.add_argument("--claims", type=Path, help="directory for a file with the duration of each claim")
    parser.add_argument("--no-floors", action="store_true", help="never call raise_floors()")
    uvloop.run(_main(parser.parse_args()))
