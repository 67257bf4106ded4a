"""Migrating: from nothing, again, from many places at once, and never half."""

from __future__ import annotations

import itertools
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import psycopg
import pytest
from psycopg import sql

from orchestrator.database import migrate as module
from orchestrator.database.maintenance import Retention
from orchestrator.database.migrate import Report, check, migrate, sql_directory
from orchestrator.errors import DatabaseUnavailable, OrchestratorError
from tests.support.databases import sibling
from tests.support.sql_client import Client, event, results, wait_for


def names(pattern: str) -> list[str]:
    return sorted(path.relative_to(sql_directory()).as_posix() for path in sql_directory().glob(pattern))


VERSIONED = names("schema/*.sql")[1:]
REPEATABLE = [*names("functions/*.sql"), *names("views/*.sql"), "roles.sql"]
FILES = VERSIONED + REPEATABLE


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the SQL files, which tests may change; migrations read it."""
    copy = shutil.copytree(sql_directory(), tmp_path / "sql")
    monkeypatch.setattr(module, "sql_directory", lambda: copy)
    return copy


@pytest.fixture
def client(empty_database_url: str) -> Iterator[Client]:
    with Client(empty_database_url) as client:
        yield client


def catalogue(client: Client) -> list[object]:
    """Everything a migration makes, by name, definition and grants; not when."""
    return [
        client.rows(query)
        for query in (
            "select nspname, nspacl::text from pg_namespace where nspname !~ '^pg_' order by 1",
            """select relname, relkind, relacl::text, obj_description(oid) from pg_class
            where relnamespace = to_regnamespace('orchestrator') and not relispartition order by 1""",
            """select oid::regprocedure::text, pg_get_functiondef(oid), proacl::text, obj_description(oid) from pg_proc
            where pronamespace = to_regnamespace('orchestrator') order by 1""",
        )
    ]


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def test_a_new_database_gets_everything_in_order(empty_database_url: str, client: Client) -> None:
    assert check(empty_database_url) == FILES
    assert migrate(empty_database_url, days_ahead=3) == Report(FILES, 3 * (7 + 1 + 3))
    client.submit(event())
    assert client.finish(results(client.at(None).claim())) == []


def test_migrating_again_does_nothing(empty_database_url: str, client: Client) -> None:
    migrate(empty_database_url)
    before = catalogue(client)
    applied = client.rows("select * from orchestrator.migration order by 1")
    assert check(empty_database_url) == []
    assert migrate(empty_database_url) == Report([], 0)
    assert catalogue(client) == before
    assert client.rows("select * from orchestrator.migration order by 1") == applied


def test_checking_the_schema_changes_nothing(empty_database_url: str, client: Client) -> None:
    before = catalogue(client)
    check(empty_database_url)
    assert catalogue(client) == before


def test_each_applied_file_is_recorded_with_its_checksum(empty_database_url: str, client: Client) -> None:
    migrate(empty_database_url)
    recorded: dict[str, str] = dict(client.rows("select file, checksum from orchestrator.migration"))
    assert recorded == {
        name: client.value("select encode(sha256(%s), 'hex')", (sql_directory() / name).read_bytes()) for name in FILES
    }


def test_twenty_replicas_at_once_migrate_once(empty_database_url: str, client: Client) -> None:
    with ThreadPoolExecutor(20) as replicas:
        reports = list(replicas.map(lambda _: migrate(empty_database_url, days_ahead=2), range(20)))
    assert sorted(report.applied for report in reports) == [[]] * 19 + [FILES]
    assert sum(report.partitions_created for report in reports) == 30
    assert check(empty_database_url) == []
    assert client.value("select count(*) from orchestrator.migration") == len(FILES)


def test_several_databases_of_one_server_migrate_at_once(empty_database_url: str, client: Client) -> None:
    """The roles are the server's, and all of them make these."""
    own = client.connection.info.dbname
    databases = [f"{own}_{n}" for n in range(6)]
    for name in databases:
        client.connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    try:
        with ThreadPoolExecutor(len(databases)) as replicas:
            reports = list(
                replicas.map(lambda name: migrate(sibling(empty_database_url, name), days_ahead=1), databases)
            )
        assert [report.applied for report in reports] == [FILES] * len(databases)
    finally:
        for name in databases:
            client.connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.mark.parametrize("file", ["functions/60_queries.sql", "views/status.sql"])
def test_a_changed_function_or_view_is_applied_again_and_its_grants_too(
    empty_database_url: str, client: Client, directory: Path, file: str
) -> None:
    migrate(empty_database_url)
    append(
        directory / file,
        """
        create or replace function orchestrator.added() returns integer language sql return 7;
        create or replace view orchestrator.added_view as select 7 as seven;
        """,
    )
    expected = [name for name in REPEATABLE if name in (file, "functions/90_plans.sql", "roles.sql")]
    assert check(empty_database_url) == expected
    assert migrate(empty_database_url).applied == expected
    assert client.value("select orchestrator.added()") == 7
    granted = "select has_function_privilege('orchestrator_read', 'orchestrator.added()', 'execute')"
    assert client.value(granted) is False
    assert client.value("select has_table_privilege('orchestrator_read', 'orchestrator.added_view', 'select')") is True
    assert (
        client.value("select has_table_privilege('orchestrator_read', 'orchestrator.event_status', 'select')") is True
    )
    assert check(empty_database_url) == []


def test_objects_of_a_repeatable_file_are_replaced_when_the_file_changes(
    empty_database_url: str, client: Client, directory: Path
) -> None:
    """As a plan's setting whose value is another one, and a function that is no longer given the settings of texts."""
    migrate(empty_database_url)
    settings = "select proconfig from pg_proc where proname = %s and pronamespace = 'orchestrator'::regnamespace"
    plans, roles = directory / "functions/90_plans.sql", directory / "roles.sql"
    plans.write_text(plans.read_text().replace('"random_page_cost": "4"', '"random_page_cost": "3"'))
    assert migrate(empty_database_url).applied == REPEATABLE
    assert "random_page_cost=3" in client.value(settings, "claim_due_events")
    assert "IntervalStyle=postgres" in client.value(settings, "get_event")
    roles.write_text(roles.read_text().replace("'keep_answer'", "'keep_answer', 'get_event'"))
    assert migrate(empty_database_url).applied == REPEATABLE
    assert "IntervalStyle=postgres" not in client.value(settings, "get_event")
    assert check(empty_database_url) == []


def test_every_repeatable_file_can_be_applied_to_a_database_in_use(
    empty_database_url: str, client: Client, directory: Path
) -> None:
    migrate(empty_database_url)
    client.at(None).submit(event(external_job_id="j"))
    leases = client.claim()
    before = catalogue(client)
    for name in REPEATABLE:
        append(directory / name, "\n-- changed\n")
    assert migrate(empty_database_url).applied == REPEATABLE
    assert catalogue(client) == before
    assert client.finish(results(leases)) == []


def test_a_new_versioned_file_is_applied_after_those_before_it(
    empty_database_url: str, client: Client, directory: Path
) -> None:
    migrate(empty_database_url)
    (directory / "schema" / "9999_more.sql").write_text("alter table orchestrator.lane add column note text;")
    assert check(empty_database_url) == ["schema/9999_more.sql"]
    assert migrate(empty_database_url).applied == ["schema/9999_more.sql"]
    assert client.column("select note from orchestrator.lane limit 1") == [None]


@pytest.fixture
def altering(empty_database_url: str, directory: Path) -> str:
    """A migrated database for which there is one more file, which alters the tables that everybody uses."""
    migrate(empty_database_url)
    changes = "".join(f"alter table orchestrator.{table} add column note text;\n" for table in ("event", "timer"))
    (directory / "schema" / "9999_more.sql").write_text(changes)
    return empty_database_url


def test_migrating_lets_others_work_while_a_table_is_locked_and_goes_on_when_it_is_released(
    altering: str, client: Client
) -> None:
    with Client(altering) as holder, Client(altering) as other, ThreadPoolExecutor(1) as thread:
        holder.rows("begin")
        holder.rows("select count(*) from orchestrator.timer")
        migrating = thread.submit(migrate, altering)
        wait_for(lambda: client.value("select count(*) from pg_locks where not granted") == 1)
        began = time.monotonic()
        other.submit(event())  # behind the migration, which gives up
        assert time.monotonic() - began < 4
        assert not migrating.done()
        holder.rows("commit")
        assert migrating.result(20).applied == ["schema/9999_more.sql"]


def test_migrating_names_the_holder_of_a_lock_and_changes_nothing(
    altering: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0)
    before = catalogue(client)
    with psycopg.connect(altering, application_name="a report") as holder:
        holder.execute("select count(*) from orchestrator.event")
        pid = holder.info.backend_pid
        with pytest.raises(OrchestratorError) as raised:
            migrate(altering)
    assert re.fullmatch(
        rf"nothing was changed: session {pid} \(\w+, a report\) has a transaction open for \d+ s, now idle in"
        rf" transaction; end it: select pg_terminate_backend\({pid}\)",
        str(raised.value),
    )
    assert catalogue(client) == before


def test_migrating_under_load_fails_no_session_by_a_deadlock(altering: str, client: Client) -> None:
    """Sessions that have rows of timer and then want event, as those that finish attempts have."""
    stop = Event()

    def work() -> int:
        with Client(altering) as session:
            for n in itertools.count(1):
                with session.transaction():
                    session.rows("select from orchestrator.timer for update")
                    session.rows("select from orchestrator.outcome, pg_sleep(0.005) limit 1")
                    session.rows("select from orchestrator.event limit 1")
                if stop.is_set():
                    return n
        raise AssertionError

    with ThreadPoolExecutor(8) as sessions:
        working = [sessions.submit(work) for _ in range(8)]
        try:
            assert migrate(altering).applied == ["schema/9999_more.sql"]
        finally:
            stop.set()
        assert all(each.result(10) > 0 for each in working)
    assert client.value("select deadlocks from pg_stat_database where datname = current_database()") == 0


def test_a_new_schema_learns_the_retention_at_once(empty_database_url: str, client: Client) -> None:
    told = "select retention_days, partition_days_ahead, max_schedule_ahead_days, archive from orchestrator.control"
    migrate(empty_database_url, retention=Retention(90, None, 500, True))
    assert client.rows(told) == [(90, 30, 500, True)]
    migrate(empty_database_url, retention=Retention(1, None, None, None))
    assert client.rows(told) == [(90, 30, 500, True)]


def test_a_versioned_file_that_changed_after_it_was_applied_is_refused(
    empty_database_url: str, client: Client, directory: Path
) -> None:
    migrate(empty_database_url)
    before = catalogue(client)
    append(directory / "schema" / "0001_core.sql", "create table orchestrator.more ();")
    for attempt in (migrate, check):
        with pytest.raises(OrchestratorError, match=r"sql/schema/0001_core\.sql differs from what this database was"):
            attempt(empty_database_url)
    assert catalogue(client) == before


def test_a_database_of_a_newer_program_is_refused(empty_database_url: str, client: Client, directory: Path) -> None:
    newest = directory / "schema" / "9999_more.sql"
    newest.write_text("alter table orchestrator.lane add column note text;")
    migrate(empty_database_url)
    newest.unlink()
    before = catalogue(client)
    for attempt in (migrate, check):
        with pytest.raises(OrchestratorError, match=r"newer than this program: it has schema/9999_more\.sql"):
            attempt(empty_database_url)
    assert catalogue(client) == before


@pytest.mark.parametrize("file", ["schema/0001_core.sql", "functions/40_finish.sql", "roles.sql"])
def test_a_failure_half_way_leaves_no_change_and_names_the_file(
    empty_database_url: str, client: Client, directory: Path, file: str
) -> None:
    before = catalogue(client)
    whole = (directory / file).read_text()
    append(directory / file, "\nselect 1 / 0;\n")
    with pytest.raises(OrchestratorError, match=f"^sql/{file}: division by zero"):
        migrate(empty_database_url)
    assert catalogue(client) == before
    (directory / file).write_text(whole)
    assert migrate(empty_database_url).applied == FILES


def test_a_failed_upgrade_leaves_the_version_before_at_work(
    empty_database_url: str, client: Client, directory: Path
) -> None:
    migrate(empty_database_url)
    before = catalogue(client)
    append(directory / "functions" / "30_claim.sql", "\ndrop function orchestrator.next_due_at();\n")
    append(directory / "views" / "status.sql", "\nselect * from orchestrator.no_such_table;\n")
    with pytest.raises(OrchestratorError, match=r"^sql/views/status\.sql: .*no_such_table"):
        migrate(empty_database_url)
    assert catalogue(client) == before


def test_an_old_server_is_refused_before_any_change(
    empty_database_url: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MINIMUM_VERSION", 990_000)
    with pytest.raises(OrchestratorError, match=r"PostgreSQL \d\d: expected \d\d or newer; upgrade it"):
        migrate(empty_database_url)
    assert client.value("select to_regnamespace('orchestrator')") is None


def test_a_server_that_is_not_there_is_an_error_of_its_own(empty_database_url: str) -> None:
    nowhere = psycopg.conninfo.make_conninfo(empty_database_url, port=1)
    for attempt in (migrate, check):
        with pytest.raises(DatabaseUnavailable, match="the database cannot be reached"):
            attempt(nowhere)


def test_settings_of_the_database_do_not_change_migrations(empty_database_url: str, client: Client) -> None:
    for setting in (
        "timezone = 'Asia/Kolkata'",
        "search_path = pg_catalog",
        "datestyle = 'German'",
        "quote_all_identifiers = on",
    ):
        client.connection.execute(
            sql.SQL("alter database {} set {}").format(sql.Identifier(client.connection.info.dbname), sql.SQL(setting))
        )
    migrate(empty_database_url)
    assert check(empty_database_url) == []
    with Client(empty_database_url) as later:
        later.submit(event())
        assert later.value("select count(*) from orchestrator.timer") == 1
