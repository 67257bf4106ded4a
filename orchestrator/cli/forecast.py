"""``forecast``: upcoming events, and when each destination will have taken them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.chart import axis, bars, columns_for
from orchestrator.cli.destinations import with_destinations
from orchestrator.cli.support import console, duration, json_option, plain, print_json

if TYPE_CHECKING:
    from rich.console import Console

_BUCKETS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21_600, 86_400)
_FEW = 96
_DRAWN = 10
_LISTED = 10


@click.command()
@click.option("--hours", type=float, metavar="N", help="Hours to look ahead. [default: 1]")
@click.option("--minutes", type=float, metavar="N", help="Minutes to look ahead.")
@click.option("--bucket", type=float, metavar="SECONDS", help="Seconds per bar. [default: as fits]")
@click.option("--destination", metavar="NAME", help="Only this host or topic, or the pattern that it belongs to.")
@json_option
def forecast(
    hours: float | None, minutes: float | None, bucket: float | None, destination: str | None, as_json: bool
) -> None:
    """Plot upcoming events against each destination's rate limit.

    For each destination that has a rate limit, or that will deliver late: when most events are due, when they will have
    been delivered, and which events will be late. Overdue events count as due now. The forecast takes account of rate
    limits, pauses and open breakers. It leaves max_parallel out, because it cannot know how long attempts will take.
    Times are UTC.
    """
    if hours is not None and minutes is not None:
        raise click.UsageError("--hours and --minutes: give one of them")
    until_s = 60 * minutes if minutes is not None else 3600 * (1 if hours is None else hours)
    bucket_s = bucket if bucket is not None else _fitting(until_s)
    found = with_destinations(
        lambda destinations: destinations.forecast(bucket_s=bucket_s, until_s=until_s, destination=destination)
    )
    if as_json:
        print_json(found)
    else:
        _draw(console(), json.loads(found), until_s)


def _fitting(until_s: float) -> float:
    return next((size for size in _BUCKETS_S if size * _FEW >= until_s), _BUCKETS_S[-1])


def _draw(out: Console, found: dict[str, Any], until_s: float) -> None:
    from rich.text import Text

    if found["paused_at"]:
        out.print(Text("Everything is paused: no delivery begins until orchestrator resume.", style="magenta"))
    if not found["due"]:
        out.print(f"No event is due within {duration(until_s)}.")
        return
    told = f"{_events(found['due'])} due within {duration(until_s)}, most at {_clock(found['peak_at'])}: "
    told += f"{found['peak_due']:,} in {duration(found['bucket_seconds'])}. "
    out.print(told + (f"{found['late']:,} will be late." if found["late"] else "None will be late."))
    frame = _Frame(found, columns_for(out.width))
    frame.draw(out, frame.due(found["buckets"]), None, height=6)
    noteworthy = [each for each in found["destinations"] if each["late"] or each["rate_per_second"] is not None]
    for each in noteworthy[:_DRAWN]:
        out.print()
        out.print(_headline(each))
        out.print(Text(f"  {_story(each)}", style="dim"))
        rate = each["rate_per_second"]
        frame.draw(out, frame.due(each["buckets"]), rate and rate * frame.column_s, height=4)
        if each["late"]:
            out.print(Text("  waiting", style="dim"))
            frame.draw(out, frame.waiting(each["buckets"]), None, height=2)
    others = [each for each in found["destinations"] if each not in noteworthy[:_DRAWN]]
    _list_others(out, others, found["others"])


class _Frame:
    """The columns that all charts of a forecast share."""

    def __init__(self, found: dict[str, Any], columns: int) -> None:
        self._bucket_s = found["bucket_seconds"]
        ends = [_time(found["at"]).timestamp()] + [_time(each["at"]).timestamp() for each in found["buckets"]]
        self._first_s = min(ends) // self._bucket_s * self._bucket_s
        buckets = math.ceil((_time(found["until"]).timestamp() - self._first_s) / self._bucket_s)
        self._merged = math.ceil(buckets / columns)
        self._columns = math.ceil(buckets / self._merged)
        self.column_s = self._merged * self._bucket_s

    def due(self, buckets: Sequence[dict[str, Any]]) -> list[float]:
        """How many events fall due in each column."""
        due = [0.0] * self._columns
        for bucket in buckets:
            due[self._column(bucket)] += bucket["due"]
        return due

    def waiting(self, buckets: Sequence[dict[str, Any]]) -> list[float]:
        """How many events wait at the end of each column. The forecast leaves out buckets without a change."""
        left = {self._column(bucket): float(bucket["backlog"]) for bucket in buckets}
        return list(accumulate(range(self._columns), lambda before, n: left.get(n, before), initial=0.0))[1:]

    def _column(self, bucket: dict[str, Any]) -> int:
        return int((_time(bucket["at"]).timestamp() - self._first_s) // self.column_s)

    def draw(self, out: Console, values: Sequence[float], line: float | None, *, height: int) -> None:
        for text in bars(values, line, height):
            out.print(text)
        out.print(axis(datetime.fromtimestamp(self._first_s, UTC), timedelta(seconds=self.column_s), self._columns))


def _headline(each: dict[str, Any]) -> str:
    from rich.markup import escape

    told = f"[bold]{escape(plain(each['name']))}[/]  "
    told += "no rate" if each["rate_per_second"] is None else f"{each['rate_per_second']:g}/s"
    if each["max_parallel"] is not None:
        told += f", at most {each['max_parallel']:,} in parallel"
    if each["state"] != "ok":
        told += f"  [magenta]{each['state'].replace('_', ' ')}[/]"
    return told


def _story(each: dict[str, Any]) -> str:
    """When most events are due, when they will have been delivered, and which will be late."""
    told = f"{_events(each['due'])} due, most at {_clock(each['peak_at'])}: {each['peak_due']:,}"
    if not each["late"]:
        return f"{told}; none will be late"
    told += f"; {each['late']:,} late, of those due from {_clock(each['late_from'])} to {_clock(each['late_until'])}"
    if each["latest_seconds"] is not None:
        told += f", by up to {duration(each['latest_seconds'])}"
    told += f"; at most {each['peak_backlog']:,} wait"
    if each["drained_at"] is None or each["state"] == "paused":
        return f"{told} until it is resumed"
    return f"{told}; drained at {_clock(each['drained_at'])}"


def _list_others(out: Console, others: Sequence[dict[str, Any]], more: int) -> None:
    if not others:
        return
    from rich.table import Table
    from rich.text import Text

    out.print()
    table = Table("other destinations", "due", "most at", "", box=None, pad_edge=False)
    for each in others[:_LISTED]:
        late = f"{each['late']:,} late" if each["late"] else ""
        table.add_row(Text(plain(each["name"])), f"{each['due']:,}", _clock(each["peak_at"]), late)
    out.print(table)
    if len(others) + more > _LISTED:
        out.print(f"and {len(others) + more - _LISTED:,} more: --destination NAME, or --json")


def _events(count: int) -> str:
    return f"{count:,} event{'' if count == 1 else 's'}"


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _clock(text: str) -> str:
    """``09:30``, ``09:30:05`` or, on another day, ``24 Nov 09:30``."""
    at = _time(text)
    shown = at.strftime("%H:%M" if at.second == 0 else "%H:%M:%S")
    return shown if at.date() == datetime.now(UTC).date() else f"{at.strftime('%-d %b')} {shown}"
