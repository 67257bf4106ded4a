"""The API, the ingester, commands and the command line read the times of tests/times.json alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import click
import pytest

from orchestrator.cli.times import a_time
from orchestrator.errors import ValidationError
from orchestrator.events.parsing import parse_batch, parse_submission, submission_row
from orchestrator.ingest.commands import read_command
from orchestrator.settings import Settings
from tests.support.copying import fields_of
from tests.support.times import READ, REFUSED, TEXTS_REFUSED

SETTINGS = Settings.from_env({})
OPTION = click.Option(["--at"])
RELATIVE = ("now",)  # what the command line takes besides


def body(**times: Any) -> bytes:
    event = {"source": "s", "external_job_id": "j", "destination": "https://a.example/", "payload": 1, "headers": None}
    return json.dumps(event | {"scheduled_at": "2030-01-01T00:00:00Z"} | times).encode()


def one(text: Any) -> datetime:
    return parse_submission(body(scheduled_at=text), SETTINGS).scheduled_at


def one_that_expires(text: Any) -> datetime | None:
    return parse_submission(body(scheduled_at="2020-01-01T00:00:00Z", expires_at=text), SETTINGS).expires_at


def of_a_batch(text: Any) -> datetime:
    [found] = parse_batch(b'{"events":[%b]}' % body(scheduled_at=text), SETTINGS)
    if isinstance(found, ValidationError):
        raise found
    return found.scheduled_at


def a_record(text: Any) -> datetime:
    at: datetime = fields_of(submission_row(body(scheduled_at=text), SETTINGS, 0))["scheduled_at"]
    return at


def a_command(text: Any) -> datetime:
    command = {"id": "c", "command": "reschedule", "external_job_id": "j", "scheduled_at": text}
    return datetime.fromisoformat(str(read_command(json.dumps(command).encode())["scheduled_at"]))


def an_option(text: Any) -> datetime | None:
    return a_time(click.Context(click.Command("c")), OPTION, text)


@pytest.mark.parametrize("read", [one, one_that_expires, of_a_batch, a_record, a_command, an_option])
def test_every_reader_reads_the_same_times(read: Callable[[str], datetime | None]) -> None:
    found = {text: read(text) for text in READ}
    assert found == READ
    assert {at.utcoffset() for at in found.values() if at is not None} == {timedelta(0)}


@pytest.mark.parametrize(("read", "field"), [
    (one, "scheduled_at"), (one_that_expires, "expires_at"), (of_a_batch, "scheduled_at"), (a_record, "scheduled_at"),
    (a_command, "scheduled_at"),
])  # fmt: skip
def test_every_reader_refuses_a_text_that_is_no_time_by_field(read: Callable[[Any], object], field: str) -> None:
    for value in REFUSED:
        with pytest.raises(ValidationError) as caught:
            read(value)
        assert caught.value.field == field, value


def test_an_option_refuses_a_text_that_is_no_time() -> None:
    for text in set(TEXTS_REFUSED) - set(RELATIVE):
        with pytest.raises(click.BadParameter, match="RFC 3339"):
            an_option(text)


@pytest.mark.parametrize("text", ["1969-12-31T23:59:59.999999Z", "1970-01-01T00:00:00+00:01", "2201-01-01T00:00:00Z"])
def test_times_that_are_never_kept_are_refused_as_such(text: str) -> None:
    for read in (one, a_command):
        with pytest.raises(ValidationError, match="from 1970 to 2200"):
            read(text)


def test_the_ends_of_time_are_read() -> None:
    ends = ("1970-01-01T00:00:00Z", "2200-12-31T23:59:59.999999Z", "2201-01-01T01:59:59.9999994+02")
    assert [one(text) for text in ends] == [
        datetime(1970, 1, 1, tzinfo=UTC),
        *[datetime(2200, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)] * 2,
    ]


def test_a_wrong_field_beside_a_short_time_is_named_alone() -> None:
    with pytest.raises(ValidationError) as caught:
        parse_submission(body(scheduled_at="2030-01-31 08:00+00", source=""), SETTINGS)
    assert [name for name, _ in caught.value.errors] == ["source"]  # type: ignore[attr-defined]
