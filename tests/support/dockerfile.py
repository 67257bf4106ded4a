"""The instructions of a Dockerfile."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.support.processes import ROOT

_HEALTH_CHECK_OPTION = re.compile(r"--(\w[\w-]*)=(\d+)s?")


def instructions(path: Path = ROOT / "Dockerfile") -> list[tuple[str, str]]:
    """Name and the rest of each, with lines that go on joined, and without comments."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in found]


def health_check() -> tuple[list[str], dict[str, int]]:
    """The command of the image's health check, and its options in seconds or as a number."""
    (check,) = [rest for name, rest in instructions() if name == "HEALTHCHECK"]
    options, _, command = check.partition(" CMD ")
    return json.loads(command), {name: int(value) for name, value in _HEALTH_CHECK_OPTION.findall(options)}
