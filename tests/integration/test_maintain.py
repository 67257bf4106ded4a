"""`orchestrator maintain`, and the part of `run` that does the same: it keeps at it, whatever fails."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from click.testing import CliRunner, Result
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.cli import main
from orchestrator.dev.operating_system import free_port
from orchestrator.doctor import diagnose
from orchestrator.maintenance.upkeep import maintain
from orchestrator.metrics import Metrics
from tests.conftest import MakeSettings, Spawn
from tests.support.retiring import OLD, retire, schedule_old_day, undeliverable
from tests.support.sql_client import NOON, Client
from tests.support.waiting import eventually

Cli = Callable[..., Result]
TOLD = "select retention_days, partition_days_ahead, max_schedule_ahead_days, archive from orchestrator.control"
BLOCKED = """
select count(*) from pg_stat_activity
where application_name = 'orchestrator maintain' and wait_event_type = 'Lock' and datname = current_database()
"""


@pytest.fixture
def cli(environ: Callable[..., dict[str, str]]) -> Cli:
    """Runs `maintain` once, in this process: ``cli("--json", CLEANUP_RETENTION_DAYS="3")``."""

    def run(*arguments: str, **given: str) -> Result:
        with mock.patch.dict(os.environ, environ(**given), clear=True), ThreadPoolExecutor(1) as thread:
            return thread.submit(CliRunner().invoke, main, ["maintain", *arguments]).result()

    return run


@pytest.fixture
def other(database_url: str) -> Iterator[Client]:
    """One more session, to hold locks."""
    with Client(database_url) as other:
        yield other


def old_days(client: Client, count: int) -> None:
    """Makes so many days that retention of a week does not keep, with nothing in them."""
    client.rows("select orchestrator.create_partitions(%s, %s)", OLD.date() - timedelta(days=count - 1), OLD.date())


def retired(client: Client) -> int:
    count: int = client.value("select count(*) from orchestrator.retired_partition")
    return count


@pytest.mark.parametrize("role", ["run", "maintain"])
async def test_maintain_tells_the_database_what_to_keep_and_catches_up_at_once(
    spawn: Spawn, client: Client, role: str
) -> None:
    old_days(client, 4)
    process = spawn(role, CLEANUP_RETENTION_DAYS="5", PARTITION_DAYS_AHEAD="33")
    # A day a run: without catching up it would take eight minutes. A first claim on a busy machine may hold its locks
    # for longer than maintenance waits; then the catching up begins a minute later.
    await eventually(lambda: retired(client) >= 8, 75)
    assert client.rows(TOLD) == [(5, 33, 400, False)]
    assert client.value("select end_day::date from orchestrator.partition_bounds()") == NOON.date() + timedelta(34)
    assert await process.stop() == 0


async def test_a_failing_step_is_logged_and_counted_and_the_other_steps_are_done(
    spawn: Spawn, client: Client, other: Client
) -> None:
    old_days(client, 1)
    other.rows("begin")
    other.rows("select count(*) from orchestrator.event")  # nothing can be detached
    port = free_port()
    process = spawn("maintain", MANAGEMENT_SERVER_PORT=str(port), PARTITION_DAYS_AHEAD="31")
    await process.wait_for_log("a step of maintenance failed")
    [line] = [json.loads(line) for line in process.log().splitlines() if "a step of maintenance failed" in line]
    assert (line["level"], line["step"]) == ("WARNING", "partitions_detached")
    assert "lock timeout" in line["problem"]
    assert client.value("select end_day::date from orchestrator.partition_bounds()") == NOON.date() + timedelta(32)
    async with httpx.AsyncClient(trust_env=False) as http:
        text = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
    found = {
        (sample.name, sample.labels.get("step")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["orchestrator_maintenance_problems_total", "partitions_detached"] == 1
    assert found["orchestrator_maintenance_failing_steps", None] == 1
    assert 31 <= found["orchestrator_partition_days_ahead", None] <= 32
    assert 0 <= found["orchestrator_maintenance_age_seconds", None] < 30
    assert await process.stop() == 0


async def test_a_database_that_is_away_does_not_end_maintenance(
    settings: MakeSettings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, client: Client
) -> None:
    monkeypatch.setattr("orchestrator.maintenance.upkeep._EVERY_S", 0.02)
    away = settings()
    object.__setattr__(away, "database_url", "postgresql://127.0.0.1:1/none")
    stop = asyncio.Event()
    with caplog.at_level(logging.ERROR, "orchestrator.maintenance.upkeep"):
        task = asyncio.create_task(maintain(away, Metrics(away), stop))
        await eventually(lambda: caplog.text.count("maintenance failed; trying again in a minute") >= 2)
        object.__setattr__(away, "database_url", settings().database_url)
        runs = client.value("select count(*) from orchestrator.maintenance_run")
        await eventually(lambda: client.value("select count(*) from orchestrator.maintenance_run") > runs)
        stop.set()
        await task


async def test_maintenance_stopped_in_the_middle_ends_at_once(
    settings: MakeSettings, client: Client, other: Client
) -> None:
    other.rows("begin")
    other.rows("lock table orchestrator.control in access exclusive mode")
    ours = settings()
    stop = asyncio.Event()
    task = asyncio.create_task(maintain(ours, Metrics(ours), stop))
    await eventually(lambda: client.value(BLOCKED) == 1)
    stop.set()
    async with asyncio.timeout(1):
        await task
    other.rows("rollback")
    await eventually(lambda: client.value(BLOCKED) == 0)


def test_maintain_once_does_all_steps_and_reports_them(cli: Cli, client: Client) -> None:
    old_days(client, 3)
    shown = cli("--once").stdout
    assert re.search(r"^partitions detached +9$", shown, re.MULTILINE), shown
    told = json.loads(cli("--json").stdout)
    assert told["partitions_detached"] == 0
    assert (told["runs"], told["more"], told["problems"], told["archived"]) == (1, False, [], [])


def test_maintain_once_leaves_settings_that_it_is_not_given(cli: Cli, client: Client, tmp_path: Path) -> None:
    client.rows("select orchestrator.configure_retention(9, 31, 500, true)")
    assert cli("--once").exit_code == 0
    assert client.rows(TOLD) == [(9, 31, 500, True)]
    assert cli("--once", CLEANUP_RETENTION_DAYS="8", MAX_SCHEDULE_AHEAD_DAYS="450").exit_code == 0
    assert client.rows(TOLD) == [(8, 31, 450, True)]
    client.rows("select orchestrator.configure_retention(p_archive => false)")
    assert cli("--once", ARCHIVE_DIRECTORY=str(tmp_path)).exit_code == 0
    assert client.rows(TOLD) == [(8, 31, 450, True)]


def test_maintain_once_archives_too(cli: Cli, client: Client, tmp_path: Path) -> None:
    schedule_old_day(client)
    retire(client)
    told = json.loads(cli("--json", ARCHIVE_DIRECTORY=str(tmp_path)).stdout)
    assert str(tmp_path / f"event_p{OLD:%Y%m%d}.csv.gz") in told["archived"]
    assert sorted(map(str, tmp_path.iterdir())) == sorted(told["archived"])


def test_maintain_once_exits_with_1_when_a_step_fails_and_with_0_when_another_run_is_at_work(
    cli: Cli, client: Client, other: Client
) -> None:
    old_days(client, 1)
    other.rows("begin")
    other.rows("select count(*) from orchestrator.event")
    failed = cli("--once")
    assert (failed.exit_code, "✗ partitions_detached: " in failed.stdout) == (1, True), failed.output
    assert cli("--json").exit_code == 1
    other.rows("select pg_advisory_xact_lock(hashtext('orchestrator.run_maintenance'))")
    assert (cli("--once").stdout, cli("--once").exit_code) == ("Skipped: another run_maintenance is at work.\n", 0)


def test_maintain_once_does_other_steps_when_it_cannot_store_the_retention_and_names_the_blocker(
    cli: Cli, client: Client, other: Client
) -> None:
    old_days(client, 1)
    other.rows("begin")
    other.rows("select 1 from orchestrator.control for update")
    result = cli("--json", CLEANUP_RETENTION_DAYS="11")
    told = json.loads(result.stdout)
    assert (result.exit_code, told["partitions_detached"]) == (1, 3)
    problems = {problem["step"]: problem["problem"] for problem in told["problems"]}
    assert f"pid {other.pid} " in problems["retention_configured"]
    other.rows("rollback")
    assert cli("--once", CLEANUP_RETENTION_DAYS="11").exit_code == 0
    assert client.value("select retention_days from orchestrator.control") == 11


@pytest.mark.parametrize("days", ["0", "-3"])
async def test_a_retention_that_keeps_nothing_stops_the_start(spawn: Spawn, client: Client, days: str) -> None:
    process = spawn("maintain", CLEANUP_RETENTION_DAYS=days)
    assert await process.wait() == 2
    assert f"CLEANUP_RETENTION_DAYS: expected a whole number from 1 to 36500, got '{days}'" in process.log()
    assert client.rows(TOLD) == [(7, 30, 400, False)]


# What doctor says of it


@pytest.fixture
def findings(environ: Callable[..., dict[str, str]]) -> Callable[..., dict[str, list[str]]]:
    """What doctor finds to be wrong, by what it looked at."""

    def find(**given: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for finding in diagnose(environ(**given)):
            if finding.level != "ok":
                found.setdefault(finding.check, []).append(finding.what)
        return found

    return find


def test_doctor_sees_that_no_process_maintains_the_database(
    client: Client, findings: Callable[..., dict[str, Any]]
) -> None:
    client.rows("update orchestrator.maintenance_run set started_at = started_at - interval '3 hours'")
    assert findings()["maintenance"] == ["maintenance last ran 3 hours ago"]
    client.rows("delete from orchestrator.maintenance_run")
    assert findings()["maintenance"] == ["maintenance has never run"]


def test_doctor_names_failing_steps_and_a_retention_that_differs(
    client: Client, other: Client, findings: Callable[..., dict[str, Any]]
) -> None:
    old_days(client, 1)
    other.rows("begin")
    other.rows("select count(*) from orchestrator.event")
    client.rows("select orchestrator.run_maintenance()")
    client.rows("select orchestrator.configure_retention(p_retention_days => 30)")
    found = findings(CLEANUP_RETENTION_DAYS="14")
    [step] = found["maintenance"]
    assert step.startswith("step partitions_detached failed in that run: ")
    assert found["retention"] == [
        "the database has other values: CLEANUP_RETENTION_DAYS is 14 here and 30 in the database"
    ]


def test_doctor_names_partitions_that_no_process_archives_and_dead_letters_that_are_about_to_go(
    client: Client, findings: Callable[..., dict[str, Any]]
) -> None:
    schedule_old_day(client)
    retire(client)
    client.rows("update orchestrator.retired_partition set detached_at = detached_at - interval '2 days'")
    client.rows("delete from orchestrator.retired_partition where name not like %s", f"%{OLD:%Y%m%d}")
    dying = NOON - timedelta(days=7)
    client.at(dying - timedelta(hours=1))
    doomed = client.schedule(scheduled_at=dying)
    client.at(None)
    for identity in (doomed, client.schedule(scheduled_at=NOON)):
        client.rows(
            """insert into orchestrator.dead_letter (event_id, scheduled_at, died_at, attempts, reason)
            select id, scheduled_at, orchestrator.now(), 1, 'refused' from orchestrator.event where id = %s""",
            identity,
        )
    found = findings()
    names = ", ".join(f"{parent}_p{OLD:%Y%m%d}" for parent in ("delivered_batch", "event", "outcome"))
    assert found["archive"] == [f"3 partitions past retention not archived yet: {names}"]
    assert found["dead letters"] == ["2 events ran out of attempts; retention drops 1 event of them within a day"]


def test_a_day_with_an_unfinished_event_is_kept(client: Client) -> None:
    schedule_old_day(client)
    undeliverable(client)
    assert f"event_p{OLD:%Y%m%d}" not in retire(client)
