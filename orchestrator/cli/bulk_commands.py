"""Bulk commands: options that make a filter, and bounded calls until no event is left, with progress."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from orchestrator.cli.support import console, plain, print_json, with_database
from orchestrator.cli.times import a_time, iso
from orchestrator.errors import OrchestratorError, ValidationError
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.database import Database, Filter
    from orchestrator.database.bulk_calls import Sweeps, Swept

F = TypeVar("F", bound=Callable[..., object])
T = TypeVar("T")

_LOOKED_AT = 10_000  # by one call
_EXAMPLES = 10
_OPTIONS = {"name": "--destination", "from": "--from"}


def narrowing(what: str, when: str) -> Callable[[F], F]:
    """The options --source, --destination, --from and --until."""

    def decorate(command: F) -> F:
        for option in (
            click.option("--until", callback=a_time, metavar="TIME", help=f"{when} before TIME."),
            click.option(
                "--from", "since", callback=a_time, metavar="TIME", help=f"{when} at TIME or later, such as -1h."
            ),
            click.option("--destination", metavar="NAME", help=f"{what} for this host, or for kafka: and a topic."),
            click.option("--source", metavar="NAME", help=f"{what} of this source."),
        ):
            command = option(command)
        return command

    return decorate


def sweeping(command: F) -> F:
    """The options --dry-run and --yes."""
    command = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")(command)
    return click.option("--dry-run", is_flag=True, help="Only count the matches and show a few; change nothing.")(
        command
    )


def filter_of(
    source: str | None = None,
    destination: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    reason: str | None = None,
) -> Filter:
    """The filter that options give. Refuses an empty text and an empty range of times."""
    from orchestrator.database import Filter

    if since is not None and until is not None and since >= until:
        raise click.UsageError(f"--until: expected a time after --from, {since.isoformat()}, got {until.isoformat()}")
    for option, text in (("source", source), ("destination", destination), ("reason", reason)):
        if text == "":
            raise click.UsageError(f"--{option}: expected a text; leave the option out to mean all")
    return Filter(source, destination, iso(since), iso(until), reason)


def with_filter(work: Callable[[Database, Settings], Awaitable[T]]) -> T:
    """Runs `work` with the configured database. An error about a value names its option."""
    try:
        return with_database(work)
    except ValidationError as error:
        option = _OPTIONS.get(error.field)
        raise OrchestratorError(f"{option}: {error.reason}" if option else str(error)) from error


class Call(Protocol):
    """A method of `Sweeps` with its filter."""

    def __call__(self, sweeps: Sweeps, *, limit: int, dry_run: bool, **place: Any) -> Awaitable[Swept]: ...


@dataclass
class _Tally:
    seen: int = 0
    matched: int = 0
    done: int = 0
    in_flight: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, swept: Swept) -> None:
        self.seen += swept.seen
        self.matched += swept.matched
        self.done += swept.done
        self.in_flight += swept.in_flight
        self.examples = (self.examples + swept.examples)[:_EXAMPLES]

    def told(self, done: str) -> str:
        in_flight = f", {self.in_flight:,} in flight" if self.in_flight else ""
        return f"looked at {self.seen:,}: {self.matched:,} matched, {self.done:,} {done}{in_flight}"


def sweep(
    call: Call, question: str, done: str, *, dry_run: bool, yes: bool, as_json: bool, limit: int | None = None
) -> bool:
    """Asks for confirmation unless told not to, calls until no match is left, and prints what was done.

    `question` has a place for the number of matches; `done` is the participle of the action. `limit` bounds the number
    of events. Returns False if some events were left because they are in flight.
    """
    if not dry_run and not yes:
        if as_json:
            raise click.UsageError("--json: cannot ask for confirmation; add --yes or --dry-run")
        expected = with_filter(_sweep(call, done, dry_run=True, limit=limit))
        _print_expected(expected, done)
        if not expected.matched:
            return True
        click.confirm(question.format(f"{expected.matched:,}"), abort=True)
    tally = with_filter(_sweep(call, done, dry_run=dry_run, limit=limit))
    if as_json:
        told = {"dry_run": dry_run, "seen": tally.seen, "matched": tally.matched, done: tally.done}
        in_flight = {"in_flight": tally.in_flight} if done == "cancelled" else {}
        print_json({**told, **in_flight, "examples": tally.examples})
    elif dry_run:
        _print_expected(tally, done)
    else:
        click.echo(tally.told(done))
    return dry_run or not tally.in_flight


def _print_expected(tally: _Tally, done: str) -> None:
    in_flight = f", {tally.in_flight:,} are in flight" if tally.in_flight else ""
    would = tally.matched - tally.in_flight
    click.echo(f"looked at {tally.seen:,}: {would:,} would be {done}{in_flight}")
    for example in tally.examples:
        click.echo(f"  such as {plain(example)}")


def _sweep(
    call: Call, done: str, *, dry_run: bool, limit: int | None
) -> Callable[[Database, Settings], Awaitable[_Tally]]:
    async def work(database: Database, _: Settings) -> _Tally:
        from orchestrator.database.bulk_calls import Sweeps

        tally, sweeps = _Tally(), Sweeps(database)
        place: dict[str, str] = {}
        window = _LOOKED_AT
        with console(stderr=True).status("searching …") as status:
            while True:
                left = None if limit is None else limit - tally.matched
                swept = await call(sweeps, limit=window, dry_run=dry_run or left is not None, **place)
                if left is not None:
                    if swept.matched > left:
                        window = max(left, window // 2)
                        continue
                    if not dry_run:
                        swept = await call(sweeps, limit=window, dry_run=False, **place)
                tally.add(swept)
                status.update(tally.told(f"would be {done}" if dry_run else done))
                if swept.next_after is None or (limit is not None and tally.matched >= limit):
                    return tally
                window = _LOOKED_AT
                place = {"after": swept.next_after}
                if swept.next_start_at is not None:
                    place["start_at"] = swept.next_start_at

    return work
