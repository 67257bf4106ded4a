"""What the program does depends on no default of the database, the role, or libpq's environment."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString
from urllib.parse import quote

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb

from orchestrator.database import Database
from orchestrator.database.bulk_calls import Sweeps
from orchestrator.database.connection import connect, connect_blocking
from orchestrator.database.event_calls import Filter
from orchestrator.database.ingestion import Ingestion, Move, Reject
from orchestrator.database.maintenance import Maintenance, Retention
from orchestrator.database.migrate import check, migrate
from orchestrator.database.session import MARK, SESSION, Session
from orchestrator.events.parsing import parse_submission, submission_row
from orchestrator.settings import Settings
from tests.conftest import MakeSettings, Spawn
from tests.integration.api_support import until
from tests.integration.cli_support import Call, answer, invoke
from tests.support.databases import Databases, sibling
from tests.support.dispatching import dispatching
from tests.support.ingesting import submission
from tests.support.receiver import Answer, Receiver
from tests.support.sql_client import Client
from tests.support.worst import WORST, WORST_IN_PSQL, worst_login

# Settings that any session may change and that a deployment may well set: they decide how fast things go and where
# they are kept, not what comes of them.
LEFT_ALONE = r"""
application_name|(transaction|default_transaction)_(isolation|read_only|deferrable)|synchronous_commit|commit_siblings
|escape_string_warning|default_tablespace|temp_tablespaces|default_toast_compression|createrole_self_grant|local_preload_libraries
|(work|maintenance_work|logical_decoding_work)_mem|hash_mem_multiplier|temp_buffers|gin_.*|vacuum_.*|wal_.*
|.*_cost|.*_flush_after|effective_.*|(jit|geqo|icu|lc|log|md5|min|tcp|trace|max_parallel)_.*|geqo|xmloption
|debug_(logical|pretty|print)_.*
|enable_(async_append|distinct_reordering|gathermerge|group_by_reordering|incremental_sort|parallel_.*|partitionwise_.*)
|enable_(presorted_aggregate|self_join_elimination)|parallel_leader_participation|constraint_exclusion|cursor_tuple_fraction
|recursive_worktable_factor|(default_statistics|default_text_search)_.*|client_connection_check_interval|file_copy_method
|io_combine_limit|maintenance_io_concurrency|max_parallel_workers|password_encryption|scram_iterations|stats_fetch_consistency
|synchronize_seqscans
"""


def test_every_setting_of_a_session_is_either_set_or_listed_as_left_alone(client: Client) -> None:
    names = client.column("select lower(name) from pg_settings where context = 'user' and name !~ '[.]'")
    pattern = LEFT_ALONE.replace("\n", "")
    assert [name for name in names if name not in SESSION and not re.fullmatch(pattern, name)] == []
    assert [name for name in SESSION if name not in names and "." not in name] == []
    assert WORST.keys() == SESSION.keys()


async def test_no_default_of_the_database_or_the_role_reaches_a_connection(
    settings: MakeSettings, database_url: str
) -> None:
    query = sql.SQL("select {}").format(
        sql.SQL(", ").join(sql.SQL("current_setting({})").format(sql.Literal(name)) for name in SESSION)
    )
    with worst_login(database_url) as url:
        with connect_blocking(url, "test") as blocking:
            assert dict(zip(SESSION, blocking.execute(query).fetchall()[0], strict=True)) == SESSION
            assert blocking.info.encoding == "utf-8"
        async with await connect(settings(DATABASE_URL=url), "test", lock_timeout="2s") as connection:
            told = await (await connection.execute(query)).fetchall()
            assert dict(zip(SESSION, told[0], strict=True)) == {**SESSION, "lock_timeout": "2s"}
            assert connection.pooled is False


async def test_answers_do_not_depend_on_settings_of_the_database_or_the_role(
    settings: MakeSettings, empty_database_url: str, database_url: str, receiver: Receiver
) -> None:
    clean = await _drive(settings(DATABASE_URL=database_url), receiver, "/clean")
    with worst_login(empty_database_url) as url:
        assert len(migrate(url).applied) > 20
        assert check(url) == []
        assert await _drive(settings(DATABASE_URL=url), receiver, "/worst") == clean
        doctor = await asyncio.to_thread(invoke, "doctor", "--json", env={"DATABASE_URL": url})
        findings = json.loads(doctor.stdout)["findings"]
        # Servers of tests are not durable.
        assert {each["check"] for each in findings if each["level"] == "problem"} <= {"durability"}


async def _drive(chosen: Settings, receiver: Receiver, path: str) -> dict[str, Any]:
    """Takes events through all that can happen to them, by the program's own ways; what it was told, without ids."""
    hook = receiver.script(path, Answer(503), Answer(204))
    due = datetime.now(UTC).replace(microsecond=0)
    tomorrow = due + timedelta(days=1)

    def event(name: str, **changes: Any) -> Any:
        fields: dict[str, Any] = {"external_job_id": name, "scheduled_at": tomorrow.isoformat(), "destination": hook}
        return parse_submission(submission(1, **{**fields, **changes}), chosen)

    told: dict[str, Any] = {}
    async with Database(chosen, role="api") as database, Ingestion.open(chosen) as ingestion:
        now = event("José €", scheduled_at=due.isoformat(), payload={"é": "\\ñ€"}, headers={"x-name": "plain"})
        patient = event("late", spread_seconds=60, max_retries=1)
        refused = event("policy", retry_policy="nobody")
        submissions = [now, patient, refused, event("one"), event("two"), event("three")]
        told["submitted"] = [(each.result, each.field, each.reason) for each in await database.submit(submissions)]
        told["again"] = [each.result for each in await database.submit(submissions[:2])]
        await database.ready()
        rows = [submission_row(submission(n, destination=hook), chosen, n) for n in range(3)]
        told["ingested"] = await ingestion.submit("topic", [Move(0, None, 3, 2, None)], rows, [], _rejected)
        async with dispatching(chosen):
            await until(lambda: _is_delivered(database, now.id), 20.0)
        [found] = await database.events_by_external_id("José €", limit=5)
        told["delivered"] = _outline(json.loads(found))
        told["received"] = [json.loads(request.body) for request in receiver.received(path)]
        told["cancelled"] = [tuple(each)[1:] for each in await database.cancel_external("one")]
        moved = await database.reschedule(None, "two", scheduled_at=(due + timedelta(days=2)).isoformat())
        assert moved is not None
        told["rescheduled"] = moved.result, moved.status
        swept = await Sweeps(database).cancel(Filter(source="tests", since=due.isoformat()), limit=100)
        told["swept"] = swept.seen, swept.matched, swept.done
        statistics = json.loads(await database.statistics())
        told["statistics"] = {name: statistics[name] for name in ("scheduled", "retrying", "in_flight", "backlog")}
        by = [json.loads(each) for each in await database.statistics_by(["source"], Filter(), limit=100)]
        told["by"] = sorted((each["name"], each["value"]) for each in by)
        async with Maintenance.open(chosen) as maintenance:
            await maintenance.configure(Retention.of(chosen)._replace(partition_days_ahead=40))
            upkeep = await maintenance.run_on()
        told["maintained"] = upkeep.problems, upkeep.did["partitions_created"] > 0
        told["configured"] = await database.value(_CONFIGURE)
        told["keys"] = await database.count_api_keys()
    return told


def _rejected(n: int, field: str, reason: str) -> Reject:
    return Reject(0, n, None, None, field, reason)


async def _is_delivered(database: Database, event_id: str) -> bool:
    event = json.loads(await database.event(event_id) or b"{}")
    return bool(event["status"] == "delivered")


_CONFIGURE: LiteralString = """
select row_to_json(d) from orchestrator.configure_destination(
  'hooks.example.com', p_rate_per_second => 0.1::float8 + 0.2::float8, p_timeout => '90 s') d
"""


def _outline(value: Any) -> Any:
    """A document in which times and ids are only said to be there, and in which form."""
    if isinstance(value, dict):
        return {name: _outline(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_outline(each) for each in value]
    if isinstance(value, str):
        value = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?[+]\d\d:\d\d", "TIME", value)
        return re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}|/(clean|worst)|:\d{4,5}", "ID", value)
    return "number" if isinstance(value, float) else value


def test_answers_of_functions_do_not_depend_on_settings_of_a_psql_session(databases: Databases) -> None:
    told = []
    for settings in ({}, WORST_IN_PSQL):
        with databases.migrated() as url, Client(url) as client:
            client.connection.execute("create access method other_heap type table handler heap_tableam_handler")
            for name, value in settings.items():
                client.value("select set_config(%s, %s, false)", name, value)
            told.append(_outline(_in_psql(client)))
    assert told[1] == told[0]


def test_texts_inside_functions_do_not_depend_on_escape_rules(client: Client) -> None:
    rows = client.rows(
        """select proname::text, prosrc from pg_proc
        where pronamespace = 'orchestrator'::regnamespace and prosqlbody is null and prosrc ~ '[\\\\]'"""
    )
    assert rows
    for name, source in rows:
        texts = re.findall(r"(E?)'((?:[^']|'')*)'", re.sub(r"--.*", "", source))
        assert [text for escaped, text in texts if "\\" in text and not escaped] == [], name


def _in_psql(client: Client) -> Any:
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).replace(microsecond=0).isoformat()

    def asked(query: LiteralString, *values: Any) -> Any:
        try:
            return client.value("select json_agg(row_to_json(a))::text from (" + query + ") a", *values)
        except psycopg.Error as error:
            return str(error).splitlines()[0]

    schedule: LiteralString = """select orchestrator.schedule_event(
      %s, %s, %s::timestamptz, p_external_job_id => %s, p_headers => %s, p_delivery_type => %s)"""
    hook, no_headers = "http://127.0.0.1:9/hook", Jsonb(None)
    scheduled = [
        asked(schedule, hook, Jsonb({"a": "\\ é"}), tomorrow, "one", Jsonb({"x-name": "v"}), "HTTP"),
        asked(schedule, hook, Jsonb({}), tomorrow, "two", Jsonb({"x-name": "\\x"}), "HTTP"),
        asked(schedule, hook, Jsonb({}), tomorrow, "bad", Jsonb({"x-name": "a\nb"}), "HTTP"),
        asked(schedule, "..", Jsonb({}), tomorrow, "bad", no_headers, "KAFKA"),
        asked(schedule, "a.b", Jsonb({}), tomorrow, "topic", no_headers, "KAFKA"),
        asked(schedule, hook, Jsonb({}), "2300-01-01T00:00:00Z", "far", no_headers, "HTTP"),
        asked(schedule, hook, Jsonb({}), None, "now", no_headers, "HTTP"),
    ]
    return {
        "scheduled": scheduled,
        "events": asked("select orchestrator.get_event(id) from orchestrator.event order by external_job_id"),
        "destinations": [
            asked("select name, note from orchestrator.configure_destination('*', p_burst => 1)"),
            asked("select name, note from orchestrator.configure_destination(%s, p_burst => 1)", "a\\b"),
            asked("select name, note from orchestrator.configure_destination('a_b.example', p_spread => '9:00')"),
            asked("select name, overlaps from orchestrator.configure_destination('*.example', 0.1)"),
            asked("select orchestrator.get_destination('a_b.example')"),
            asked("select orchestrator.list_destinations()"),
        ],
        "cancelled": asked("select result, status from orchestrator.cancel_event(p_external_job_id => 'one')"),
        "rescheduled": asked(
            "select result from orchestrator.reschedule_event(p_scheduled_at => %s, p_external_job_id => 'two')",
            (datetime.now(UTC) + timedelta(days=3)).replace(microsecond=0),
        ),
        "swept": asked("select seen, matched from orchestrator.cancel_events(p_source => 'psql', p_dry_run => true)"),
        "days": asked("select orchestrator.create_partitions(current_date + 32, current_date + 33)"),
        "maintained": json.loads(client.value("select orchestrator.run_maintenance(35)::text"))["problems"],
        "tables": client.column(
            "select distinct amname::text from pg_class c join pg_am a on a.oid = c.relam"
            " where c.relnamespace = 'orchestrator'::regnamespace and c.relkind in ('r', 'p') order by 1"
        ),
        "forecast": asked("select bucket_at, due from orchestrator.backlog_forecast('1 day', '3 days') order by 1"),
        "rights": asked("select * from orchestrator.changed_rights()"),
        "letters": asked("select orchestrator.list_dead_letters(5)"),
        "told": asked("select count(*) from orchestrator.claim_due_events(5)"),
    }


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_a_database_that_cannot_keep_every_text_is_refused_by_name(
    databases: Databases, spawn: Spawn, encoding: str
) -> None:
    with databases.empty() as url, psycopg.connect(url, autocommit=True) as connection:
        name = f"{connection.info.dbname}_{encoding.lower()}"
        create = "create database {} encoding {} locale 'C' template template0"
        connection.execute(sql.SQL(create).format(sql.Identifier(name), sql.Literal(encoding)))
        try:
            other = sibling(url, name)
            env = {"DATABASE_URL": other, "COLUMNS": "300"}
            expected = f"database {name} has the encoding {encoding}: expected UTF8"
            for arguments in (["migrate"], ["migrate", "--check"], ["stats"]):
                result = await asyncio.to_thread(invoke, *arguments, env=env)
                assert (result.exit_code, expected in result.stderr) == (1, True), result.stderr
            doctor = await asyncio.to_thread(invoke, "doctor", env=env)
            assert expected in doctor.stdout, doctor.output
            assert "template template0" in doctor.stdout
            given = {"DATABASE_URL": other, "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"}
            roles = [spawn(role, **given) for role in ("run", "api", "ingest", "dispatch", "maintain")]
            for process in roles:
                assert await process.wait() == 1
                assert expected in process.log()
        finally:
            connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def test_variables_of_libpq_change_nothing(database_url: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = {
        "PGOPTIONS": "-c array_nulls=off -c statement_timeout=1",
        "PGCLIENTENCODING": "LATIN1",
        "PGDATESTYLE": "SQL, DMY",
        "PGTZ": "Asia/Kolkata",
        "PGGEQO": "off",
        "PGAPPNAME": "other",
        "PGTARGETSESSIONATTRS": "standby",
        "LC_ALL": "C",
        "LANG": "C",
    }
    for name, value in foreign.items():
        monkeypatch.setenv(name, value)
    event = answer(
        call("submit", "--json", "--external-id", "José €", "--payload", "{}", "--destination", "http://a.example/")
    )
    shown = answer(call("get", "--json", event["id"]))
    assert shown["external_job_id"] == "José €"
    assert shown["scheduled_at"].endswith("+00:00")


def test_connection_settings_of_a_url_are_merged_with_those_the_program_needs() -> None:
    options = "-c work_mem=64MB -c statement_timeout=5s --search-path=a\\ b"
    url = f"postgresql://h/d?application_name=billing&connect_timeout=9&keepalives_idle=7&options={quote(options)}"
    session = Session.of(url, "dispatch")
    assert session.parameters["application_name"] == "billing orchestrator dispatch"
    assert session.parameters["connect_timeout"] == 9
    assert (session.parameters["keepalives_idle"], session.parameters["keepalives_interval"]) == ("7", "10")
    assert session.options.startswith(options)
    assert session.options.endswith(f"-c {'='.join(MARK)}")
    assert session.overruled == {"statement_timeout": "5s", "search_path": "a b"}
    assert Session.of("postgresql://h/d?connect_timeout=0", "api").parameters["connect_timeout"] == 5


@pytest.mark.parametrize(("options", "kept"), [("-c a.b=c\\", "c"), ("-c a.b=c\\\\", "c\\"), ("-c a.b=c\\ ", "c ")])
def test_options_that_end_in_backslashes_leave_the_program_s_own_alone(
    database_url: str, options: str, kept: str
) -> None:
    with connect_blocking(f"{database_url}?options={quote(options)}", "test") as connection:
        query = "select current_setting('a.b'), current_setting('client_min_messages')"
        assert connection.execute(query).fetchone() == (kept, "warning")


def test_a_url_s_own_settings_reach_the_session(database_url: str, call: Call) -> None:
    url = f"{database_url}?application_name=billing&options=-c%20work_mem%3D17MB%20-c%20statement_timeout%3D1"
    with connect_blocking(url, "test") as connection:
        query = "select current_setting('work_mem'), current_setting('statement_timeout')"
        assert connection.execute(query).fetchone() == ("17MB", "0")
    shown = answer(invoke("config", "check", "--json", env={"DATABASE_URL": url}))
    assert shown["connection"]["application_name"].startswith("billing orchestrator")
    assert "work_mem=17MB" in shown["connection"]["options"]
    [notice] = [notice for notice in shown["notices"] if "statement_timeout" in notice]
    assert "no effect" in notice
