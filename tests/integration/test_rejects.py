"""The command that lists, shows and resubmits what could not become events."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from orchestrator.cli import main
from tests.support.ingesting import submission
from tests.support.sql_client import Client

Call = Callable[..., Result]


@pytest.fixture
def call(environ: Callable[..., dict[str, str]]) -> Call:
    """Runs ``orchestrator rejects …``."""

    def run(*arguments: str, stdin: bytes | None = None) -> Result:
        return CliRunner().invoke(main, ["rejects", *arguments], input=stdin, env=environ())

    return run


def keep(client: Client, *values: bytes | None, topic: str = "default.event.submissions") -> list[int]:
    """Keeps rejects as an ingester does; returns their numbers."""
    for offset, value in enumerate(values):
        client.rows(
            "select orchestrator.keep_rejects(%s, array[3], array[%s::bigint], array[%s::bytea], array[%s::bytea]"
            ", array['payload'], array['required'])",
            topic,
            offset,
            b"key",
            value,
        )
    numbers: list[int] = client.column("select reject from orchestrator.reject order by 1")
    return numbers[-len(values) :]


def answer(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_rejects_are_listed_newest_first_and_by_page(call: Call, client: Client) -> None:
    assert call("list").stdout == "There are no rejects.\n"
    numbers = keep(client, *[b"%d" % n for n in range(5)])
    assert [each["reject"] for each in answer(call("list", "--json"))] == numbers[::-1]
    page = answer(call("list", "--limit", "2", "--before", str(numbers[3]), "--json"))
    assert [each["reject"] for each in page] == [numbers[2], numbers[1]]
    shown = call("list", "--limit", "2").stdout
    assert "default.event.submissions 3:4" in shown
    assert "payload: required" in shown
    assert f"--before {numbers[3]}" in shown


def test_a_reject_is_shown_with_every_byte(call: Call, client: Client) -> None:
    sent = b'{"a": "\xff\x00\x1b[31m"}'
    [number] = keep(client, sent)
    assert call("show", str(number), "--raw").stdout_bytes == sent
    told = answer(call("show", str(number), "--json"))
    assert base64.b64decode(told["value"]) == sent
    assert (told["reject"], told["partition"], told["offset"], told["field"]) == (number, 3, 0, "payload")
    shown = call("show", str(number)).stdout
    assert r'{"a": "\xff' in shown
    assert "\x1b" not in shown
    missing = call("show", "999")
    assert (missing.exit_code, "no reject 999" in missing.stderr) == (1, True)


def test_a_corrected_reject_becomes_an_event_once(call: Call, client: Client, tmp_path: Path) -> None:
    [number] = keep(client, submission(1, payload=...))
    assert call("resubmit", str(number)).exit_code == 1
    corrected = tmp_path / "corrected.json"
    corrected.write_bytes(submission(1))
    done = answer(call("resubmit", str(number), str(corrected), "--json"))
    uid = client.value("select id::text from orchestrator.event")
    assert done == {"reject": number, "id": uid, "duplicate": False, "event_status": "scheduled"}
    [listed] = answer(call("list", "--json"))
    assert listed["event_id"] == done["id"]
    again = call("resubmit", str(number), "-", stdin=submission(1))
    assert (again.exit_code, "resubmitted before" in again.stderr) == (1, True)
    assert answer(call("resubmit", str(number), str(corrected), "--again", "--json"))["duplicate"]


def test_a_reject_is_resubmitted_unchanged_once_its_retry_policy_exists(call: Call, client: Client) -> None:
    [number] = keep(client, submission(1, retry_policy="patient"))
    refused = call("resubmit", str(number))
    assert (refused.exit_code, "patient" in refused.stderr) == (1, True)
    assert client.value("select resubmitted_at from orchestrator.reject") is None
    client.rows("insert into orchestrator.retry_policy (name, schedule) values ('patient', array['1 min']::interval[])")
    assert call("resubmit", str(number)).exit_code == 0
    assert client.value("select retry_policy from orchestrator.event") == "patient"


def test_commands_and_empty_records_are_not_resubmitted(call: Call, client: Client) -> None:
    [command] = keep(client, b'{"command": "cancel"}', topic="default.process-kafka-message")
    [tombstone] = keep(client, None)
    for number, why in ((command, "is a command"), (tombstone, "has no value")):
        refused = call("resubmit", str(number))
        assert (refused.exit_code, why in refused.stderr) == (1, True)
    assert client.value("select count(*) from orchestrator.event") == 0
