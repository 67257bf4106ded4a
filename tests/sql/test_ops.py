"""The scripts of ops/, run by psql.

What they call of pg_cron and pg_partman stands here with its documented signature, and does as little as they count
on. tests/drills/test_extensions.py runs them with the extensions themselves, where the server has them.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from orchestrator.dev.postgres_install import find_installation
from tests.sql.conftest import Connect
from tests.support.sql_client import NOON, Client

OPS = Path(__file__).resolve().parents[2] / "ops"
TODAY = NOON.date()

CRON = """
create schema cron;
create table cron.job
( jobid bigint generated always as identity, jobname text unique, schedule text, command text, database text);
create table cron.job_run_details (jobid bigint, end_time timestamptz);
create function cron.schedule_in_database(
  job_name text, schedule text, command text, database text, username text default null, active boolean default true)
returns bigint language sql as $$
  insert into cron.job (jobname, schedule, command, database) values (job_name, schedule, command, database)
  on conflict (jobname) do update set schedule = excluded.schedule, command = excluded.command
  returning jobid
$$;
create function cron.schedule(job_name text, schedule text, command text) returns bigint
begin atomic
  select cron.schedule_in_database(job_name, schedule, command, current_database());
end;
create function cron.unschedule(job_name text) returns boolean
language sql as $$ delete from cron.job j where j.jobname = job_name returning true $$;
"""
PARTMAN = """
create schema partman;
create table partman.part_config
( parent_table text primary key
, control text
, partition_interval text
, premake integer
, automatic_maintenance text
, default_table boolean
, retention text
, retention_keep_table boolean default true
, infinite_time_partitions boolean default false
);
create function partman.create_parent(
  p_parent_table text, p_control text, p_interval text, p_type text default 'range', p_epoch text default 'none'
, p_premake integer default 4, p_start_partition text default null, p_default_table boolean default true
, p_automatic_maintenance text default 'on', p_constraint_cols text[] default null, p_template_table text default null
, p_jobmon boolean default true, p_date_trunc_interval text default null)
returns boolean language plpgsql as $$
begin
  insert into partman.part_config
  values (p_parent_table, p_control, p_interval, p_premake, p_automatic_maintenance, p_default_table);
  execute format('create table partman.template_orchestrator_%s (like %s)', split_part(p_parent_table, '.', 2)
    , p_parent_table);
  perform partman.make(p_parent_table, p_start_partition::timestamptz);
  return true;
end $$;
create function partman.make(p_parent text, p_starts timestamptz) returns void language plpgsql as $$
begin
  execute format('create table %s_p%s (like %1$s including defaults including constraints including storage)', p_parent
    , to_char(p_starts, 'YYYYMMDD'));
  execute format('alter table %1$s attach partition %1$s_p%2$s for values from (%3$L) to (%4$L)', p_parent
    , to_char(p_starts, 'YYYYMMDD'), p_starts, p_starts + interval '1 day');
end $$;
-- One day more than there is.
create function partman.run_maintenance(
  p_parent_table text default null, p_analyze boolean default false, p_jobmon boolean default true)
returns void language plpgsql as $$
begin
  perform partman.make(p_parent_table, max(to_date(right(inhrelid::regclass::text, 8), 'YYYYMMDD') + 1)::timestamptz)
  from pg_inherits where inhparent = p_parent_table::regclass;
end $$;
"""


@pytest.fixture
def psql(database_url: str) -> Callable[..., str]:
    """Runs a script, which must succeed: ``psql("pg_cron.sql", back="1")``."""

    def run(script: str, **variables: str) -> str:
        given = [argument for name, value in variables.items() for argument in ("-v", f"{name}={value}")]
        done = subprocess.run(
            [find_installation().bin_dir / "psql", "-X", "-q", "-d", database_url, *given, "-f", OPS / script],
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_pg_cron_calls_maintenance_every_minute_until_it_is_undone(client: Client, psql: Callable[..., str]) -> None:
    client.rows(CRON)
    for _ in range(2):
        psql("pg_cron.sql")
    jobs = client.rows("select schedule, command, database from cron.job order by jobid")
    assert jobs[0] == ("* * * * *", "select orchestrator.run_maintenance()", client.connection.info.dbname)
    assert len(jobs) == 2
    runs = client.value("select count(*) from orchestrator.maintenance_run")
    client.rows(
        """insert into cron.job_run_details
        select id, now() - interval '4 days' from (select jobid from cron.job union all values (99)) j (id)"""
    )
    for _, command, _ in jobs:
        client.connection.execute(command.encode())
    assert client.value("select count(*) from orchestrator.maintenance_run") == runs + 1
    assert client.column("select jobid from cron.job_run_details") == [99]
    psql("pg_cron.sql", back="1")
    assert client.rows("select * from cron.job") == []
    psql("pg_cron.sql", database="another")
    assert client.column("select database from cron.job order by jobid limit 1") == ["another"]


def days(client: Client, parent: str) -> tuple[str, str, int]:
    """The bounds of the last partition, as PostgreSQL shows them, and how many there are."""
    rows = client.rows(
        """select pg_get_expr(c.relpartbound, c.oid), count(*) over ()
        from pg_inherits i join pg_class c on c.oid = i.inhrelid
        where i.inhparent = ('orchestrator.' || %s)::regclass order by c.relname desc limit 1""",
        parent,
    )
    bounds, count = rows[0]
    return bounds.split("'")[1], bounds.split("'")[3], count


@pytest.mark.parametrize("timezone", ["UTC", "Pacific/Kiritimati"])
def test_pg_partman_makes_partitions_until_they_are_taken_back(
    connect: Connect, client: Client, psql: Callable[..., str], timezone: str
) -> None:
    client.rows(PARTMAN)
    client.rows("select set_config('timezone', %s, false)", timezone)
    client.rows(
        "do $$ begin execute format('alter database %I set timezone = ''Asia/Tokyo''', current_database()); end $$"
    )
    psql("pg_partman.sql")
    assert client.rows(
        """select parent_table, control, partition_interval, premake, automatic_maintenance, retention
          , infinite_time_partitions, default_table
        from partman.part_config order by 1"""
    ) == [
        (f"orchestrator.{parent}", "scheduled_at", "1 day", 30, "off", None, True, False)
        for parent in ("event", "outcome")
    ]
    assert client.value("select partitioned_by from orchestrator.control") == "pg_partman"

    def ends(day: int, retired: int = 0) -> None:
        utc = connect()
        for parent in ("event", "outcome"):
            first, last, count = days(utc, parent)
            assert first == f"{TODAY + timedelta(days=day)} 00:00:00+00"
            assert (last, count) == (f"{TODAY + timedelta(days=day + 1)} 00:00:00+00", 7 + 1 + day - retired)

    ends(31)  # one, where those of maintenance ended
    client.at(NOON + timedelta(days=3))
    # What pg_partman does not make follows, and then the oldest day goes.
    assert client.value("select orchestrator.run_maintenance()")["partitions_created"] == 1
    assert client.value("select orchestrator.run_maintenance()")["partitions_detached"] == 3
    ends(31, retired=1)
    for _ in range(5):
        client.rows("select orchestrator.run_pg_partman()")
    ends(33, retired=1)
    client.schedule(scheduled_at=NOON + timedelta(days=33))
    psql("pg_partman.sql", back="1")
    assert client.column("select tablename::text from pg_tables where schemaname = 'partman'") == ["part_config"]
    assert client.rows("select * from partman.part_config") == []
    assert client.at(NOON + timedelta(days=4)).value("select orchestrator.run_maintenance()")["problems"] == []
    ends(34, retired=1)
