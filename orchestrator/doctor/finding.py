"""One check and its result."""

from __future__ import annotations

from typing import Literal, NamedTuple

from orchestrator.settings import Settings

Level = Literal["ok", "warning", "problem"]


class Finding(NamedTuple):
    """`check` names the check, `what` says what it found, `mend` how to fix it (empty if nothing is wrong)."""

    level: Level
    check: str
    what: str
    mend: str = ""


def ok(check: str, what: str) -> Finding:
    return Finding("ok", check, what)


def warning(check: str, what: str, mend: str) -> Finding:
    return Finding("warning", check, what, mend)


def problem(check: str, what: str, mend: str) -> Finding:
    return Finding("problem", check, what, mend)


def is_production(settings: Settings) -> bool:
    return settings.environment.lower().startswith("prod")


def counted(count: int, noun: str) -> str:
    """``1 event``, ``2,000 events``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
