"""Shared by the commands: settings, a database, and two ways to print, for people and for machines."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from orchestrator.errors import OrchestratorError
from orchestrator.events.json_text import pruned
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.database import Database

T = TypeVar("T")

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")

_PIPED_WIDTH = 160  # of tables that no terminal bounds


def environ() -> dict[str, str]:
    """The environment that all settings come from."""
    return dict(os.environ)


def settings() -> Settings:
    """The settings in force. Raises SettingsError."""
    return Settings.from_env(environ())


def with_database(work: Callable[[Database, Settings], Awaitable[T]]) -> T:
    """Runs `work` with the configured database. Raises DatabaseUnavailable at once if it cannot be reached."""
    from orchestrator.database import Database, connect

    logging.getLogger("psycopg").setLevel(logging.CRITICAL)  # the error raised says it all
    few = replace(settings(), pool_min_idle=0, pool_max_size=2)

    async def run() -> T:
        # A pool would try for ten seconds, and then not say why it failed.
        await (await connect(few, "cli")).close()
        async with Database(few, role="cli") as database:
            return await work(database, few)

    return asyncio.run(run())


def console(*, stderr: bool = False) -> Console:
    """Output for people: a terminal, or a pipe that is wide enough to cut nothing."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal:
        made.width = _PIPED_WIDTH
    return made


def print_json(value: object) -> None:
    """Prints a value, or a text that is already JSON, as the only document on standard output."""
    click.echo(value if isinstance(value, bytes) else msgspec.json.encode(value))


_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def read_event(found: bytes) -> dict[str, Any]:
    """Decodes an event of the database. Its payload stays text, so that no number in it is too long.

    Values nested deeper than the decoder can go are replaced by ``0``. Raises OrchestratorError if that is not enough.
    """
    try:
        fields = _decode_fields(found)
    except RecursionError:
        flat = pruned(found)
        if flat is None:
            raise OrchestratorError("its payload is nested too deep to be shown; --json prints it unchanged") from None
        fields = _decode_fields(flat)
    return {name: bytes(raw).decode() if name == "payload" else json.loads(bytes(raw)) for name, raw in fields.items()}


def plain(text: object) -> str:
    """Text of others for a terminal: on one line, and without control characters."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def kept_before(status: str | None) -> str:
    """The sentence about a duplicate, with the state of its event unless that is scheduled."""
    said = "was accepted before and is unchanged"
    return said if status in (None, "scheduled") else f"{said}: it is {status.replace('_', ' ')}"


def target(delivery: Mapping[str, Any]) -> str:
    """The destination of an event or a dead letter, for people."""
    return str(delivery["destination"] or "the ready topic of Kafka")


def moment(text: str | None, *, now: datetime | None = None) -> str:
    """A time from the database for people: UTC to the millisecond, and how far from `now`."""
    if text is None:
        return ""
    at = datetime.fromisoformat(text).astimezone(UTC)
    shown = at.strftime("%Y-%m-%d %H:%M:%S.") + f"{at.microsecond // 1000:03d}Z"
    if now is None:
        return shown
    ahead_s = (at - now).total_seconds()
    return f"{shown} (in {duration(ahead_s)})" if ahead_s >= 0 else f"{shown} ({duration(-ahead_s)} ago)"


def duration(seconds: float) -> str:
    """``850 ms``, ``12.3 s``, ``4 min``, ``3.5 h``, ``12 days``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86_400:.0f} days"


def exit_with(ok: bool) -> None:
    """Ends the command: 0, or 1 for a failure that has been shown already."""
    if not ok:
        click.get_current_context().exit(1)
