"""Real processes of the product, started, stopped, killed and paused by their process ids."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]


class Spawned:
    """``python -m orchestrator <arguments>`` of the checkout at `root`; what it prints goes to a file.

    Another `program` is started in `root` too.
    """

    def __init__(
        self,
        arguments: tuple[str, ...],
        env: Mapping[str, str],
        log_file: Path,
        *,
        root: Path = ROOT,
        program: tuple[str, ...] = (sys.executable, "-m", "orchestrator"),
    ) -> None:
        self.name = " ".join(arguments)
        self._log_file = log_file
        with log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [*program, *arguments],
                cwd=root,
                env=_inherited() | {"PYTHONUNBUFFERED": "1"} | dict(env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs, negative when a signal ended it."""
        return self._process.poll()

    def log(self) -> str:
        """Everything it has printed so far, standard error included."""
        return self._log_file.read_text(errors="replace")

    async def wait_for_log(self, text: str, timeout_s: float = 15.0) -> None:
        """Waits until it has printed the text; fails at once when it ends without."""

        def printed() -> bool:
            ended = self.returncode is not None
            found = text in self.log()
            if ended and not found:
                raise RuntimeError(f"{self.name} ended with {self.returncode}, without {text!r}:\n{self.log()}")
            return found

        await eventually(printed, timeout_s)

    async def wait(self, timeout_s: float = 30.0) -> int:
        """Waits for its end and returns its exit status."""
        await eventually(lambda: self.returncode is not None, timeout_s)
        assert self.returncode is not None
        return self.returncode

    async def stop(self, timeout_s: float = 30.0) -> int:
        """SIGTERM; returns the exit status when it has ended."""
        self._signal(signal.SIGTERM)
        return await self.wait(timeout_s)

    async def kill(self) -> None:
        """SIGKILL, which it cannot notice."""
        self._signal(signal.SIGKILL)
        await self.wait()

    def pause(self) -> None:
        """SIGSTOP: it stands still, keeping its connections."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def discard(self) -> None:
        """Makes sure that it has ended, paused or not."""
        self._signal(signal.SIGKILL)
        self._process.wait(10)

    def _signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)


def _inherited() -> dict[str, str]:
    """What a process needs of our environment, without settings that the developer happens to have."""
    names = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "PYTHONPATH", "SYSTEMROOT", "JDK_JAVA_OPTIONS")
    return {name: os.environ[name] for name in names if name in os.environ}
