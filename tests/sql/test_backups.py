"""What is recorded about backups, and what is told of it."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest

from tests.support.sql_client import NOON, Client


def record(
    client: Client, kind: str = "logical", *, after_s: float = 0.0, took_s: float = 1.0, problem: str | None = None
) -> int:
    began = NOON + timedelta(seconds=after_s)
    run: int = client.value(
        "select orchestrator.record_backup(%s, %s, %s, 10, '/backup/file', %s)",
        kind, began, began + timedelta(seconds=took_s), problem,
    )  # fmt: skip
    return run


def told(client: Client) -> dict[str, tuple[datetime | None, str | None]]:
    return {
        kind: (success, problem)
        for kind, success, _, problem, _ in client.rows("select * from orchestrator.backups()")
    }  # fmt: skip


def test_each_kind_of_backup_is_told_of_even_if_there_was_none(client: Client) -> None:
    found = told(client)
    assert set(found) == {"logical", "base", "verify", "wal"}
    assert found["logical"] == (None, None)
    record(client, "base")
    assert told(client)["base"] == (NOON + timedelta(seconds=1), None)
    assert told(client)["logical"] == (None, None)


def test_a_failed_backup_is_told_of_until_one_succeeds_and_hides_no_good_one(client: Client) -> None:
    record(client)
    record(client, after_s=60, problem="no space left on device")
    assert told(client)["logical"] == (NOON + timedelta(seconds=1), "no space left on device")
    record(client, after_s=120)
    assert told(client)["logical"] == (NOON + timedelta(seconds=121), None)


def test_a_hundred_runs_are_kept_and_the_last_good_one(client: Client) -> None:
    good = record(client)
    other = record(client, "verify")
    for n in range(150):
        record(client, after_s=n, problem="full")
    kept = client.column("select run from orchestrator.backup_run where kind = 'logical' order by run")
    assert len(kept) == 101
    assert kept[0] == good
    assert client.column("select run from orchestrator.backup_run where kind = 'verify'") == [other]
    assert told(client)["logical"] == (NOON + timedelta(seconds=1), "full")


def test_backups_of_another_cluster_are_none_of_this_one(client: Client) -> None:
    record(client)
    assert client.value("select cluster from orchestrator.backup_run") == client.value(
        "select system_identifier from pg_control_system()"
    )
    client.rows("update orchestrator.backup_run set cluster = cluster + 1")
    assert told(client)["logical"] == (None, None)


@pytest.mark.parametrize(
    ("kind", "began", "ended", "size"),
    [
        ("wal", NOON, NOON, 1),
        (None, NOON, NOON, 1),
        ("base", NOON, NOON - timedelta(seconds=1), 1),
        ("base", None, NOON, 1),
        ("base", NOON, NOON, -1),
    ],
)
def test_a_wrong_record_is_refused_with_what_was_given(
    client: Client, kind: Any, began: Any, ended: Any, size: int
) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="record_backup: expected kind logical, base or"):
        client.value("select orchestrator.record_backup(%s, %s, %s, %s)", kind, began, ended, size)


def test_a_long_problem_is_cut(client: Client) -> None:
    record(client, problem="x" * 5000)
    assert told(client)["logical"] == (None, "x" * 1000)
