"""The archive: days past retention become files, whole or not at all, and only then are they dropped."""

from __future__ import annotations

import asyncio
import gzip
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow.parquet
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb

from orchestrator.maintenance.archive import archive
from orchestrator.settings import Settings
from tests.conftest import MakeSettings
from tests.support.processes import ROOT
from tests.support.retiring import OLD, TEXTS, retire, schedule_old_day
from tests.support.sql_client import Client, results
from tests.support.waiting import eventually

EVENTS = f"event_p{OLD:%Y%m%d}"
OUTCOMES = f"outcome_p{OLD:%Y%m%d}"


@pytest.fixture
def old_day(client: Client) -> list[str]:
    """Tables of a day that waits to be archived."""
    schedule_old_day(client)
    names = retire(client)
    assert {EVENTS, OUTCOMES} <= set(names)
    client.rows("delete from orchestrator.retired_partition where name <> all (%s)", [EVENTS, OUTCOMES])
    return [EVENTS, OUTCOMES]


@pytest.fixture
def chosen(settings: MakeSettings, tmp_path: Path) -> Settings:
    return settings(ARCHIVE_DIRECTORY=str(tmp_path))


def rows(client: Client, table: str) -> list[str]:
    """The rows of a table as text, which tells a null from an empty string."""
    query = sql.SQL("select t::text from orchestrator.{} t order by 1").format(sql.Identifier(table))
    return [row[0] for row in client.connection.execute(query).fetchall()]


def restore(client: Client, file: Path, parent: str) -> str:
    """Reads a file into a new table, as the README says; returns the table's name."""
    name = f"restored_{parent}"
    client.connection.execute(
        sql.SQL("create table orchestrator.{} (like orchestrator.{})").format(
            sql.Identifier(name), sql.Identifier(parent)
        )
    )
    copy_rows(client, file, name)
    return name


def copy_rows(client: Client, file: Path, name: str) -> None:
    """Reads a file into an existing table."""
    with (
        gzip.open(file) as lines,
        client.connection.cursor() as cursor,
        cursor.copy(
            sql.SQL("copy orchestrator.{} from stdin (format csv, header match)").format(sql.Identifier(name))
        ) as copy,
    ):
        while data := lines.read(1 << 16):
            copy.write(data)


def waiting(client: Client) -> list[str]:
    names: list[str] = client.column("select name from orchestrator.partitions_to_archive() order by 1")
    return names


async def test_an_archived_day_is_restored_row_by_row(
    client: Client, old_day: list[str], chosen: Settings, tmp_path: Path
) -> None:
    told = await archive(chosen)
    files = [tmp_path / f"{name}.csv.gz" for name in old_day]
    assert (told.files, told.problems) == ([str(file) for file in files], [])
    assert sorted(tmp_path.iterdir()) == files
    for file, table in zip(files, old_day, strict=True):
        assert len(rows(client, table)) == len(TEXTS)
        assert rows(client, restore(client, file, table.partition("_p")[0])) == rows(client, table)
    assert client.column("select error from orchestrator.restored_outcome") == list(TEXTS)
    assert waiting(client) == []
    assert await archive(chosen) == type(told)()


async def test_a_parquet_archive_holds_the_same_rows(
    client: Client, old_day: list[str], settings: MakeSettings, tmp_path: Path
) -> None:
    told = await archive(settings(ARCHIVE_DIRECTORY=str(tmp_path), ARCHIVE_FORMAT="parquet"))
    assert (told.files, told.problems) == ([str(tmp_path / f"{name}.parquet") for name in old_day], [])
    for name in old_day:
        table = pyarrow.parquet.read_table(tmp_path / f"{name}.parquet")
        columns = client.rows(
            """select attname, format_type(atttypid, null) from pg_attribute
            where attrelid = ('orchestrator.' || %s)::regclass and attnum > 0 and not attisdropped order by attnum""",
            name,
        )
        assert table.column_names == [column for column, _ in columns]
        key = "id" if name == EVENTS else "event_id"
        kept = {"smallint", "integer", "bigint", "boolean", "double precision", "timestamp with time zone"}
        wanted = sql.SQL("select {} from orchestrator.{} order by {}::text").format(
            sql.SQL(", ").join(
                sql.SQL("{}{}").format(sql.Identifier(column), sql.SQL("" if kind in kept else "::text"))
                for column, kind in columns
            ),
            sql.Identifier(name),
            sql.Identifier(key),
        )
        found = sorted(table.to_pylist(), key=lambda row: str(row[key]))
        assert [tuple(row.values()) for row in found] == client.connection.execute(wanted).fetchall()
    assert waiting(client) == []


@pytest.mark.parametrize("form", ["csv", "parquet"])
async def test_delivered_batches_are_archived_as_the_rows_of_outcome_that_they_stand_for(
    client: Client, settings: MakeSettings, tmp_path: Path, form: str
) -> None:
    client.at(OLD - timedelta(hours=1)).rows("select orchestrator.create_partitions(%s, %s)", OLD.date(), OLD.date())
    for n in range(5):
        client.schedule(scheduled_at=OLD - timedelta(microseconds=7 * n))
    leases = client.at(OLD).claim()
    began = OLD.timestamp()
    given = results(leases, status_code=200, started_at=began + 0.5, finished_at=began + 0.75)
    assert client.finish_as_dispatcher(leases, given, worker=3) == []
    assert client.value("select count(*) from orchestrator.delivered_batch") > 0
    columns = "event_id, scheduled_at, due_at, started_at, finished_at, worker, attempt, status_code, result"
    kept = client.rows(f"select {columns} from orchestrator.outcomes order by 1")
    retire(client)
    assert (await archive(settings(ARCHIVE_DIRECTORY=str(tmp_path), ARCHIVE_FORMAT=form))).problems == []
    assert waiting(client) == []
    client.rows("create table orchestrator.restored_outcome (like orchestrator.outcome)")
    for parent in ("delivered_batch", "outcome"):
        if form == "csv":
            copy_rows(client, tmp_path / f"{parent}_p{OLD:%Y%m%d}.csv.gz", "restored_outcome")
        else:
            for row in pyarrow.parquet.read_table(tmp_path / f"{parent}_p{OLD:%Y%m%d}.parquet").to_pylist():
                client.rows(
                    "insert into orchestrator.restored_outcome select * from jsonb_populate_record("
                    "null::orchestrator.outcome, %s)",
                    Jsonb({name: value if value is None else str(value) for name, value in row.items()}),
                )
    assert client.rows(f"select {columns} from orchestrator.restored_outcome order by 1") == kept


async def test_without_a_directory_no_partition_is_archived_or_dropped(
    client: Client, old_day: list[str], settings: MakeSettings
) -> None:
    assert (await archive(settings())).files == []
    assert waiting(client) == old_day
    client.at(datetime.now(UTC) + timedelta(hours=2)).rows("select orchestrator.run_maintenance()")
    assert waiting(client) == old_day


@pytest.fixture
def operator_url(client: Client) -> Iterator[str]:
    """The database for a login that is a member of orchestrator_ops and nothing else."""
    name = f"operator_{uuid4().hex}"
    client.connection.execute(
        sql.SQL("create role {} login password 'p' in role orchestrator_ops").format(sql.Identifier(name))
    )
    info = client.connection.info
    yield f"postgresql://{name}:p@{info.host}:{info.port}/{info.dbname}"
    client.connection.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


async def test_the_role_of_operators_suffices(
    client: Client, old_day: list[str], operator_url: str, settings: MakeSettings, tmp_path: Path
) -> None:
    told = await archive(settings(DATABASE_URL=operator_url, ARCHIVE_DIRECTORY=str(tmp_path)))
    assert (len(told.files), told.problems) == (2, [])
    assert waiting(client) == []


async def test_an_archived_partition_is_dropped(client: Client, old_day: list[str], chosen: Settings) -> None:
    await archive(chosen)
    later = client.at(datetime.now(UTC) + timedelta(hours=2))
    later.rows("select orchestrator.run_maintenance()")
    assert later.column("select to_regclass('orchestrator.' || name) from unnest(%s::text[]) name", old_day) == [
        None,
        None,
    ]


KILLED = """
import asyncio, os, signal, sys
from orchestrator.maintenance import archive
from orchestrator.settings import Settings
from orchestrator.database.maintenance import Retired
owner, name, times = {
    "rows": (archive._CsvWriter, "write", 1), "fsync": (os, "fsync", 1), "rename": (os, "rename", 1),
    "directory": (os, "fsync", 2), "note": (Retired, "archived", 1), "second": (Retired, "archived", 2),
}[sys.argv[1]]
whole, calls = getattr(owner, name), 0
def killed(*arguments):
    global calls
    calls += 1
    if calls == times:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*arguments)
setattr(owner, name, killed)
asyncio.run(archive.archive(Settings.from_env(os.environ)))
"""


@pytest.fixture
def run(chosen: Settings, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python, or the product, beside this process, with the settings of this test."""

    def start(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
        env = {"PATH": os.environ["PATH"], "DATABASE_URL": chosen.database_url, "ARCHIVE_DIRECTORY": str(tmp_path)}
        return subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=env, text=True, capture_output=True, timeout=60, **more
        )

    return start


@pytest.mark.parametrize("step", ["rows", "fsync", "rename", "directory", "note", "second"])
async def test_an_archive_killed_at_any_step_is_whole_after_the_next_try(
    client: Client, old_day: list[str], chosen: Settings, tmp_path: Path, step: str, run: Callable[..., Any]
) -> None:
    assert run("-c", KILLED, step).returncode == -9
    for file in tmp_path.glob("*.csv.gz"):  # those that have their name are whole
        assert gzip.decompress(file.read_bytes()).count(b"\n") > len(TEXTS)
    assert (await archive(chosen)).problems == []
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{name}.csv.gz" for name in old_day]
    assert waiting(client) == []
    for name in old_day:
        parent = name.partition("_p")[0]
        assert rows(client, restore(client, tmp_path / f"{name}.csv.gz", parent)) == rows(client, name)


# With -B: it would leave bytecode behind that is cut off, too.
LIMITED = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
runpy.run_module("orchestrator", run_name="__main__")
"""


async def test_a_disk_that_is_full_leaves_no_file_and_the_partition(
    client: Client, old_day: list[str], chosen: Settings, tmp_path: Path, run: Callable[..., Any]
) -> None:
    payloads = sql.SQL(
        "update orchestrator.{} set payload = to_json((select string_agg(md5(random()::text), '')"
        " from generate_series(1, 500)))"
    )
    client.connection.execute(payloads.format(sql.Identifier(EVENTS)))
    told = run("-B", "-c", LIMITED, "maintain", "--once")
    assert told.returncode == 1, told.stderr
    assert f"✗ archive: {EVENTS}: {tmp_path}: File too large" in told.stdout
    assert EVENTS not in {file.name.partition(".")[0] for file in tmp_path.iterdir()}
    assert waiting(client) == [EVENTS]
    assert (await archive(chosen)).problems == []
    assert waiting(client) == []


async def test_a_missing_directory_is_reported_and_does_no_harm(
    client: Client, old_day: list[str], chosen: Settings, tmp_path: Path
) -> None:
    tmp_path.rmdir()
    told = await archive(chosen)
    assert [problem.problem.partition(":")[0] for problem in told.problems] == old_day
    assert "No such file or directory" in told.problems[0].problem
    assert waiting(client) == old_day
    tmp_path.mkdir()
    assert len((await archive(chosen)).files) == 2


async def test_an_archive_file_that_exists_already_is_kept(
    client: Client, old_day: list[str], chosen: Settings, tmp_path: Path
) -> None:
    (tmp_path / f"{EVENTS}.csv.gz").write_bytes(b"of another time")
    (tmp_path / f"{EVENTS}.2.csv.gz").write_bytes(b"of yet another")
    told = await archive(chosen)
    assert told.files[0] == str(tmp_path / f"{EVENTS}.3.csv.gz")
    assert (tmp_path / f"{EVENTS}.csv.gz").read_bytes() == b"of another time"
    assert rows(client, restore(client, tmp_path / f"{EVENTS}.3.csv.gz", "event")) == rows(client, EVENTS)


@pytest.fixture
def locked(database_url: str, old_day: list[str]) -> Iterator[Client]:
    """A session that holds the first table, so that archiving it comes to a halt."""
    with Client(database_url) as session:
        session.rows("begin")
        session.connection.execute(
            sql.SQL("lock table orchestrator.{} in access exclusive mode").format(sql.Identifier(old_day[0]))
        )
        yield session


async def halted(client: Client) -> None:
    await eventually(
        lambda: (
            client.value(
                """select count(*) from pg_stat_activity
            where application_name = 'orchestrator archive' and wait_event_type = 'Lock'
              and datname = current_database()"""
            )
            == 1
        )
    )


async def test_of_two_processes_at_once_one_archives(client: Client, chosen: Settings, locked: Client) -> None:
    first = asyncio.create_task(archive(chosen))
    await halted(client)
    async with asyncio.timeout(5):
        assert (await archive(chosen)).files == []
    locked.rows("rollback")
    assert len((await first).files) == 2


async def test_archiving_stopped_in_the_middle_ends_at_once_and_leaves_no_file(
    client: Client, chosen: Settings, locked: Client, tmp_path: Path, old_day: list[str]
) -> None:
    task = asyncio.create_task(archive(chosen))
    await halted(client)
    task.cancel()
    async with asyncio.timeout(3):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert list(tmp_path.iterdir()) == []
    locked.rows("rollback")
    assert waiting(client) == old_day
