"""``smoke``: sends an event through a running deployment, as a client would, and says what does not work."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from orchestrator.cli.smoke_run import KEY_VARIABLE, Plan, Step, run_smoke
from orchestrator.cli.support import console, environ, exit_with, json_option, plain, print_json
from orchestrator.errors import SettingsError
from orchestrator.settings import SETTINGS
from orchestrator.settings.secret_files import SecretFileError, read_secret_file

if TYPE_CHECKING:
    pass


def _http_url(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    try:
        parts = urlsplit(value)
        fit = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        fit = False
    if not fit or "@" in parts.netloc or not value.isprintable() or " " in value:
        raise click.BadParameter("expected http:// or https:// and a host, without a login in it")
    return value.rstrip("/")


def _address(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, int]:
    host, _, port = value.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise click.BadParameter(f"expected ADDRESS:PORT, got {value!r}")
    return host.strip("[]"), int(port)


@click.command()
@click.argument("url", callback=_http_url)
@click.option(
    "--management-url",
    callback=_http_url,
    metavar="URL",
    help="Where health and metrics are, if MANAGEMENT_SERVER_PORT keeps them apart.",
)
@click.option(
    "--listen",
    callback=_address,
    default="127.0.0.1:0",
    show_default=True,
    metavar="ADDRESS:PORT",
    help="Receive the event there. Port 0 takes any that is free.",
)
@click.option(
    "--callback-url",
    "callback",
    callback=_http_url,
    metavar="URL",
    help="How dispatchers reach --listen, if not at that address.",
)
@click.option(
    "--destination",
    callback=_http_url,
    metavar="URL",
    help="Deliver to this receiver instead; the API then says whether it took the event.",
)
@click.option("--topic", metavar="NAME", help="Deliver to this topic of Kafka instead.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"File that holds an API key with the scopes read and submit. Without it, {KEY_VARIABLE} may hold the key.",
)
@click.option(
    "--ca-file", type=click.Path(path_type=Path), metavar="FILE", help="File (PEM) of the authorities to trust."
)
@click.option(
    "--due-in",
    type=click.FloatRange(0.5, 300),
    default=3,
    show_default=True,
    metavar="SECONDS",
    help="How long from now the event is due.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(1, 3600),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="How long after that its delivery may take.",
)
@json_option
def smoke(
    url: str,
    management_url: str | None,
    listen: tuple[str, int],
    callback: str | None,
    destination: str | None,
    topic: str | None,
    api_key_file: Path | None,
    ca_file: Path | None,
    due_in: float,
    timeout: float,
    as_json: bool,
) -> None:
    """Send an event through a running deployment, and say what fails.

    URL is that of its API. Asks for health, submits an event that is due in a moment, sees it arrive, submits and
    cancels another, and reads the metrics. Exits with 1 at the first step that fails, and cancels what it has left
    behind; what cannot be cancelled expires.

    It receives the event itself, or names a --destination or --topic of yours. With WEBHOOK_SECRETS in its
    environment it also checks the signature.
    """
    if destination is not None and topic is not None:
        raise click.UsageError("--destination and --topic: expected one of them")
    try:
        secrets = SETTINGS["webhook_secrets"].read(environ())
    except ValueError as wrong:
        raise SettingsError(str(wrong)) from None
    plan = Plan(
        url=url,
        management_url=management_url or url,
        listen=listen,
        callback=callback,
        destination=destination,
        topic=topic,
        due_in_s=due_in,
        timeout_s=timeout,
        key=_key(api_key_file),
        secrets=secrets,
        ca_file=ca_file,
    )
    told = _Told(as_json)
    reason = asyncio.run(run_smoke(plan, told.step))
    if as_json:
        steps = [step._asdict() for step in told.steps]
        print_json({"ok": reason is None, "url": url, "reason": reason, "steps": steps})
    elif reason is None:
        console().print("All is well.")
    exit_with(reason is None)


def _key(file: Path | None) -> str | None:
    name, raw = KEY_VARIABLE, os.environ.get(KEY_VARIABLE, "")
    if file is not None:
        name = "--api-key-file"
        try:
            raw = read_secret_file(str(file))
        except SecretFileError as wrong:
            raise SettingsError(f"{name}: '{file}' {wrong}") from None
    key = raw.strip()
    if key and not re.fullmatch(r"[!-~]+", key):
        raise SettingsError(f"{name}: expected an API key on one line, as orchestrator keys create prints it")
    return key or None


class _Told:
    """Prints each step as it ends, or keeps it for the JSON document."""

    def __init__(self, as_json: bool) -> None:
        self.steps: list[Step] = []
        self._out = None if as_json else console()

    def step(self, step: Step) -> None:
        self.steps.append(step)
        if self._out is not None:
            mark, style = ("✓", "green") if step.ok else ("✗", "bold red")
            line = f"{step.step:<10} {step.ms:>7.0f} ms  {plain(step.detail)}"
            self._out.print(f"[{style}]{mark}[/]", end=" ")
            self._out.print(line, markup=False, soft_wrap=True)
