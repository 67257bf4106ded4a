"""Finds the programs of others that only some tests need."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = ROOT / ".tools" / "bin"
"""Where `make test-tools` installs what Debian does not package."""


def tool(name: str) -> Path:
    """The program's path: in `.tools/bin` of the checkout, else in PATH. Skips the test when it is in neither."""
    found = shutil.which(name, path=str(BIN)) or shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed; `make test-tools` installs it")
    return Path(found)
