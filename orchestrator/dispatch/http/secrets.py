"""Secrets that destinations name: files in SECRETS_DIRECTORY, as Kubernetes and Docker mount them.

Files may be replaced at any time; a change is noticed within a second.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.dispatch.http.signing import Signer
from orchestrator.errors import OrchestratorError, SettingsError
from orchestrator.events.headers import is_field_value
from orchestrator.own_faults import own_fault

SECRET_WAIT_S = 60.0
"""The least wait of an attempt whose secret is missing: an operator has to provide it."""
_LOOK_S = 1.0
_MAX_BYTES = 65_536
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SEPARATORS = re.compile(r"[,\s]+")

Version = tuple[int, int, int]


class SecretError(OrchestratorError):
    """A secret cannot be used. The text says which one and why, never its content."""


@dataclass(slots=True)
class _Kept:
    version: Version
    text: str
    looked_s: float
    signer: Signer | None = None


class Secrets:
    """Reads each file when it is first named, and again when it has changed.

    Raises OwnFaultError when this machine cannot open files.
    """

    def __init__(self, directory: str | None, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._directory = None if directory is None else Path(directory)
        self._monotonic = monotonic
        self._kept: dict[str, _Kept] = {}

    def header(self, name: str) -> str:
        """A secret as the value of a header, without blanks around it. Raises SecretError."""
        text = self._read(name).text
        if not text or not is_field_value(text):
            raise SecretError(f"secret {name}: expected one line of text in this file of SECRETS_DIRECTORY")
        return text

    def signer(self, name: str) -> Signer:
        """Signs with the whsec_ secrets of a file, separated by commas or lines, newest first. Raises SecretError."""
        kept = self._read(name)
        if kept.signer is None:
            keys = [key for key in _SEPARATORS.split(kept.text) if key]
            if not keys:
                raise SecretError(f"secret {name}: this file of SECRETS_DIRECTORY is empty")
            try:
                kept.signer = Signer(keys, f"{name} in SECRETS_DIRECTORY")
            except SettingsError as error:
                raise SecretError(str(error)) from None
        return kept.signer

    def _read(self, name: str) -> _Kept:
        if not _NAME.fullmatch(name):
            # It may be the secret itself: the text must not quote it.
            raise SecretError("a secret of this destination: not the name of a file in SECRETS_DIRECTORY")
        if self._directory is None:
            raise SecretError(f"secret {name}: SECRETS_DIRECTORY is not set for this dispatcher")
        now_s = self._monotonic()
        kept = self._kept.get(name)
        if kept is not None and now_s - kept.looked_s < _LOOK_S:
            return kept
        path = self._directory / name
        try:
            if kept is None or _version(path.stat()) != kept.version:
                kept = self._kept[name] = _Kept(*_contents(path), now_s)
        except (OSError, ValueError) as error:
            if fault := own_fault(error):
                raise fault from error
            self._kept.pop(name, None)
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise SecretError(f"secret {name}: cannot be read from SECRETS_DIRECTORY: {reason}") from None
        kept.looked_s = now_s
        return kept


def _version(status: os.stat_result) -> Version:
    return status.st_mtime_ns, status.st_size, status.st_ino


def _contents(path: Path) -> tuple[Version, str]:
    """Raises OSError or ValueError; neither quotes the file."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a file")
    with path.open("rb") as file:
        version = _version(os.fstat(file.fileno()))
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"longer than {_MAX_BYTES} bytes")
    try:
        return version, content.decode().strip()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
