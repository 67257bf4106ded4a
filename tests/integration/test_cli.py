"""The commands, as a person or a script uses them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import httpx
import psycopg
import pytest
from click.testing import CliRunner, Result

from orchestrator.cli import COMMANDS, main
from orchestrator.dev.operating_system import free_port
from orchestrator.dev.postgres import EmbeddedPostgres
from tests.conftest import Spawn
from tests.integration.api_support import status, until
from tests.support.receiver import HANG, Receiver
from tests.support.sql_client import Client, event
from tests.support.times import READ, REFUSED
from tests.support.waiting import eventually

Cli = Callable[..., Result]
NOWHERE = "postgresql://127.0.0.1:1/none"
HOOK = "http://127.0.0.1:9/hook"


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=stdin, prog_name="orchestrator")


@pytest.fixture
def cli(environ: Callable[..., dict[str, str]]) -> Cli:
    """Runs a command in this process: ``cli("get", "--json", …, stdin="…", SERVER_PORT="80")``."""

    def run(*arguments: str, stdin: str | None = None, **given: str) -> Result:
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        # A thread of its own, since a command has an event loop of its own.
        with mock.patch.dict(os.environ, kept | environ(**given), clear=True), ThreadPoolExecutor(1) as thread:
            return thread.submit(invoke, *arguments, stdin=stdin).result()

    return run


def document(result: Result, exit_code: int = 0) -> Any:
    """The one JSON document on standard output."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def error_of(result: Result, exit_code: int) -> str:
    """The one line on standard error of a command that printed nothing else."""
    assert (result.exit_code, result.stdout) == (exit_code, ""), result.output
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("Error: ").rstrip("\n")


def submitted(cli: Cli, *options: str) -> str:
    answer = document(cli("submit", "--destination", HOOK, "--payload", '{"a": 1}', *options, "--json"))
    return str(answer["id"])


# The command line itself


def test_help_lists_every_command_without_loading_any() -> None:
    probe = "import sys; from orchestrator.cli import main; main(['--help'], standalone_mode=False); "
    probe += "print(sorted({'psycopg', 'rich', 'aiohttp', 'starlette', 'msgspec'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    *help_lines, loaded = shown.splitlines()
    assert loaded == "[]"
    listed = {line.split()[0] for line in help_lines if line.startswith("  ") and line.strip()}
    assert {name for section in COMMANDS.values() for name in section} <= listed


@pytest.mark.parametrize("name", [name for section in COMMANDS.values() for name in section])
def test_a_command_begins_its_own_help_as_the_list_of_commands_describes_it(name: str) -> None:
    about = {name: about for section in COMMANDS.values() for name, (_, about) in section.items()}[name]
    result = invoke(name, "--help")
    paragraph = re.split(r"\n\s*\n", result.stdout)[1]
    assert (result.exit_code, " ".join(paragraph.split())) == (0, about)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["sbmit"], "no command 'sbmit', did you mean submit?; see orchestrator --help"),
        (["--nope"], "No such option '--nope'; see orchestrator --help"),
        (["get"], "expected either ID or --external-id; see orchestrator get --help"),
        (["keys", "create", "me"], "Missing option '--scope'"),
        (["stats", "--watch", "--json"], "--watch and --json"),
    ],
)
def test_wrong_usage_prints_one_line_on_standard_error_and_exits_with_2(arguments: list[str], complaint: str) -> None:
    assert complaint in error_of(invoke(*arguments), 2)


@pytest.mark.parametrize(
    "command",
    [["stats"], ["migrate"], ["migrate", "--check"], ["get", "--external-id", "x"], ["keys", "list"], ["maintain"]],
)
def test_a_database_that_is_away_is_one_line_and_exit_code_1(cli: Cli, command: list[str]) -> None:
    assert "Connection refused" in error_of(cli(*command, "--json", DATABASE_URL=NOWHERE), 1)


def test_a_database_that_is_not_migrated_is_named_with_the_remedy(cli: Cli, empty_database_url: str) -> None:
    assert "orchestrator migrate" in error_of(cli("stats", DATABASE_URL=empty_database_url), 1)


def test_wrong_settings_are_all_listed_and_exit_code_2(cli: Cli) -> None:
    result = cli("stats", DATABASE_URL=NOWHERE, SERVER_PORT="x", LOG_LEVEL="loud")
    assert result.exit_code == 2
    assert [line.split(":")[1].strip() for line in result.stderr.splitlines()] == ["SERVER_PORT", "LOG_LEVEL"]


# migrate and maintain


def test_migrate_check_tells_pending_from_up_to_date_and_migrate_makes_the_difference(
    cli: Cli, empty_database_url: str
) -> None:
    here = {"DATABASE_URL": empty_database_url, "PARTITION_DAYS_AHEAD": "3"}
    pending = document(cli("migrate", "--check", "--json", **here), 1)["pending"]
    assert "schema/0001_core.sql" in pending
    assert "pending" in cli("migrate", "--check", **here).stdout
    report = document(cli("migrate", "--json", **here))
    assert report["applied"] == pending
    assert report["partitions_created"] > 0
    assert document(cli("migrate", "--check", "--json", **here)) == {"pending": []}
    assert "up to date" in cli("migrate", **here).stdout


def test_maintain_makes_the_partitions_that_the_settings_ask_for(cli: Cli) -> None:
    assert document(cli("maintain", "--json", PARTITION_DAYS_AHEAD="32"))["partitions_created"] > 0
    shown = cli("maintain", "--once").stdout
    assert re.search(r"partitions created +0\n", shown), shown


# submit, get, cancel


def test_a_submitted_event_is_shown_with_its_timeline(cli: Cli) -> None:
    identity = submitted(cli, "--at", "+1h", "--source", "shop", "--external-id", "order-7", "--header", "X-Tenant: a")
    event = document(cli("get", identity, "--json"))
    assert (event["source"], event["external_job_id"], event["status"]) == ("shop", "order-7", "scheduled")
    assert (event["payload"], event["headers"]) == ({"a": 1}, {"X-Tenant": "a"})
    shown = cli("get", "--external-id", "order-7").stdout
    assert all(text in shown for text in (identity, "scheduled", "order-7", "accepted", "attempt 1 due", HOOK))


def test_a_kafka_event_is_shown_with_its_topic(cli: Cli) -> None:
    event = ("submit", "--payload", "1", "--at", "+1h", "--delivery-type", "KAFKA", "--ordering-key", "tenant-7")
    ready = document(cli(*event, "--json"))["id"]
    shown = cli("get", ready).stdout
    assert all(text in shown for text in ("KAFKA", "the ready topic", "tenant-7"))
    named = document(cli(*event, "--destination", "reminders", "--json"))["id"]
    assert document(cli("get", named, "--json"))["destination"] == "reminders"


def test_priority_and_spread_given_as_options_are_kept(cli: Cli, client: Client) -> None:
    submitted(cli, "--at", "+1h", "--priority", "-3", "--spread", "0.00001")
    assert client.rows("select priority, spread from orchestrator.event") == [(-3, timedelta(microseconds=10))]


def test_what_an_event_is_followed_by_is_given_as_options_and_shown(cli: Cli) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    identity = submitted(cli, "--at", "+1h", "--correlation-id", "order 7", "--traceparent", trace)
    event = document(cli("get", identity, "--json"))
    assert (event["correlation_id"], event["traceparent"]) == ("order 7", trace)
    shown = cli("get", identity).stdout
    assert "order 7" in shown
    assert trace in shown.replace("\n", "").replace(" ", "") or trace in shown


def test_submitting_the_same_event_again_is_a_duplicate_with_the_same_id(cli: Cli) -> None:
    event = ("submit", "--destination", HOOK, "--payload", "1", "--external-id", "x", "--at")
    kept = document(cli(*event, "+1h", "--json"))
    again = cli(*event, kept["scheduled_at"])
    assert again.stdout == f"{kept['id']}  was accepted before and is unchanged\n"


def test_files_of_submit_hold_times_in_every_accepted_form(cli: Cli, client: Client, tmp_path: Path) -> None:
    """By tests/times.json."""
    at = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    event = {"source": "s", "scheduled_at": at, "destination": HOOK, "payload": 1}
    given, wrong = tmp_path / "given.jsonl", tmp_path / "wrong.jsonl"
    given.write_text("\n".join(json.dumps(event | {"expires_at": text}) for text in READ))
    results = document(cli("submit", str(given), "--json"))["results"]
    kept: dict[str, datetime] = dict(client.rows("select id::text, expires_at from orchestrator.event"))
    assert [kept[result["id"]] for result in results] == list(READ.values())
    wrong.write_text("\n".join(json.dumps(event | {"expires_at": value}) for value in REFUSED))
    results = document(cli("submit", str(wrong), "--json"), 1)["results"]
    assert [result["error"]["field"] for result in results] == ["expires_at"] * len(REFUSED)


@pytest.mark.parametrize("text", ["2030-01-31 13:00+05", "2030-01-31t08:00:00z", "2030-01-31T08:00:00.0000004Z"])
def test_options_of_submit_read_times_in_every_accepted_form(cli: Cli, client: Client, text: str) -> None:
    event = ("submit", "--destination", HOOK, "--payload", "1")
    submitted(cli, "--at", "+1h", "--expires-at", text)
    assert client.column("select expires_at from orchestrator.event") == [datetime(2030, 1, 31, 8, tzinfo=UTC)]
    too_far = cli(*event, "--at", text, "--expires-in", "1h")
    assert "days ahead" in too_far.stderr


def test_an_expiry_is_counted_from_a_time_however_that_is_written(cli: Cli, client: Client) -> None:
    at = (datetime.now(UTC) + timedelta(hours=1)).replace(microsecond=0)
    submitted(cli, "--at", f"{at:%Y-%m-%dt%H:%M:%Sz}", "--expires-in", "1h")
    assert client.column("select expires_at from orchestrator.event") == [at + timedelta(hours=1)]


@pytest.mark.parametrize("payload", ["9" * 4301, "[-" + "1" * 100_000 + ", 1e999]", '{"a": ' * 60 + "1" + "}" * 60])
def test_a_payload_of_any_numbers_is_kept_and_shown(cli: Cli, client: Client, tmp_path: Path, payload: str) -> None:
    file = tmp_path / "payload.json"
    file.write_text(payload)
    uid = document(cli("submit", "--destination", HOOK, "--payload", f"@{file}", "--external-id", "x", "--json"))["id"]
    assert client.value("select payload::text from orchestrator.event") == payload
    for how in ((uid,), ("--external-id", "x"), ("--external-id", "x", "--all")):
        shown = cli("get", *how)
        assert (shown.exit_code, shown.exception) == (0, None)
        assert payload[:40] in shown.stdout
        assert payload in cli("get", *how, "--json").stdout
    client.rows("insert into orchestrator.dead_letter select id, scheduled_at, now(), 1, 'r' from orchestrator.event")
    client.rows(
        """insert into orchestrator.outcome (event_id, scheduled_at, finished_at, attempt, result)
        select id, scheduled_at, now(), 1, 'dead' from orchestrator.event"""
    )
    client.rows("delete from orchestrator.timer")
    shown = cli("dead-letters", "show", uid)
    assert (shown.exit_code, shown.exception) == (0, None)


NUMBERS = ("9" * 4301, "9" * 30, str(2**63), str(2**31), "-1", "1_000", "٣", "nan", "inf", "-inf", "1e400", "0x10", "")


@pytest.mark.parametrize(
    "command",
    [
        ("submit", "--destination", HOOK, "--payload", "1", "--max-retries"),
        ("submit", "--destination", HOOK, "--payload", "1", "--priority"),
        ("submit", "--destination", HOOK, "--payload", "1", "--spread"),
        ("submit", "--destination", HOOK, "--payload", "1", "--at"),
        ("submit", "--destination", HOOK, "--payload", "1", "--expires-in"),
        ("get",),
        ("cancel",),
        ("reschedule", "--in", "1h"),
        ("reschedule", "--external-id", "x", "--in"),
        ("reschedule", "--external-id", "x", "--at"),
        ("dead-letters", "list", "--limit"),
        ("dead-letters", "list", "--from"),
        ("dead-letters", "redrive", "--source", "s", "--yes", "--rate"),
        ("dead-letters", "redrive", "--source", "s", "--yes", "--limit"),
        ("rejects", "list", "--limit"),
        ("rejects", "list", "--before"),
        ("rejects", "show"),
        ("rejects", "resubmit"),
        ("destinations", "list", "--limit"),
        ("destinations", "set", "a.example", "--rate"),
        ("destinations", "set", "a.example", "--rate", "1", "--burst"),
        ("destinations", "set", "a.example", "--max-parallel"),
        ("destinations", "set", "a.example", "--timeout"),
        ("destinations", "set", "a.example", "--spread"),
        ("destinations", "set", "a.example", "--breaker-failures"),
        ("destinations", "set", "a.example", "--breaker-ratio"),
        ("destinations", "set", "a.example", "--breaker-minimum"),
        ("destinations", "set", "a.example", "--breaker-window"),
        ("destinations", "set", "a.example", "--breaker-max-cooldown"),
        ("forecast", "--hours"),
        ("forecast", "--minutes"),
        ("forecast", "--bucket"),
        ("stats", "--from"),
    ],
    ids=lambda command: " ".join(part for part in command if part != HOOK),
)
def test_wrong_numbers_in_options_and_arguments_end_in_a_message(cli: Cli, command: tuple[str, ...]) -> None:
    for number in NUMBERS:
        result = cli(*command, number) if command[-1].startswith("--") else cli(*command, "--", number)
        assert isinstance(result.exception, SystemExit | None), (number[:40], result.exception)
        assert "Traceback" not in result.stderr
        assert len(result.stderr) < 2000, number[:40]


@pytest.mark.parametrize(
    "command",
    [
        ("get", "--external-id"), ("cancel", "--external-id"), ("cancel", "--yes", "--source"),
        ("cancel", "--yes", "--destination"), ("reschedule", "--in", "1h", "--external-id"), ("destinations", "show"),
        ("destinations", "pause"), ("dead-letters", "list", "--reason"), ("forecast", "--destination"), ("get",),
        ("stats", "--from", "-1h", "--source"), ("keys", "revoke"), ("submit",),
    ],
)  # fmt: skip
def test_an_argument_that_is_not_utf_8_ends_in_a_message(cli: Cli, command: tuple[str, ...]) -> None:
    result = cli(*command, "a\udcff")
    assert isinstance(result.exception, SystemExit), result.exception
    assert error_of(result, result.exit_code)


def test_an_event_for_a_day_that_is_too_far_is_refused(cli: Cli) -> None:
    event = ("submit", "--destination", HOOK, "--payload", "1", "--at")
    assert cli(*event, "+399d").exit_code == 0
    assert "more than 400 days ahead (MAX_SCHEDULE_AHEAD_DAYS)" in error_of(cli(*event, "+401d"), 1)
    assert "before the first day" in error_of(cli(*event, "2000-01-01T00:00:00Z"), 1)


@pytest.mark.parametrize(
    ("options", "exit_code", "complaint"),
    [
        (["--destination", "ftp://x", "--payload", "1"], 1, "destination: expected a URL that starts with http"),
        (["--destination", "a/b", "--delivery-type", "KAFKA", "--payload", "1"], 1, "destination: expected a topic"),
        (["--destination", HOOK, "--delivery-type", "kafka", "--payload", "1"], 1, "delivery_type: expected HTTP or"),
        (["--destination", HOOK, "--payload", "{"], 2, "--payload: expected JSON, got '{'"),
        (["--destination", HOOK, "--payload", "1", "--at", "noon"], 1, "scheduled_at: expected an RFC 3339 time"),
        (["--destination", HOOK, "--payload", "1", "--at", "+5"], 2, "--at: expected a time such as +10s"),
        (["--destination", HOOK, "--payload", "1", "--at", "+99999d"], 1, "scheduled_at: "),
        (["--destination", HOOK, "--payload", "1", "--header", "x"], 2, "expected 'Name: value', got 'x'"),
        (["--destination", HOOK, "--payload", "1", "--header", "Host: x"], 1, "headers: expected no host header"),
        (["--destination", HOOK, "--payload", "1", "--priority", "12"], 1, "priority: expected -9 to 9, got 12"),
        (["--destination", HOOK, "--payload", "1", "--spread", "0"], 1, "spread_seconds: expected more than 0 and at"),
        (["--destination", HOOK, "--payload", "1", "--spread", "nan"], 2, "expected a number of seconds, got nan"),
        (["--destination", HOOK], 2, "expected --destination and --payload"),
        (["-", "--destination", HOOK], 2, "leave the other options out"),
        (["-", "--priority", "0"], 2, "leave the other options out"),
    ],
)
def test_a_submission_that_is_refused_says_why(cli: Cli, options: list[str], exit_code: int, complaint: str) -> None:
    assert complaint in error_of(cli("submit", *options), exit_code)


def test_a_payload_is_kept_byte_for_byte(cli: Cli, tmp_path: Path) -> None:
    payload = '{"big": 123456789012345678901234567890.10, "a":  [ "é" ]}'
    (tmp_path / "payload.json").write_text(payload, encoding="utf-8")
    given = ("--destination", HOOK, "--payload", f"@{tmp_path / 'payload.json'}", "--at", "+1h")
    identity = document(cli("submit", *given, "--json"))["id"]
    assert f'"payload" : {payload}' in cli("get", identity, "--json").stdout


def test_a_file_is_submitted_line_by_line_and_bad_lines_are_named(cli: Cli, tmp_path: Path) -> None:
    at = document(cli("stats", "--json"))["at"]
    good = [
        json.dumps({"source": "s", "scheduled_at": at, "destination": HOOK, "payload": n, "external_job_id": f"j{n}"})
        for n in range(3)
    ]
    lines = [good[0], "", "nonsense", good[1], '{"source": "s"}', good[0], good[2]]
    file = tmp_path / "events.jsonl"
    file.write_text("\n".join(lines))
    answer = document(cli("submit", str(file), "--json"), 1)
    assert (answer["accepted"], answer["duplicates"], answer["rejected"]) == (3, 1, 2)
    assert [(each["line"], each.get("status", "error")) for each in answer["results"]] == [
        (1, "scheduled"),
        (3, "error"),
        (4, "scheduled"),
        (5, "error"),
        (6, "duplicate"),
        (7, "scheduled"),
    ]
    again = cli("submit", "-", stdin="\n".join(good))
    assert (again.exit_code, again.stdout) == (0, "accepted 0, duplicates 3, rejected 0\n")
    for_people = cli("submit", "-", stdin="nonsense\n")
    assert for_people.exit_code == 1
    assert for_people.stderr.startswith("line 1: body: expected JSON")


def test_get_by_external_id_is_the_newest_or_with_all_every_one(cli: Cli) -> None:
    first, second = (submitted(cli, "--at", at, "--external-id", "job") for at in ("+1h", "+2h"))
    assert document(cli("get", "--external-id", "job", "--json"))["id"] == second
    every = document(cli("get", "--external-id", "job", "--all", "--json"))
    assert [event["id"] for event in every] == [second, first]
    assert "older events" in cli("get", "--external-id", "job").stdout
    assert "no event with the external id 'nix'" in error_of(cli("get", "--external-id", "nix"), 1)
    assert "expected a UUID" in error_of(cli("get", "42"), 2)


@pytest.mark.parametrize("payload", ["[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" * 4400 + "}" * 3000])
def test_an_event_with_a_payload_too_deep_to_be_decoded_is_shown(cli: Cli, client: Client, payload: str) -> None:
    [answer] = client.submit(event(external_job_id="deep", payload=1))
    client.rows("update orchestrator.event set payload = %s::json", payload)
    shown = cli("get", "--external-id", "deep")
    assert (shown.exit_code, str(answer.id) in shown.stdout) == (0, True), shown.output
    assert payload[:100] in shown.stdout.replace("\n", "")
    assert payload in cli("get", str(answer.id), "--json").stdout


def test_texts_that_a_client_sent_cannot_drive_the_terminal(cli: Cli) -> None:
    identity = submitted(cli, "--at", "+1h", "--external-id", "\x1b[31mred[bold]")
    shown = cli("get", identity).stdout
    assert "\x1b" not in shown
    assert "\\x1b[31mred[bold]" in shown


def test_cancel_reports_its_result_and_fails_when_there_was_nothing_to_cancel(cli: Cli) -> None:
    identity = submitted(cli, "--at", "+1h", "--external-id", "job")
    assert document(cli("cancel", identity, "--json"))["result"] == "cancelled"
    assert document(cli("cancel", "--external-id", "job", "--json"))[0]["result"] == "already_cancelled"
    assert "cancelled" in cli("get", identity).stdout
    missing = "0190a000-0000-7000-8000-000000000000"
    assert document(cli("cancel", missing, "--json"), 1)["result"] == "not_found"
    assert error_of(cli("cancel", missing), 1) == f"{missing} was not cancelled: there is no such event"
    assert document(cli("cancel", "--external-id", "nix", "--json"), 1) == []


# stats and dead letters


def test_stats_count_events_by_state(cli: Cli) -> None:
    submitted(cli, "--at", "+1h")
    found = document(cli("stats", "--json"))
    assert (found["scheduled"], found["totals"]["accepted"]) == (1, 1)
    assert re.search(r"scheduled +1 ", cli("stats").stdout)


def test_stats_by_counts_outcomes_in_a_range_of_time(cli: Cli) -> None:
    for source, target in (("a", HOOK), ("a", HOOK), ("b\x1b[31m", "https://shop.example/x")):
        submitted(cli, "--at", "+1h", "--source", source, "--destination", target)
    by = document(cli("stats", "--by", "destination,source", "--json"))
    assert [(each["name"], each["minute"], each["source"], each["destination"], each["value"]) for each in by] == [
        ("accepted", None, "a", "127.0.0.1:9", 2),
        ("accepted", None, "b\x1b[31m", "shop.example", 1),
    ]
    assert document(cli("stats", "--source", "a", "--json"))[0]["value"] == 2
    assert document(cli("stats", "--destination", "shop.example", "--by", "minute", "--json"))[0]["value"] == 1
    shown = cli("stats", "--by", "minute,source", "--from", "-1d").stdout
    assert re.search(r"minute +source +accepted\n", shown)
    assert re.search(r"\d\d:\d\d +a +2\n", shown)
    assert "\x1b" not in shown
    assert "There are no counts in this range." in cli("stats", "--until", "-1d").stdout


@pytest.mark.parametrize(
    ("options", "exit_code", "complaint"),
    [
        (["--by", "hour"], 2, "expected some of minute,source,destination, got 'hour'"),
        (["--by", ""], 2, "expected some of minute,source,destination, got ''"),
        (["--by", "minute", "--watch"], 2, "--watch: shows only states; leave --by and the filter out"),
        (["--from", "+1h"], 1, "--from: expected a time before until"),
        (["--from", "now", "--until", "-1h"], 2, "--until: expected a time after --from"),
    ],
)
def test_stats_with_wrong_options_say_why(cli: Cli, options: list[str], exit_code: int, complaint: str) -> None:
    assert complaint in error_of(cli("stats", *options), exit_code)


async def test_a_dead_letter_is_listed_and_its_attempts_are_in_the_timeline(cli: Cli, spawn: Spawn) -> None:
    identity = submitted(cli, "--max-retries", "0")
    assert "no dead letters" in cli("dead-letters", "list").stdout
    spawn("dispatch")
    await eventually(lambda: document(cli("dead-letters", "list", "--json")))
    assert document(cli("dead-letters", "list", "--limit", "1", "--json"))[0]["id"] == identity
    assert "connection refused" in cli("dead-letters", "list").stdout
    assert "attempt 1 dead" in cli("get", identity).stdout
    assert "it has ended already (dead)" in error_of(cli("cancel", identity), 1)


# config and keys


def test_config_check_masks_secrets_and_names_doubtful_settings(cli: Cli) -> None:
    given = {"DATABASE_URL": "jdbc:postgresql://u:geheim@db/x", "SCHEDULER_BATCHSIZE": "5", "BATCH_SIZE": "7"}
    checked = document(cli("config", "check", "--json", **given))
    assert checked["settings"]["SCHEDULER_BATCH_SIZE"]["value"] == "7"
    assert checked["settings"]["SCHEDULER_BATCH_SIZE"]["source"] == "BATCH_SIZE"
    assert any("did you mean" in notice for notice in checked["notices"])
    shown = cli("config", "check", **given).stdout
    assert "did you mean" in shown
    assert "postgresql://u:***@db/x" in shown
    assert "geheim" not in shown + json.dumps(checked)
    assert "SERVER_PORT" in error_of(cli("config", "check", DATABASE_URL=NOWHERE, SERVER_PORT="0"), 2)


def test_config_table_documents_every_setting() -> None:
    table = invoke("config", "table").stdout
    rows = document(invoke("config", "table", "--json"))
    assert all(f"`{name}`" in table for row in rows for name in row["names"])


def test_a_key_is_printed_once_listed_without_itself_and_gone_when_revoked(cli: Cli) -> None:
    made = document(cli("keys", "create", "web", "--scope", "submit", "--scope", "read", "--json"))
    assert re.fullmatch(r"orch_[A-Za-z0-9_-]{43}", made["key"])
    assert made["scopes"] == ["read", "submit"]
    assert "revoke it first" in error_of(cli("keys", "create", "web", "--scope", "read"), 1)
    listed = cli("keys", "list", "--json")
    assert [key["name"] for key in document(listed)] == ["web"]
    assert made["key"] not in listed.stdout
    assert "read, submit" in cli("keys", "list").stdout
    assert document(cli("keys", "revoke", "web", "--json"))["revoked"] is True
    assert document(cli("keys", "revoke", "web", "--json"), 1)["revoked"] is False
    assert "no key named 'web'" in error_of(cli("keys", "revoke", "web"), 1)


def test_creating_a_key_prints_only_the_key_on_standard_output(cli: Cli) -> None:
    result = cli("keys", "create", "ci", "--scope", "admin")
    assert re.fullmatch(r"orch_[A-Za-z0-9_-]{43}\n", result.stdout)
    assert "not shown again" in result.stderr


# doctor


def findings(result: Result) -> dict[str, str]:
    """Check → the worst level found."""
    worst: dict[str, str] = {}
    for finding in json.loads(result.stdout)["findings"]:
        if worst.get(finding["check"]) != "problem" and finding["level"] != "ok":
            worst[finding["check"]] = finding["level"]
        worst.setdefault(finding["check"], finding["level"])
        assert (finding["mend"] == "") == (finding["level"] == "ok"), finding
    return worst


def test_doctor_finds_a_fresh_installation_well(cli: Cli) -> None:
    secret = "whsec_" + "A" * 32
    result = cli("doctor", "--json", WEBHOOK_SECRETS=secret)
    found = findings(result)
    assert found.pop("durability") == "problem"  # servers of tests do without
    assert set(found.values()) == {"ok"}, result.stdout
    assert {"settings", "database", "clock", "roles", "migrations", "rights", "partitions", "leases"} <= found.keys()


def test_doctor_names_settings_that_are_wrong_in_production(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = cli("doctor", "--json", ENVIRONMENT="production", SERVER_PORT=str(taken.getsockname()[1]))
    assert result.exit_code == 1
    found = findings(result)
    wrong = {check for check, level in found.items() if level == "problem"} - {"durability"}
    assert wrong == {"webhook secrets", "API keys", "ports"}
    assert found["rights"] == "warning"


def test_doctor_reports_work_that_no_process_does(cli: Cli, database_url: str) -> None:
    submitted(cli, "--max-retries", "0")
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("update orchestrator.timer set due_at = due_at - interval '1 hour'")
        found = findings(cli("doctor", "--json"))
        assert (found["dispatchers"], found["backlog"]) == ("warning", "problem")
        connection.execute("select orchestrator.claim_due_events(1)")
        connection.execute("update orchestrator.timer set lease_until = lease_until - interval '1 hour'")
        assert findings(cli("doctor", "--json"))["leases"] == "warning"
        connection.execute("drop table orchestrator.timer cascade")
    shown = cli("doctor")
    assert "problem" in shown.stdout
    assert shown.exit_code == 1


def test_doctor_says_what_to_do_when_no_further_check_is_possible(cli: Cli, empty_database_url: str) -> None:
    assert "start the server" in cli("doctor", DATABASE_URL=NOWHERE).stdout
    assert "run orchestrator migrate" in cli("doctor", DATABASE_URL=empty_database_url).stdout
    wrong = cli("doctor", DATABASE_URL=NOWHERE, SERVER_PORT="x")
    assert (wrong.exit_code, "SERVER_PORT: expected" in wrong.stdout) == (1, True)


# The processes that stay


async def test_run_serves_delivers_and_stops_in_order(cli: Cli, spawn: Spawn, receiver: Receiver) -> None:
    port = free_port()
    process = spawn("run", SERVER_PORT=str(port), REDIS_HOST="cache")
    await process.wait_for_log("listening")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as api:
        assert (await api.get("/ready")).status_code == 200
        now = document(cli("stats", "--json"))["at"]
        event = {"source": "s", "scheduled_at": now, "destination": receiver.url("/hook"), "payload": 1}
        identity = (await api.post("/api/v1/events", json=event)).json()["id"]
    await receiver.wait_for(1, "/hook")
    await eventually(lambda: document(cli("get", identity, "--json"))["status"] == "delivered")
    assert document(cli("doctor", "--json", SERVER_PORT=str(port)), 1)["findings"][2]["check"] == "ports"
    assert await process.stop() == 0
    assert "REDIS_HOST: no effect" in process.log()
    assert '"message": "stopped"' in process.log()


async def test_run_waits_for_a_database_that_is_away(spawn: Spawn, postgres_server: EmbeddedPostgres) -> None:
    url, port = postgres_server.url("orchestrator"), free_port()
    postgres_server.stop()
    process = spawn("run", DATABASE_URL=url, SERVER_PORT=str(port))
    await process.wait_for_log("waiting for the database")
    postgres_server.start()
    await process.wait_for_log("listening")
    assert await process.stop() == 0


async def test_a_process_that_waits_for_its_database_stops_when_told(spawn: Spawn) -> None:
    process = spawn("api", DATABASE_URL=NOWHERE)
    await process.wait_for_log("waiting for the database")
    assert await process.stop() == 0


@pytest.mark.parametrize("role", ["run", "api", "dispatch"])
async def test_a_process_ends_with_the_remedy_when_the_database_is_not_migrated(
    spawn: Spawn, empty_database_url: str, role: str
) -> None:
    process = spawn(role, DATABASE_URL=empty_database_url)
    assert await process.wait() == 1
    assert "run: orchestrator migrate" in process.log()


@pytest.fixture
def login(database_url: str) -> Iterator[Callable[[str], str]]:
    """Makes a login that is a member of one role only, and returns its URL of this test's database."""
    made: list[str] = []

    def make(role: str) -> str:
        name = f"login_{uuid4().hex}"
        connection.execute(f"create role {name} login password 'p' in role {role}".encode())
        made.append(name)
        parts = urlsplit(database_url)
        return urlunsplit(parts._replace(netloc=f"{name}:p@{parts.hostname}:{parts.port}"))

    with psycopg.connect(database_url, autocommit=True) as connection:
        yield make
        for name in made:
            connection.execute(f"drop role {name}".encode())


async def test_each_role_of_the_database_suffices_for_its_command(
    cli: Cli, spawn: Spawn, login: Callable[[str], str], receiver: Receiver
) -> None:
    event = ("submit", "--destination", receiver.url("/hook"), "--payload", "1")
    assert cli(*event, DATABASE_URL=login("orchestrator_submit")).exit_code == 0
    process = spawn("dispatch", DATABASE_URL=login("orchestrator_dispatch"))
    await receiver.wait_for(1, "/hook")
    reader = login("orchestrator_read")
    await eventually(lambda: document(cli("stats", "--json", DATABASE_URL=reader))["totals"]["delivered"] == 1)
    assert "permission denied" in error_of(cli(*event, DATABASE_URL=reader), 1)
    assert cli("maintain", "--once", DATABASE_URL=login("orchestrator_ops")).exit_code == 0
    assert await process.stop() == 0
    api = spawn("api", DATABASE_URL=login("orchestrator_submit"))
    await api.wait_for_log("listening")
    assert await api.stop() == 0


async def test_a_process_is_ready_only_while_its_login_has_the_rights_it_needs(
    spawn: Spawn, login: Callable[[str], str], client: Client
) -> None:
    url = login("orchestrator_read")
    user = str(urlsplit(url).username)
    remedy = f"grant orchestrator_submit to {user}"
    refused = spawn("api", DATABASE_URL=url)
    assert await refused.wait() == 1
    assert remedy in refused.log()
    client.connection.execute(f"grant orchestrator_submit to {user}".encode())
    port = free_port()
    await spawn("api", DATABASE_URL=url, SERVER_PORT=str(port)).wait_for_log('"message": "ready"')
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as api:

        async def is_ready(wanted: int) -> bool:
            return await status(api, "/ready") == wanted

        await until(lambda: is_ready(200))
        client.connection.execute(f"revoke orchestrator_submit from {user}".encode())
        await until(lambda: is_ready(503))
        assert remedy in (await api.get("/ready")).text
        event = {"source": "tests", "scheduled_at": "2030-01-01T00:00:00Z", "payload": 1}
        posted = await api.post("/api/v1/events", json=event | {"destination": "https://receiver.example/hook"})
        assert (posted.status_code, "permission denied for" in posted.json()["detail"]) == (500, True)
        client.connection.execute(f"grant orchestrator_submit to {user}".encode())
        await until(lambda: is_ready(200))


async def test_the_api_ends_with_the_remedy_in_production_without_keys_and_starts_with_one(
    cli: Cli, spawn: Spawn
) -> None:
    port = str(free_port())
    process = spawn("api", ENVIRONMENT="production", SERVER_PORT=port)
    assert await process.wait() == 1
    assert "orchestrator keys create" in process.log()
    assert cli("keys", "create", "web", "--scope", "submit").exit_code == 0
    process = spawn("api", ENVIRONMENT="production", SERVER_PORT=port)
    await process.wait_for_log("listening")
    assert await process.stop() == 0


async def test_a_port_that_is_taken_is_named_once_and_ends_the_process(spawn: Spawn, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = spawn("run", SERVER_PORT=port)
        assert await process.wait() == 1
        assert process.log().count("SERVER_PORT: cannot listen") == 1
        to_file = spawn("run", SERVER_PORT=port, LOG_FILE=str(tmp_path / "log"))
        assert await to_file.wait() == 1
        assert to_file.log().startswith("Error: SERVER_PORT: cannot listen")
        assert "SERVER_PORT: cannot listen" in (tmp_path / "log").read_text()


async def test_a_dispatcher_answers_probes_on_the_management_port_even_without_its_database(spawn: Spawn) -> None:
    port = free_port()
    process = spawn("dispatch", DATABASE_URL=NOWHERE, MANAGEMENT_SERVER_PORT=str(port))
    await process.wait_for_log("listening")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20) as management:
        assert (await management.get("/health")).status_code == 200
        assert (await management.get("/ready")).status_code == 503
        assert "orchestrator_events_claimed_total" in (await management.get("/metrics")).text
    assert await process.stop() == 0


async def test_a_second_signal_ends_a_process_at_once(cli: Cli, spawn: Spawn, receiver: Receiver) -> None:
    submit = ("submit", "--destination", receiver.script("/hang", HANG), "--payload", "1")
    assert cli(*submit).exit_code == 0
    process = spawn("dispatch")
    await receiver.wait_for(1, "/hang")
    os.kill(process.pid, 15)
    await process.wait_for_log("a second signal ends the process at once")
    os.kill(process.pid, 15)
    assert await process.wait(5) == 128 + 15


async def test_a_delivery_under_way_holds_a_stop_up_no_longer_than_the_setting(
    cli: Cli, spawn: Spawn, receiver: Receiver
) -> None:
    submit = ("submit", "--destination", receiver.script("/hang", HANG), "--payload", "1")
    assert cli(*submit).exit_code == 0
    process = spawn("dispatch", SHUTDOWN_TIMEOUT_SECONDS="1")
    await receiver.wait_for(1, "/hang")
    assert await process.stop(timeout_s=6) in (0, 1)
