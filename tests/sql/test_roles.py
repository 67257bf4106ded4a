"""Roles: each may call what its part of the runtime calls, and touch nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import sql

from orchestrator.database.maintenance import CONDITION
from tests.sql.conftest import Connect
from tests.support.sql_client import NOON, Client, event, results

ROLES = ["orchestrator_submit", "orchestrator_dispatch", "orchestrator_ingest", "orchestrator_ops", "orchestrator_read"]
SHARED = {
    "now", "event_id", "random_event_id", "bucket", "bucket_of_key", "destination_name", "spread_shift",
    "partition_bounds", "standstills", "lock_holders", "holder_text", "holder_remedy", "holders_text", "prove_writing",
    "staging_problem", "oldest_due_at", "due_soon", "xmin_horizon", "vital_signs", "held_destinations",
}  # fmt: skip
SUBMITTING = {
    "open_direct", "submit_direct", "submit_batch",
    "open_staging", "submit_staged", "submit_staged_with_status", "submit_events", "schedule_event",
    "try_submit_staged", "try_submit_staged_with_status",
}  # fmt: skip
KEYS = {"find_api_key", "count_api_keys"}
CHANGING = {"cancel_event", "cancel_events", "reschedule_event", "keep_answer", "kept_answer"}
DISPATCHING = {
    "register_worker", "claim_due_events", "claim_for_dispatch", "finish_events", "release_events", "next_due_at",
    "next_lease_end", "backlog", "finish_free_events", "finish_delivered", "release_free_events",
    "ensure_dedicated_lane", "own_lane", "raise_floors", "set_outbox", "outbox_batch", "outbox_published",
    "outbox_failed", "outbox_pending", "outbox_backlog",
    "repair_after_restore", "settle_restored",
    "configure_topics",
}  # fmt: skip
INGESTING = {
    "ingest_offsets", "advance_offsets", "keep_rejects", "execute_commands", "set_aside_staged", "submit_set_aside",
    "keep_aside",
}  # fmt: skip
READING = {
    "get_event", "events_by_external_id", "list_dead_letters", "statistics", "statistics_by", "next_due_at", "backlog",
    "list_rejects", "ingest_offsets", "outbox_pending", "get_destination", "list_destinations", "destination_for",
    "backlog_forecast", "forecast", "changed_rights",
    "first_day_kept", "first_id", "batch_holds", "batch_outcomes",
}  # fmt: skip
OPERATING = {
    "run_maintenance", "reroute_remaining", "create_partitions", "pass_dead_letter", "configure_destination",
    "delete_destination", "pause_destination", "resume_destination", "pause_all", "resume_all", "close_breaker",
    "destination_json", "create_api_key", "revoke_api_key",
    "set_ingest_offset", "get_reject", "resubmitted_reject", "redrive_event", "retry_outbox_failures",
    "redrive_dead_letters", "purge_dead_letters", "configure_retention", "partitions_to_archive", "archived_partition",
    "hand_partitions_to",
}  # fmt: skip
ALLOWED = {
    "orchestrator_submit": SHARED | SUBMITTING | KEYS | CHANGING,
    "orchestrator_ingest": SHARED | SUBMITTING | INGESTING,
    "orchestrator_dispatch": SHARED | DISPATCHING,
    "orchestrator_read": SHARED | READING,
    "orchestrator_ops": SHARED | SUBMITTING | INGESTING | KEYS | CHANGING | DISPATCHING | READING | OPERATING,
}


@pytest.mark.parametrize("role", ROLES)
def test_a_role_may_call_its_functions_and_no_others(client: Client, role: str) -> None:
    allowed = client.column(
        """select distinct proname from pg_proc where pronamespace = 'orchestrator'::regnamespace
        and has_function_privilege(%s, oid, 'execute')""",
        role,
    )
    assert set(allowed) == ALLOWED[role]


@pytest.mark.parametrize("role", ROLES)
def test_a_role_may_touch_no_table_but_those_it_needs(client: Client, role: str) -> None:
    tables = client.column(
        """select relname from pg_class
        where relnamespace = 'orchestrator'::regnamespace and relkind in ('r', 'p', 'v') and not relispartition"""
    )
    privileges = ["select", "insert", "update", "delete", "truncate", "references", "trigger", "maintain"]
    held = {
        (table, privilege)
        for table, privilege in client.rows(
            """select t, p from unnest(%s::text[]) t, unnest(%s::text[]) p
            where has_table_privilege(%s, 'orchestrator.' || t, p)""",
            tables,
            privileges,
            role,
        )
    }
    readable = {(table, "select") for table in tables if table != "api_key"}
    policies = {("retry_policy", privilege) for privilege in ("insert", "update", "delete")}
    expected = {"orchestrator_read": readable, "orchestrator_ops": readable | policies}
    assert held == expected.get(role, set())


@pytest.mark.parametrize("role", ROLES)
def test_no_role_reads_the_hashes_of_keys(connect: Connect, role: str) -> None:
    client = connect()
    client.set_role(role)
    for query in (
        "select key_hash from orchestrator.api_key",
        "select * from orchestrator.api_key",
        "table orchestrator.api_key",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            client.connection.execute(query)


def test_operators_make_list_and_revoke_keys(connect: Connect) -> None:
    client = connect()
    client.set_role("orchestrator_ops")
    create = "select orchestrator.create_api_key(%s, %s, %s)"
    client.rows(create, "ocean", b"\x01" * 32, ["read", "submit"])
    assert client.rows("select name, scopes from orchestrator.api_key") == [("ocean", ["read", "submit"])]
    find = "select name, scopes from orchestrator.find_api_key(%s)"
    assert client.rows(find, b"\x01" * 32) == [("ocean", ["read", "submit"])]
    assert client.rows(find, b"\x02" * 32) == []
    for name, key, scopes in [
        ("ocean", b"\x02" * 32, ["read"]),
        ("air", b"\x01" * 32, ["read"]),
        ("air", b"short", ["read"]),
        ("air", b"\x02" * 32, []),
        ("air", b"\x02" * 32, ["root"]),
        ("a b", b"\x02" * 32, ["read"]),
    ]:
        with pytest.raises(psycopg.IntegrityError):
            client.rows(create, name, key, scopes)
    assert client.value("select orchestrator.count_api_keys()") == 1
    assert client.value("select orchestrator.revoke_api_key('ocean')") is True
    assert client.value("select orchestrator.revoke_api_key('ocean')") is False
    assert client.rows(find, b"\x01" * 32) == []


def test_the_role_public_may_do_nothing(connect: Connect) -> None:
    client = connect()
    assert (
        client.column(
            """select p.oid::regprocedure::text
            from pg_proc p cross join lateral aclexplode(coalesce(proacl, acldefault('f', proowner))) a
        where pronamespace = 'orchestrator'::regnamespace and a.grantee = 0"""
        )
        == []
    )
    assert (
        client.column(
            """select relname
            from pg_class c cross join lateral aclexplode(coalesce(relacl, acldefault('r', relowner))) a
        where relnamespace = 'orchestrator'::regnamespace and a.grantee = 0"""
        )
        == []
    )
    assert client.value("select has_schema_privilege('public', 'orchestrator', 'usage')") is False


@pytest.mark.parametrize("role", ROLES)
def test_no_role_may_create_anything_in_the_schema(client: Client, role: str) -> None:
    assert client.value("select has_schema_privilege(%s, 'orchestrator', 'create')", role) is False
    assert (
        client.value(
            """select rolsuper or rolcreaterole or rolcreatedb or rolcanlogin or rolbypassrls
            from pg_roles where rolname = %s""",
            role,
        )
        is False
    )


def test_every_security_definer_function_pins_its_search_path(client: Client) -> None:
    rows = client.rows(
        """select p.oid::regprocedure::text,
          array(select setting from unnest(proconfig) setting where starts_with(setting, 'search_path='))
        from pg_proc p where pronamespace = 'orchestrator'::regnamespace and prosecdef"""
    )
    assert len(rows) > 15
    assert {name: path for name, path in rows if path != ["search_path=orchestrator, pg_temp"]} == {}


def test_a_caller_s_objects_cannot_take_the_place_of_the_schema_s(connect: Connect) -> None:
    owner, client = connect(), connect()
    uid = owner.schedule(external_job_id="j")
    client.rows("create temp table timer (event_id uuid, lane integer, due_at timestamptz)")
    client.rows("create temp table event (id uuid)")
    client.rows(
        "create function pg_temp.now() returns timestamptz language sql as $$ select 'infinity'::timestamptz $$"
    )
    client.rows("set search_path = pg_temp, public")
    client.set_role("orchestrator_ops")
    assert client.get(uid)["status"] == "scheduled"
    assert [lease.event_id for lease in client.claim()] == [uid]


# What each does, done as that role alone.


def acting(connect: Connect, role: str) -> Client:
    client = connect()
    client.set_role(role)
    return client


@pytest.mark.parametrize("role", ["orchestrator_read", "orchestrator_ops"])
def test_a_reader_sees_how_maintenance_fares(connect: Connect, role: str) -> None:
    connect().value("select orchestrator.run_maintenance()")
    [(_, problems, days_ahead, *counts)] = acting(connect, role).rows(CONDITION)
    assert (problems, days_ahead > 1, counts) == ([], True, [0, 0, 0, 0])


@pytest.mark.parametrize("role", ["orchestrator_submit", "orchestrator_ingest", "orchestrator_ops"])
def test_a_submitter_submits_in_every_way(connect: Connect, role: str) -> None:
    client = acting(connect, role)
    [answer] = client.submit(event(external_job_id="a"))
    assert answer.result == "accepted"
    assert client.value("select orchestrator.schedule_event('https://receiver.example', '1')")
    client.rows("select orchestrator.open_staging()")
    with client.transaction():
        with client.connection.cursor().copy("copy pg_temp.submission from stdin") as copy:
            copy.write_row(
                (0, answer.id, NOON, "tests", "a", "HTTP", "https://receiver.example", "1", None, 3, *[None] * 7)
            )
        assert client.rows("select n, result from orchestrator.submit_staged()") == [(0, "duplicate")]


def test_a_user_who_is_only_a_member_of_a_role_submits_by_copy(connect: Connect, database_url: str) -> None:
    owner = connect()
    user = f"clerk_{owner.pid}"
    owner.connection.execute(
        sql.SQL("create role {} login password 'secret' in role orchestrator_submit").format(sql.Identifier(user))
    )
    try:
        info = psycopg.conninfo.conninfo_to_dict(database_url) | {"user": user, "password": "secret"}
        with Client(psycopg.conninfo.make_conninfo("", **info)) as client:
            client.at(NOON).rows("select orchestrator.open_staging()")
            with client.transaction():
                with client.connection.cursor().copy("copy pg_temp.submission from stdin") as copy:
                    uid = owner.value("select orchestrator.random_event_id(%s)", NOON)
                    copy.write_row(
                        (0, uid, NOON, "tests", None, "HTTP", "https://receiver.example", "1", None, 3, *[None] * 7)
                    )
                assert client.rows("select * from orchestrator.submit_staged()") == []
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                client.claim()
    finally:
        owner.connection.execute(sql.SQL("drop role {}").format(sql.Identifier(user)))
    assert [lease.event_id for lease in owner.claim()] == [str(uid)]


def test_a_dispatcher_claims_finishes_and_releases(connect: Connect) -> None:
    owner = connect()
    owner.schedule_many(3)
    client = acting(connect, "orchestrator_dispatch")
    worker = client.value("select orchestrator.register_worker('w')")
    leases = client.claim(worker=worker)
    client.finish(results(leases[:1]), worker=worker)
    client.finish(results(leases[1:2], "retry"), worker=worker)
    assert client.release(leases[2:]) == 1
    client.rows("select orchestrator.next_due_at()")
    client.rows("listen orchestrator_due")


def test_a_reader_sees_everything_but_keys_and_changes_nothing(connect: Connect) -> None:
    owner = connect()
    uid = owner.schedule(external_job_id="j")
    owner.finish(results(owner.claim(), "fail"))
    client = acting(connect, "orchestrator_read")
    assert client.get(uid)["status"] == client.status(uid) == "dead"
    assert len(client.rows("select * from orchestrator.dead_letters")) == 1
    assert client.rows("select orchestrator.events_by_external_id('j'), orchestrator.list_dead_letters()")
    assert client.statistics()["totals"]["dead"] == 1
    attempts: list[Callable[[], Any]] = [
        client.schedule, client.claim, lambda: client.cancel(uid), lambda: client.finish([]),
        lambda: client.release([]),
        lambda: client.rows("select orchestrator.run_maintenance()"),
        lambda: client.rows("delete from orchestrator.event"),
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            attempt()


def test_an_operator_maintains_and_tunes_retries(connect: Connect) -> None:
    client = acting(connect, "orchestrator_ops")
    assert client.value("select orchestrator.run_maintenance(45)")["partitions_created"] == 45
    client.rows("insert into orchestrator.retry_policy (name, max_delay) values ('slow', '1 day')")
    client.rows("update orchestrator.retry_policy set jitter = 0 where name = 'slow'")
    client.rows("delete from orchestrator.retry_policy where name = 'slow'")
    uid = client.schedule()
    assert [answer.result for answer in client.cancel(uid)] == ["cancelled"]
