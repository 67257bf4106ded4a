"""Processes of the product that a development tool starts, and that end with it, however it ends."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Self

from orchestrator.dev.orphan_reaper import OrphanReaper
from orchestrator.errors import OrchestratorError

_STOP_S = 10.0
_SHOWN_CHARS = 2000


class ChildProcesses:
    """``python -m orchestrator …`` processes; leaving the context stops them all, the last started first."""

    def __init__(self) -> None:
        self._started: list[tuple[str, subprocess.Popen[bytes], IO[bytes]]] = []
        self._reapers: list[OrphanReaper] = []

    def start(self, arguments: Sequence[str], environ: Mapping[str, str]) -> None:
        """Starts one. It does not see a Ctrl-C: whoever owns it decides when it stops."""
        log = tempfile.TemporaryFile()  # noqa: SIM115  # has no name, so that it is gone with its users
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", *arguments],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._started.append((" ".join(arguments), process, log))
        self._reapers.append(OrphanReaper(process.pid))

    def check(self) -> None:
        """Raises OrchestratorError, with the end of its log, when one has ended."""
        for name, process, log in self._started:
            if process.poll() is not None:
                log.seek(0)
                said = log.read().decode(errors="replace").strip()[-_SHOWN_CHARS:]
                raise OrchestratorError(f"orchestrator {name} ended with {process.returncode}:\n{said}")

    def stop(self) -> None:
        """SIGTERM to all, SIGKILL to those that do not end in time."""
        for _, process, _ in reversed(self._started):
            process.terminate()
        deadline_s = time.monotonic() + _STOP_S
        for _, process, _ in self._started:
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for reaper in self._reapers:
            reaper.dismiss()
        for _, _, log in self._started:
            log.close()
        self._started.clear()
        self._reapers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
