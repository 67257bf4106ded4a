"""The commands in the test's own process, and what they printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from click.testing import CliRunner, Result

from orchestrator.cli import main

Call = Callable[..., Result]


def invoke(*arguments: str, typed: str | None = None, env: dict[str, str] | None = None) -> Result:
    """Runs ``orchestrator …``; `typed` answers what it asks. Without settings that is enough for wrong usage."""
    return CliRunner().invoke(main, arguments, input=typed, env=env, prog_name="orchestrator")


def answer(result: Result, exit_code: int = 0) -> Any:
    """The one JSON document on standard output."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def told(result: Result) -> str:
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def refused(result: Result, exit_code: int = 1) -> str:
    """The one line on standard error of a command that printed nothing else."""
    assert (result.exit_code, result.stdout) == (exit_code, ""), result.output
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("Error: ").rstrip("\n")
