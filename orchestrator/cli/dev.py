"""``dev``: everything on this machine, and a first delivery to watch."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import sys
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from orchestrator.cli.support import console, duration, environ, json_option, plain, print_json
from orchestrator.errors import KafkaUnavailable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from orchestrator.dev.receiver import Webhook
    from orchestrator.dev.stack import Stack
    from orchestrator.dispatch.http.signing import Signer

RECEIVER_PORT = 9099
_POLL_S = 0.05
_BODY_CHARS = 200


@click.command()
@json_option
def dev(as_json: bool) -> None:
    """Run everything on this machine, including a database.

    Without DATABASE_URL or DB_HOST it starts an embedded PostgreSQL 18. The data is kept between runs in .orchestrator/
    of a checkout, or in ~/.local/state/scheduled-event-orchestrator. Without KAFKA_BOOTSTRAP_SERVERS it starts a
    Kafka-compatible broker that keeps nothing. A small receiver prints each webhook it gets. With --json it prints the
    addresses as one document, and webhooks on standard error. Ctrl-C stops everything.
    """
    from orchestrator import logs
    from orchestrator.dev.stack import prepared, take_the_rest
    from orchestrator.runtime import serve

    notes = console(stderr=True)
    with ExitStack() as running:
        with notes.status("starting the database and the broker …"):
            stack = running.enter_context(prepared(environ()))
        logs.configure(stack.settings, "dev")
        serve(stack.settings, "run", beside=[lambda stop: _greet_and_receive(stack, as_json, stop)])
        if stack.kafka_in_memory:
            with suppress(KafkaUnavailable):  # of another `dev`, which has ended with it
                asyncio.run(take_the_rest(stack.settings))
    notes.print("Stopped." if stack.data_dir is None else "Stopped. The data is kept for the next run.")


async def _greet_and_receive(stack: Stack, as_json: bool, stop: asyncio.Event) -> None:
    """Receives and prints webhooks; prints all addresses as soon as the API listens."""
    from orchestrator.dev.receiver import listen
    from orchestrator.dispatch.http.signing import Signer

    out = console(stderr=as_json)
    signer = Signer(stack.settings.webhook_secrets)

    def show(webhook: Webhook) -> None:
        out.print(_received(webhook, signer), soft_wrap=True)

    try:
        receiver = await listen(show, RECEIVER_PORT)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        receiver = await listen(show)
    async with receiver:
        address = f"http://127.0.0.1:{receiver.sockets[0].getsockname()[1]}"
        await _until_it_listens(stack, stop)
        if not stop.is_set():
            if as_json:
                print_json(_addresses(stack, address))
            else:
                _greet(out, stack, address)
            await stop.wait()


async def _until_it_listens(stack: Stack, stop: asyncio.Event) -> None:
    where = urlsplit(stack.api)
    while not stop.is_set():
        with suppress(OSError):
            _, writer = await asyncio.open_connection(where.hostname, where.port)
            writer.close()
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(_POLL_S):
                await stop.wait()


def _addresses(stack: Stack, receiver: str) -> dict[str, str | None]:
    return {
        "api": f"{stack.api}/api/v1/events",
        "openapi": f"{stack.api}/openapi.json",
        "health": f"{stack.management}/health",
        "metrics": f"{stack.management}/metrics",
        "database_url": stack.settings.database_url,
        "kafka": stack.settings.kafka_servers,
        "receiver": receiver,
        "data_dir": None if stack.data_dir is None else str(stack.data_dir),
    }


def _greet(out: Console, stack: Stack, receiver: str) -> None:
    from rich.table import Table
    from rich.text import Text

    addresses = _addresses(stack, receiver)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    kafka = addresses["kafka"]
    if stack.kafka_in_memory:
        kafka = f"{kafka}, which forgets everything when it ends"
    for name, value in (
        ("API", addresses["api"]),
        ("OpenAPI", addresses["openapi"]),
        ("health", addresses["health"]),
        ("metrics", addresses["metrics"]),
        ("receiver", f"{receiver} prints each webhook below"),
        ("Kafka", kafka),
        ("data", addresses["data_dir"]),
    ):
        if value is not None:
            table.add_row(name, Text(value))
    out.print()
    out.print(table)
    exports = [f"export DATABASE_URL='{addresses['database_url']}'"]
    if stack.settings.kafka_servers is not None:
        idempotence = str(stack.settings.kafka_idempotence).lower()
        exports.append(f"export KAFKA_BOOTSTRAP_SERVERS={stack.settings.kafka_servers} KAFKA_IDEMPOTENCE={idempotence}")
    # Lines to be copied are never wrapped.
    for heading, line in (
        (
            "Look at the data from another terminal, with psql or the other commands:",
            "\n".join((*exports, 'psql "$DATABASE_URL"', f"{_command()} stats")),
        ),
        ("Send an event that is due in five seconds:", first_curl(stack.api, receiver)),
    ):
        out.print(f"\n[bold]{heading}[/]")
        out.print(Text(line, style="cyan"), soft_wrap=True)
    out.print("\nCtrl-C stops everything.\n")


def _command() -> str:
    """How to call this program from the directory it was started in."""
    found, ours = shutil.which("orchestrator"), Path(sys.argv[0])
    if found is not None and os.path.samefile(found, ours):
        return "orchestrator"
    return str(ours.relative_to(Path.cwd()) if ours.is_relative_to(Path.cwd()) else ours)


def first_curl(api: str, receiver: str) -> str:
    """A command for any shell with curl: an event for the receiver, due in five seconds."""
    return (
        f"curl -sS {api}/api/v1/events -H 'Content-Type: application/json' -d '{{\n"
        '  "source": "first-steps",\n'
        """  "scheduled_at": "'"$(date -u -d @$(($(date +%s) + 5)) +%Y-%m-%dT%H:%M:%SZ)"'",\n"""
        f'  "destination": "{receiver}/hello",\n'
        '  "payload": {"hello": "world"}}\''
    )


def _received(webhook: Webhook, signer: Signer) -> Text:
    """One line: when, the path, how late, whether the signature is right, and the start of the payload."""
    from rich.text import Text

    arrived = datetime.fromtimestamp(webhook.arrived_at, UTC)
    clock = arrived.astimezone().strftime("%H:%M:%S.") + f"{arrived.microsecond // 1000:03d}"
    line = Text.assemble((f"{clock} ", "dim"), ("webhook ", "bold green"), plain(webhook.path), "  ", plain(webhook.id))
    attempt = webhook.headers.get("orchestrator-attempt", "")
    line.append(f"  attempt {plain(attempt)}" if attempt not in ("", "1") else "")
    with suppress(ValueError):
        scheduled = datetime.fromisoformat(webhook.headers.get("orchestrator-scheduled-at", ""))
        late_s = (arrived - scheduled).total_seconds()
        line.append(f"  {duration(abs(late_s))} {'after' if late_s >= 0 else 'before'} its time")
    signed = webhook.is_signed_by(signer)
    line.append("  signature ok" if signed else "  signature missing or wrong", style="" if signed else "red")
    body = webhook.body.decode("utf-8", "replace")
    with suppress(ValueError, RecursionError):
        body = json.dumps(json.loads(body), ensure_ascii=False)
    line.append(f"  {plain(body[:_BODY_CHARS])}{'…' if len(body) > _BODY_CHARS else ''}", style="cyan")
    return line
