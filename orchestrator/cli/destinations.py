"""``destinations``, ``pause`` and ``resume``: the limits of destinations, and pauses."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click

from orchestrator.cli.support import console, duration, json_option, moment, plain, print_json, with_database
from orchestrator.errors import OrchestratorError, ValidationError

if TYPE_CHECKING:
    from orchestrator.database.destinations import Destinations

T = TypeVar("T")

_STATE_STYLES = {"ok": "green", "paused": "magenta", "breaker_open": "red", "breaker_half_open": "yellow"}
_OPTIONS = {
    "rate_per_second": "rate",
    "burst": "burst",
    "max_parallel": "max-parallel",
    "adaptive": "adaptive",
    "timeout": "timeout",
    "retry_policy": "retry-policy",
    "signing_secret": "signing-secret",
    "secret_headers": "secret-header",
    "spread": "spread",
    "breaker_failures": "breaker-failures",
    "breaker_ratio": "breaker-ratio",
    "breaker_minimum": "breaker-minimum",
    "breaker_window": "breaker-window",
    "breaker_cooldown": "breaker-cooldown",
    "breaker_max_cooldown": "breaker-max-cooldown",
}
_SETTINGS = {option: name for name, option in _OPTIONS.items()}


def with_destinations(work: Callable[[Destinations], Awaitable[T]]) -> T:
    """Runs `work` on the configured database. An error about a value names its option."""
    from orchestrator.database.destinations import Destinations

    try:
        return with_database(lambda database, _: work(Destinations(database)))
    except ValidationError as error:
        option = _OPTIONS.get(error.field)
        raise OrchestratorError(f"--{option}: {error.reason}" if option else str(error)) from error


def _secret_headers(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str] | None:
    for value in values:
        if ":" not in value:
            raise click.BadParameter("expected 'Header: name of a secret'")  # the text may be the secret itself
    parts = (value.partition(":") for value in values)
    return {header.strip(): secret.strip() for header, _, secret in parts} or None


async def _missing(destinations: Destinations, name: str) -> OrchestratorError:
    """The error that there is no such destination; it names the pattern whose limits hold for the name, if any."""
    governing = await destinations.governing(name)
    if governing is not None and governing != name:
        return OrchestratorError(f"there is no destination {name!r}; the limits of {governing} hold for it")
    return OrchestratorError(f"there is no destination {name!r}; orchestrator destinations list shows all")


@click.group()
def destinations() -> None:
    """Limit, pause and inspect destinations: the hosts and topics that events go to.

    NAME is a host such as hooks.example.com or localhost:8443, or kafka: and a topic. A NAME with * for any characters
    is a pattern: all names that match it are one destination and share its limits. An exact name goes before patterns.
    """


@destinations.command("list")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="Maximum number to list.")
@click.option("--after", metavar="NAME", help="List names after this one, for the next page.")
@json_option
def list_destinations(limit: int, after: str | None, as_json: bool) -> None:
    """List destinations that are configured, or that have a breaker because an attempt failed."""
    # One more than asked for tells whether there are more.
    found = with_destinations(lambda destinations: destinations.page(limit=limit + 1, after=after))
    shown = found[:limit]
    if as_json:
        print_json(b"[" + b",".join(shown) + b"]")
        return
    out = console()
    if not shown:
        out.print("No destination is configured." if after is None else "There are no more.")
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("destination", "state", "rate/s", "burst", "parallel", "in flight", "due"):
        table.add_column(name, justify="left" if name in ("destination", "state") else "right", no_wrap=True)
    table.add_column("")
    for each in map(json.loads, shown):
        table.add_row(
            Text(plain(each["name"])),
            Text(_spoken(each["state"]), style=_STATE_STYLES.get(each["state"], "yellow")),
            "" if each["rate_per_second"] is None else f"{each['rate_per_second']:g}",
            "" if each["rate_per_second"] is None else str(each["burst"]),
            _parallel(each),
            f"{each['in_flight']:,}",
            f"{each['due']:,}",
            "" if each["configured"] else "not configured: attempts failed",
        )
    out.print(table)
    if len(found) > limit:
        out.print(f"There are more: --after {plain(json.loads(shown[-1])['name'])}")


def _spoken(state: str) -> str:
    return state.replace("_", " ").replace("half open", "half-open")


def _parallel(each: dict[str, Any]) -> str:
    if each["max_parallel"] is None:
        return ""
    if not each["adaptive"]:
        return str(each["max_parallel"])
    now = each["max_parallel"] if each["parallel_now"] is None else int(each["parallel_now"])
    return f"{now} of {each['max_parallel']}"


@destinations.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show a destination: its settings and its present state."""

    async def work(destinations: Destinations) -> bytes:
        found = await destinations.get(name)
        if found is None:
            raise await _missing(destinations, name)
        return found

    found = with_destinations(work)
    if as_json:
        print_json(found)
    else:
        _show(json.loads(found))


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    now = datetime.now(UTC)
    rate = found["rate_per_second"]
    breaker = "closed" if found["breaker"] == "closed" else _spoken(found["breaker"])
    if found["opened_at"]:
        breaker += f" since {moment(found['opened_at'], now=now)}"
    if found["next_try_at"]:
        breaker += f", next trial {moment(found['next_try_at'], now=now)}"
    if found["failures"]:
        breaker += f", {found['failures']:,} failure{'' if found['failures'] == 1 else 's'} in a row"
    headers = found["secret_headers"] or {}
    rows = {
        "state": _spoken(found["state"]),
        "kept": ""
        if found["configured"]
        else "for its breaker, because attempts failed; forgotten when it has recovered",
        "rate": "no limit" if rate is None else f"{rate:g} a second, in bursts of up to {found['burst']:,}",
        "parallel": _parallel(found) or "no bound",
        "timeout": _seconds(found["timeout_seconds"]) or "that of the dispatchers",
        "retry policy": found["retry_policy"] or "default",
        "spread": _seconds(found["spread_seconds"]) or "none",
        "signing secret": found["signing_secret"] or "that of the dispatchers",
        "secret headers": ", ".join(f"{header}: {secret}" for header, secret in headers.items()) or "none",
        "breaker": breaker,
        "breaker opens after": _opens_after(found),
        "breaker stays open": f"{_seconds(found['breaker_cooldown_seconds'])}, doubling up to "
        f"{_seconds(found['breaker_max_cooldown_seconds'])}",
        "paused": f"since {moment(found['paused_at'], now=now)}" if found["paused_at"] else "",
        "in flight": f"{found['in_flight']:,}",
        "due": f"{found['due']:,}" + (" or more" if found["due"] == 10_000 else ""),
        "changed": moment(found["changed_at"], now=now),
    }
    out = console()
    out.print(Text.assemble("destination ", (plain(found["name"]), "bold")))
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    for name, value in rows.items():
        if value:
            style = _STATE_STYLES.get(found["state"], "yellow") if name == "state" else ""
            facts.add_row(name, Text(plain(value), style=style))
    out.print(facts)


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)


def _opens_after(found: dict[str, Any]) -> str:
    ways = []
    if found["breaker_failures"]:
        ways.append(f"{found['breaker_failures']:,} failures in a row")
    if found["breaker_ratio"]:
        ways.append(
            f"{found['breaker_ratio']:.0%} of at least {found['breaker_minimum']:,} attempts in "
            f"{_seconds(found['breaker_window_seconds'])} failed"
        )
    return ", or ".join(ways) or "no failure"


@destinations.command("set")
@click.argument("name")
@click.option("--rate", type=float, metavar="N", help="Rate limit: attempts per second, of all dispatchers together.")
@click.option("--burst", type=int, metavar="N", help="With --rate: attempts that may start at once.")
@click.option(
    "--max-parallel",
    type=int,
    metavar="N",
    help="Maximum number of attempts under way at once, of all dispatchers together.",
)
@click.option("--adaptive/--fixed", default=None, help="Adapt --max-parallel to 429, 503 and timeouts, or not.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Longest time for an attempt.")
@click.option("--retry-policy", metavar="NAME", help="Row of orchestrator.retry_policy for events that name none.")
@click.option("--signing-secret", metavar="NAME", help="File of SECRETS_DIRECTORY that signs deliveries.")
@click.option(
    *("--secret-header", "secret_headers"),
    metavar="'HEADER: NAME'",
    multiple=True,
    callback=_secret_headers,
    help="Header whose value is a file of SECRETS_DIRECTORY. Repeat for more; replaces all earlier ones.",
)
@click.option("--spread", type=float, metavar="SECONDS", help="Time over which its events are spread.")
@click.option("--breaker-failures", type=int, metavar="N", help="Open the breaker after N failures in a row; 0: off.")
@click.option(
    "--breaker-ratio", type=float, metavar="R", help="Open the breaker if this share of attempts failed; 0: off."
)
@click.option(
    "--breaker-minimum", type=int, metavar="N", help="Attempts in --breaker-window before --breaker-ratio counts."
)
@click.option("--breaker-window", type=float, metavar="SECONDS", help="Time window of --breaker-ratio.")
@click.option(
    "--breaker-cooldown", type=float, metavar="SECONDS", help="How long the breaker stays open; doubles each time."
)
@click.option("--breaker-max-cooldown", type=float, metavar="SECONDS", help="Longest time that the breaker stays open.")
@click.option(
    "--clear", multiple=True, type=click.Choice(list(_SETTINGS)), help="Set back to the default. Repeat for more."
)
@json_option
def configure(name: str, rate: float | None, clear: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Set the given settings of a destination, and leave the others.

    \b
    orchestrator destinations set hooks.example.com --rate 50 --burst 10
    orchestrator destinations set '*.example.com' --max-parallel 20 --adaptive
    orchestrator destinations set kafka:reminders --spread 600
    orchestrator destinations set hooks.example.com --clear rate

    The settings hold from the next claim on, for all dispatchers. A configured destination has a dedicated lane.
    """
    settings = {"rate_per_second": rate, **given}
    told = with_destinations(
        lambda destinations: destinations.configure(name, settings, [_SETTINGS[option] for option in clear])
    )
    if as_json:
        print_json(told)
        return
    answer = json.loads(told)
    _show(answer["destination"])
    _tell(f"{_waiting(answer)}: {answer['note']}.")
    for overlap in answer["overlaps"]:
        _tell(f"! {overlap}")


def _waiting(answer: dict[str, Any]) -> str:
    count = answer["waiting"]
    return f"{count:,} event{'' if count == 1 else 's'} wait{'s' if count == 1 else ''} for it"


def _tell(line: str) -> None:
    click.echo(plain(line))


def _act(name: str, done: Callable[[Destinations], Awaitable[bytes | None]], what: str, as_json: bool) -> None:
    async def work(destinations: Destinations) -> bytes:
        told = await done(destinations)
        if told is None:
            raise await _missing(destinations, name)
        return told

    told = with_destinations(work)
    if as_json:
        print_json(told)
        return
    answer = json.loads(told)
    _tell(f"{answer['name']} {what}; {_waiting(answer)}: {answer['note'] or 'due events go at once'}.")


@destinations.command()
@click.argument("name")
@json_option
def delete(name: str, as_json: bool) -> None:
    """Delete a destination's settings; its events are still delivered, without limits."""
    _act(name, lambda destinations: destinations.delete(name), "is no longer configured", as_json)


@destinations.command("pause")
@click.argument("name")
@json_option
def pause_one(name: str, as_json: bool) -> None:
    """Pause a destination until it is resumed.

    The pause outlasts restarts. The destination need not be configured. Its events wait; attempts under way continue.
    """
    _act(name, lambda destinations: destinations.pause(name), "is paused", as_json)


@destinations.command("resume")
@click.argument("name")
@json_option
def resume_one(name: str, as_json: bool) -> None:
    """Resume a destination; its due events go at once, within its limits."""
    _act(name, lambda destinations: destinations.resume(name), "is not paused", as_json)


@destinations.command("close-breaker")
@click.argument("name")
@json_option
def close_breaker(name: str, as_json: bool) -> None:
    """Close a destination's breaker without waiting for its next trial."""
    _act(name, lambda destinations: destinations.close_breaker(name), "has its breaker closed", as_json)


@click.command("pause")
@json_option
def pause(as_json: bool) -> None:
    """Pause all deliveries until resume.

    The pause outlasts restarts. Submissions are still accepted, and attempts under way continue.
    """
    told = with_destinations(lambda destinations: destinations.pause_all())
    if as_json:
        print_json(told)
        return
    answer = json.loads(told)
    _tell(f"Everything is paused, with {answer['in_flight']:,} in flight: {answer['note']}.")


@click.command("resume")
@json_option
def resume(as_json: bool) -> None:
    """Resume deliveries after pause; destinations paused by name stay paused."""
    told = with_destinations(lambda destinations: destinations.resume_all())
    if as_json:
        print_json(told)
        return
    answer = json.loads(told)
    _tell(f"Everything is resumed: {answer['note']}.")
