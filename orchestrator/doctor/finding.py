"""One check and its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import psycopg

from orchestrator.errors import first_line
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


def guarded(check: str, findings: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings. An error of the database becomes a finding too, so that the other checks go on."""
    try:
        yield from findings()
    except psycopg.errors.InsufficientPrivilege as error:
        yield warning(check, f"cannot check: {first_line(error)}", "run this as a member of orchestrator_ops")
    except psycopg.Error as error:
        yield problem(check, f"cannot check: {first_line(error)}", "see the server's log")


def is_production(settings: Settings) -> bool:
    return settings.environment.lower().startswith("prod")


def counted(count: int, noun: str) -> str:
    """``1 event``, ``2,000 events``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: Sequence[str], count: int) -> str:
    """``a, b and 3 more``: the first names of `count`."""
    return ", ".join(names) + (f" and {count - len(names)} more" if count > len(names) else "")
