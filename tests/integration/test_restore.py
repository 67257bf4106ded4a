"""A database that was dumped and restored goes on: its rights, its lanes and floors, the order of its outbox."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable, Iterator
from typing import LiteralString
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from psycopg import sql

from orchestrator.database import Database
from orchestrator.database.migrate import check, migrate
from orchestrator.database.outbox import Outbox
from orchestrator.dev.postgres_install import find_installation
from orchestrator.errors import OrchestratorError
from orchestrator.events.parsing import parse_submission
from tests.conftest import MakeSettings
from tests.integration.cli_support import invoke
from tests.support.databases import temporary_server
from tests.support.dispatching import dispatching, finished, statuses
from tests.support.ingesting import submission
from tests.support.receiver import Receiver
from tests.support.sql_client import Client
from tests.support.waiting import eventually

Restore = Callable[..., None]


@pytest.fixture(scope="module")
def restore() -> Restore:
    """Brings a database over to an empty one with pg_dump and pg_restore, which is given options."""
    programs = find_installation().bin_dir

    def run(url: str, into: str, *options: str) -> None:
        dump = subprocess.run([programs / "pg_dump", "-Fc", "-d", url], stdout=subprocess.PIPE, check=True)
        subprocess.run([programs / "pg_restore", *options, "-d", into], input=dump.stdout, check=True)

    return run


@pytest.fixture
def younger_url() -> Iterator[str]:
    """An empty database of a cluster that has had few transactions yet."""
    with temporary_server() as server:
        yield server.ensure_database("restored")


@pytest.fixture
def clerk(database_url: str) -> Iterator[str]:
    """A login that may submit."""
    name = f"clerk_{psycopg.conninfo.conninfo_to_dict(database_url)['dbname']}"
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            sql.SQL("create role {} login password 'secret' in role orchestrator_submit, orchestrator_read").format(
                sql.Identifier(name)
            )
        )
        yield name
        connection.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


def _as(user: str, url: str) -> str:
    """The URL of the same database for another login, whose password is ``secret``."""
    server = urlsplit(url)
    return urlunsplit(server._replace(netloc=f"{user}:secret@{server.hostname}:{server.port}"))


def test_migrate_restores_rights_that_a_dump_left_behind(
    database_url: str, empty_database_url: str, restore: Restore, clerk: str
) -> None:
    restore(database_url, empty_database_url, "--no-acl", "--no-owner")
    env = {"DATABASE_URL": empty_database_url, "COLUMNS": "300"}
    assert check(empty_database_url) == ["roles.sql"]
    assert invoke("migrate", "--check", env=env).exit_code == 1
    told = invoke("doctor", env=env).stdout
    assert "rights differ from those that migrate gave, as after pg_restore --no-acl" in told
    assert "public EXECUTE" in told
    with pytest.raises(psycopg.errors.InsufficientPrivilege), Client(_as(clerk, empty_database_url)) as client:
        client.schedule()
    assert migrate(empty_database_url).applied == ["roles.sql"]
    assert check(empty_database_url) == []
    with Client(_as(clerk, empty_database_url)) as client:
        client.schedule()
    query: sql.SQL = sql.SQL("select * from orchestrator.rights() order by 1")
    with Client(database_url) as before, Client(empty_database_url) as after:
        assert after.connection.execute(query).fetchall() == before.connection.execute(query).fetchall()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("grant execute on function orchestrator.pause_all() to public", "function pause_all(): with public EXECUTE"),
        ("grant usage on schema orchestrator to public", "schema orchestrator: with public USAGE"),
        ("grant delete on orchestrator.event to orchestrator_read", "table event: with orchestrator_read DELETE"),
        ("grant select (key_hash) on orchestrator.api_key to public", "column api_key.key_hash: with public SELECT"),
        (
            "revoke execute on function orchestrator.submit_staged() from orchestrator_submit",
            "function submit_staged(): without orchestrator_submit EXECUTE",
        ),
        (
            "revoke select on orchestrator.outcomes from orchestrator_ops",
            "view outcomes: without orchestrator_ops SELECT",
        ),
    ],
)
def test_each_changed_right_is_named_and_restored(database_url: str, client: Client, change: str, named: str) -> None:
    before = client.rows("select * from orchestrator.rights() order by 1")
    client.connection.execute(change.encode())
    assert check(database_url) == ["roles.sql"]
    assert named in invoke("doctor", env={"DATABASE_URL": database_url, "COLUMNS": "300"}).stdout
    assert migrate(database_url).applied == ["roles.sql"]
    assert check(database_url) == []
    assert client.rows("select * from orchestrator.rights() order by 1") == before


def test_rights_of_other_users_are_left_alone(database_url: str, client: Client, clerk: str) -> None:
    client.connection.execute(sql.SQL("grant select on orchestrator.event to {}").format(sql.Identifier(clerk)))
    assert check(database_url) == []
    client.connection.execute(sql.SQL("revoke select on orchestrator.event from {}").format(sql.Identifier(clerk)))


def test_objects_that_another_user_owns_are_named_and_given_back(database_url: str, client: Client, clerk: str) -> None:
    other = sql.Identifier(clerk)
    client.connection.execute(sql.SQL("alter function orchestrator.pause_all() owner to {}").format(other))
    client.connection.execute(sql.SQL("alter table orchestrator.worker owner to {}").format(other))
    assert check(database_url) == ["roles.sql"]
    told = invoke("doctor", env={"DATABASE_URL": database_url, "COLUMNS": "300"}).stdout
    assert f"function pause_all(): with owner {clerk}" in told
    assert f"table worker: with owner {clerk}" in told
    assert migrate(database_url).applied == ["roles.sql"]
    assert check(database_url) == []


def test_a_row_type_that_another_user_owns_is_given_back(database_url: str, client: Client, clerk: str) -> None:
    client.connection.execute(sql.SQL("alter type orchestrator.lock_holder owner to {}").format(sql.Identifier(clerk)))
    assert check(database_url) == ["roles.sql"]
    assert migrate(database_url).applied == ["roles.sql"]
    assert check(database_url) == []


_SPEND: LiteralString = """
do $$ begin
  create temp table spent (n integer);
  for n in 1..6000 loop
    begin insert into spent values (n); exception when division_by_zero then null; end;
  end loop;
end $$
"""


async def test_a_database_restored_into_a_younger_cluster_forgets_the_old_transactions(
    settings: MakeSettings, database_url: str, client: Client, restore: Restore, younger_url: str, receiver: Receiver
) -> None:
    names = [f"old {n}" for n in range(5)]
    client.rows("select orchestrator.set_outbox('{scheduled}')")
    client.rows(_SPEND)
    old = [
        str(client.value("select orchestrator.schedule_event(%s, '{}', p_external_job_id => %s)", receiver.url(), name))
        for name in names
    ]
    client.rows("select orchestrator.configure_destination('hooks.example.com', p_max_parallel => 5)")
    rerouted: int = client.value("select rerouted_by::text::bigint from orchestrator.control")

    restore(database_url, younger_url, "--no-acl", "--no-owner")
    chosen = settings(DATABASE_URL=younger_url)
    with Client(younger_url) as restored:
        assert restored.value("select pg_snapshot_xmax(pg_current_snapshot())::text::bigint") < rerouted
        restored.value("select orchestrator.schedule_event(%s, '{}', p_external_job_id => 'new')", receiver.url())
        async with Outbox.open(chosen) as outbox, outbox.batch(100, 0) as messages:
            told = [json.loads(bytes(message.value or b""))["external_job_id"] for message in messages]
            assert told == [*names, "new"]
            await outbox.published(messages)
        assert migrate(younger_url).applied == ["roles.sql"]
        for _ in range(2):
            assert restored.value("select orchestrator.run_maintenance()")["problems"] == []
        assert restored.value("select rerouted_by is null from orchestrator.control")

        def raises_floors() -> bool:
            restored.value("select orchestrator.raise_floors()")
            return bool(restored.value("select marked_at is not null from orchestrator.control"))

        await eventually(raises_floors)
        async with dispatching(chosen):
            await finished(restored, old)
        assert statuses(restored, old) == {"delivered": 5}


def test_an_owner_who_may_not_create_roles_is_told_which_are_missing(younger_url: str) -> None:
    with psycopg.connect(younger_url, autocommit=True) as admin:
        admin.execute("create role owner login password 'secret'")
        admin.execute("alter database restored owner to owner")
        owned = _as("owner", younger_url)
        with pytest.raises(OrchestratorError, match="As a superuser: create role orchestrator_submit; "):
            migrate(owned)
        for role in ("submit", "dispatch", "ingest", "ops", "read"):
            admin.execute(f"create role orchestrator_{role}".encode())
        assert migrate(owned).applied


@pytest.mark.parametrize("grantee", ["public", "orchestrator_submit"])
def test_rights_to_a_partition_are_noticed_and_taken_back(database_url: str, grantee: str) -> None:
    with Client(database_url) as client:
        client.connection.execute(
            f"alter default privileges in schema orchestrator grant select on tables to {grantee}".encode()
        )
        client.value("select orchestrator.create_partitions(current_date + 50, current_date + 51)")
        assert check(database_url) == []
        name = client.value("select max(relname) from pg_class where relname ~ '^event_p[0-9]{8}$'")
        client.connection.execute(f"grant select on orchestrator.{name} to {grantee}".encode())
        assert client.column("select object from orchestrator.changed_rights()") == [f"partition {name}"]
        assert check(database_url) == ["roles.sql"]
        assert migrate(database_url).applied == ["roles.sql"]
        assert client.value("select has_table_privilege(%s, %s, 'select')", grantee, f"orchestrator.{name}") is False
        assert check(database_url) == []


async def test_a_schema_whose_owner_may_not_make_temporary_tables_is_refused_by_name(
    settings: MakeSettings, databases_of_others: tuple[str, str], empty_database_url: str
) -> None:
    owned, name = databases_of_others
    remedy = f"grant temporary on database {name} to"
    with psycopg.connect(empty_database_url, autocommit=True) as admin:
        revoke = sql.SQL("revoke temporary on database {} from public").format(sql.Identifier(name))
        grant = sql.SQL("grant temporary on database {} to public").format(sql.Identifier(name))
        admin.execute(revoke)
        with pytest.raises(OrchestratorError, match=remedy):
            migrate(owned)
        with Client(empty_database_url) as client:
            assert client.value("select to_regnamespace('orchestrator') is null")
        admin.execute(grant)
        migrate(owned)
        admin.execute(revoke)
        with pytest.raises(OrchestratorError, match=remedy):
            check(owned)
        async with Database(settings(DATABASE_URL=owned), role="api") as database:
            with pytest.raises(OrchestratorError, match=remedy):
                await database.ready()
            submitted = [parse_submission(submission(1), settings(DATABASE_URL=owned))]
            await database.submit(submitted)  # new ones are not staged
            with pytest.raises(OrchestratorError, match="grant temporary on the database"):
                await database.submit(submitted)
        told = await asyncio.to_thread(invoke, "doctor", env={"DATABASE_URL": owned, "COLUMNS": "300"})
        assert remedy in told.stdout
        admin.execute(grant)
        assert check(owned) == []
        async with Database(settings(DATABASE_URL=owned), role="api") as database:
            await database.ready()


@pytest.fixture
def databases_of_others(empty_database_url: str) -> Iterator[tuple[str, str]]:
    """The URL of a user who may make schemas in a database that is not its own, and the database's name."""
    with psycopg.connect(empty_database_url, autocommit=True) as admin:
        name = admin.info.dbname
        user = sql.Identifier(f"owner_{name}")
        admin.execute(sql.SQL("create role {} login createrole password 'secret'").format(user))
        admin.execute(sql.SQL("grant create, connect on database {} to {}").format(sql.Identifier(name), user))
        yield _as(f"owner_{name}", empty_database_url), name
        admin.execute(sql.SQL("drop owned by {}").format(user))
        admin.execute(sql.SQL("drop role {}").format(user))
