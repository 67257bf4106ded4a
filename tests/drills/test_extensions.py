"""ops/pg_cron.sql and ops/pg_partman.sql with the extensions themselves.

They run where the server of TEST_DATABASE_URL offers pg_partman 5, and has pg_cron in shared_preload_libraries.
tests/sql/test_ops.py has what can be tested without them.
"""

from __future__ import annotations

import subprocess
from datetime import timedelta

import psycopg
import pytest

from orchestrator.dev.postgres_install import find_installation
from tests.support.databases import sibling
from tests.support.processes import ROOT
from tests.support.sql_client import Client
from tests.support.waiting import eventually


def run(url: str, script: str, **variables: str) -> None:
    """Runs a script of ops/ in psql; it must succeed."""
    given = [argument for name, value in variables.items() for argument in ("-v", f"{name}={value}")]
    psql = str(find_installation().bin_dir / "psql")
    command = [psql, "-X", "-q", "-d", url, *given, "-f", str(ROOT / "ops" / script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def offered(url: str, extension: str) -> str:
    """The version of the extension that the server offers; else the test is skipped."""
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "select default_version from pg_available_extensions where name = %s", (extension,)
        ).fetchone()
    if row is None:
        pytest.skip(f"the server offers no {extension}: set TEST_DATABASE_URL to one that does")
    return str(row[0])


def last_day(client: Client, parent: str) -> str:
    name: str = client.value(
        "select max(c.relname) from pg_inherits i join pg_class c on c.oid = i.inhrelid"
        " where i.inhparent = ('orchestrator.' || %s)::regclass",
        parent,
    )
    return name[-8:]


def test_pg_partman_makes_the_partitions_until_they_are_taken_back(database_url: str) -> None:
    assert int(offered(database_url, "pg_partman").split(".")[0]) >= 5
    with Client(database_url) as client:
        client.rows("create schema partman")
        client.rows("create extension pg_partman schema partman")
        run(database_url, "pg_partman.sql")
        for ahead in (40, 40, 50):
            client.rows("select orchestrator.configure_retention(p_partition_days_ahead => %s)", ahead)
            wanted = client.value("select to_char(orchestrator.now()::date + %s, 'YYYYMMDD')", ahead)
            for _ in range(2):
                client.rows("select orchestrator.run_pg_partman()")
            assert {last_day(client, "event"), last_day(client, "outcome")} == {last_day(client, "event")}
            assert wanted <= last_day(client, "event")
            ran_ahead = client.value("select to_date(%s, 'YYYYMMDD') - %s::date", last_day(client, "event"), wanted)
            assert ran_ahead <= 2
            assert client.value("select orchestrator.run_maintenance()")["problems"] == []
            assert last_day(client, "delivered_batch") == last_day(client, "event")
        due = client.value("select orchestrator.now() + interval '45 days'")
        client.schedule(scheduled_at=due)
        assert client.value("select count(*) from orchestrator.horizon") == 0
        run(database_url, "pg_partman.sql", back="1")
        assert client.value("select partitioned_by from orchestrator.control") == "maintenance"
        client.rows("select orchestrator.configure_retention(p_partition_days_ahead => 60)")
        while client.value("select orchestrator.run_maintenance()")["more"]:
            pass
        assert last_day(client, "event") == client.value("select to_char(orchestrator.now()::date + 60, 'YYYYMMDD')")


async def test_pg_cron_runs_maintenance_every_minute_until_it_is_undone(database_url: str) -> None:
    offered(database_url, "pg_cron")
    with Client(database_url) as client:
        home = client.value("select current_setting('cron.database_name', true)")
        if not home:
            pytest.skip("pg_cron is not in shared_preload_libraries of this server")
        name = client.connection.info.dbname
        cron_url = sibling(database_url, home)
        with Client(cron_url) as cron:
            cron.rows("create extension if not exists pg_cron")
            run(cron_url, "pg_cron.sql", database=name)
            try:
                runs = "select count(*) from orchestrator.maintenance_run"
                before = client.value(runs)
                await eventually(lambda: client.value(runs) > before, timedelta(minutes=3).total_seconds())
                ended = "select status from cron.job_run_details where database = %s and end_time is not null"
                await eventually(lambda: cron.column(ended, name), 30)
                assert set(cron.column(ended, name)) == {"succeeded"}
            finally:
                run(cron_url, "pg_cron.sql", back="1")
            assert cron.column("select jobname from cron.job where jobname ~ '^orchestrator'") == []
