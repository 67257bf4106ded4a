"""The interface of every broker for development and tests, and a broker that is a child process."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from orchestrator.dev.operating_system import until
from orchestrator.dev.orphan_reaper import OrphanReaper
from orchestrator.errors import OrchestratorError

_START_TIMEOUT_S = 90.0
_STOP_TIMEOUT_S = 20.0
_SHOWN_CHARS = 2000


class Broker(ABC):
    """One Kafka broker on this machine.

    `start`, `stop` and `kill` may follow one another in any order; `servers` stays the same. At the end call
    `close`, or use the object in a `with` statement, which starts it.
    """

    name: str
    """What runs, for people: ``Apache Kafka 4.3.1``."""
    servers: str
    """For KAFKA_BOOTSTRAP_SERVERS."""
    idempotent: bool
    """Whether producers may be idempotent (KAFKA_IDEMPOTENCE)."""
    transactions: bool
    keeps_data: bool
    """Whether topics and groups survive `stop` or `kill`, and `start`."""
    makes_topics: bool
    """Whether asking for a topic creates it."""

    @property
    def environ(self) -> dict[str, str]:
        """The settings of a program that uses this broker."""
        return {"KAFKA_BOOTSTRAP_SERVERS": self.servers, "KAFKA_IDEMPOTENCE": str(self.idempotent).lower()}

    @abstractmethod
    def start(self) -> Self:
        """Returns when clients can use it. Raises OrchestratorError when it does not start."""

    @abstractmethod
    def stop(self) -> None:
        """In order."""

    @abstractmethod
    def kill(self) -> None:
        """As a crash would."""

    @abstractmethod
    def close(self) -> None:
        """Ends it, and removes its data if that was temporary."""

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class BrokerProcess(Broker):
    """A broker that is a process, with its log and data in `directory` (None: a temporary one).

    It ends with this process, however that ends.
    """

    def __init__(self, directory: Path | None, *, parent: Path | None = None) -> None:
        self._temporary = directory is None
        if directory is None:
            directory = Path(tempfile.mkdtemp(prefix="orchestrator-kafka-", dir=parent))
        directory.mkdir(parents=True, exist_ok=True)
        self.directory: Path = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._reaper: OrphanReaper | None = None
        self._creator_pid = os.getpid()

    @property
    def log_file(self) -> Path:
        return self.directory / "broker.log"

    @property
    def pid(self) -> int | None:
        """None while it is down."""
        return self._process.pid if self._process is not None and self.is_running() else None

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @abstractmethod
    def _command(self) -> Sequence[str]:
        """What to run."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Whether clients can use it; only asked while the process runs."""

    def _environ(self) -> Mapping[str, str]:
        return {name: value for name, value in os.environ.items() if not name.startswith("KAFKA_")}

    def start(self) -> Self:
        if self.is_running():
            return self
        self._ended()
        atexit.register(self.close)
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.directory,
                env=dict(self._environ()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._reaper = OrphanReaper(self._process.pid, self.directory if self._temporary else None)
        for _ in until(_START_TIMEOUT_S):
            if not self.is_running():
                break
            if self._is_ready():
                return self
        self.kill()
        raise OrchestratorError(f"{self.name} does not start; its log ends with:\n{self._log_tail()}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._ended()

    def close(self) -> None:
        if os.getpid() != self._creator_pid:
            return  # a fork's exit is no reason to stop it
        atexit.unregister(self.close)
        if self._temporary:
            self.kill()
            shutil.rmtree(self.directory, ignore_errors=True)
        else:
            self.stop()

    def _ended(self) -> None:
        self._process = None
        if self._reaper is not None:
            self._reaper.dismiss()
            self._reaper = None

    def _log_tail(self) -> str:
        return self.log_file.read_text(errors="replace").strip()[-_SHOWN_CHARS:]
