"""What hot functions read when their plans were made while tables were small, or under foreign settings.

A session keeps a generic plan until something invalidates it, and a growing table does not. So sessions make the
plan of every function in one state of the database, it is filled beneath them, and each function is called once more: a
call for N reads in the order of N rows, whatever the statistics said, and whatever is set for the planner.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from time import perf_counter
from typing import Any, LiteralString

import psycopg
import pytest

from orchestrator.database.migrate import migrate
from tests.sql.test_submit import submission
from tests.support.copying import submit_directly, submit_in_one_call
from tests.support.databases import Databases
from tests.support.sql_client import NOON, Client, event, results, seconds

pytestmark = pytest.mark.xdist_group("kept plans")

FULL = 9000  # rows of each kind
DUE = NOON - seconds(60)  # when a herd of them is due at once
FEW, MANY = 5, 100  # what functions are called for, when plans are made and then
PER_ITEM, PER_CALL = 80, 600  # rows, and blocks: well below those of a table, and of each item with each other
PER_LOOK = 200  # what looks up ordering keys, retry policies, topics and lanes for each item

FOREIGN: dict[str, dict[str, str]] = {
    "as shipped": {},
    "generic plans": {"plan_cache_mode": "force_generic_plan"},
    "no joins but by hash": {
        "enable_nestloop": "off", "enable_mergejoin": "off", "enable_memoize": "off", "enable_sort": "off",
        "enable_incremental_sort": "off", "enable_hashagg": "off", "enable_partition_pruning": "off",
    },
    "only sequential scans": {
        "enable_indexscan": "off", "enable_indexonlyscan": "off", "enable_bitmapscan": "off", "enable_tidscan": "off",
    },
    "foreign costs": {
        "random_page_cost": "1000", "cpu_index_tuple_cost": "10", "effective_cache_size": "64kB", "work_mem": "64kB",
        "parallel_setup_cost": "0", "parallel_tuple_cost": "0", "min_parallel_table_scan_size": "0",
        "join_collapse_limit": "1", "from_collapse_limit": "1", "enable_partitionwise_join": "on",
    },
}  # fmt: skip


def _fresh(client: Client) -> None:
    """As migrate left it: nothing was ever analyzed."""


def _analyzed(client: Client) -> None:
    """Vacuumed and analyzed while there was nothing in any table."""
    client.connection.execute("vacuum analyze")


def _few(client: Client) -> None:
    """Analyzed with a few rows in each table."""
    _fill(client, 30, "few")
    client.connection.execute("vacuum analyze")


def _emptied(client: Client) -> None:
    """Analyzed when full, then emptied, and not vacuumed since."""
    _fill(client, 1000, "gone")
    client.connection.execute("analyze")
    for table in ("timer", "outcome", "event", "dead_letter", "outbox", "horizon"):
        client.connection.execute(f"delete from orchestrator.{table}")


def _vacuumed(client: Client) -> None:
    """Emptied and vacuumed: tables that keep their pages, all of them free, and indexes that keep theirs."""
    _emptied(client)
    client.connection.execute("vacuum analyze")


STATES = [_fresh, _analyzed, _few, _emptied, _vacuumed]

# Of each kind as many: due at one instant, spread over days, ended, dead, to be told, beyond the horizon, with a key.
_FILL = """
with given as (
  select n, kind, case kind when 'herd' then %(due)s when 'ordered' then %(due)s - interval '1 s'
      when 'later' then %(due)s + n * interval '1 min' else %(due)s - interval '1 day' end as at
    , 'https://host-' || n %% 50 || '.example/hook' as url
  from generate_series(1, %(rows)s) n cross join unnest(array['herd', 'later', 'ended', 'dead', 'ordered']) as kind
), kept as (
  insert into orchestrator.event
    (id, scheduled_at, created_at, max_retries, source, external_job_id, delivery_type, destination, ordering_key, payload)
  select orchestrator.event_id('kept', %(name)s || kind || n, at), at, at - interval '1 day', 3, 'kept', %(name)s || kind || n, 'HTTP', url
    , case kind when 'ordered' then 'key-' || n end, '{"n": 1}'
  from given order by 1
  returning *
), armed as (
  insert into orchestrator.timer (event_id, scheduled_at, due_at, lane, destination, priority, ordering, attempt, max_attempts, source, expires_at)
  select k.id, k.scheduled_at, k.scheduled_at, hashtextextended(d.name, 0) & 63, hashtextextended(d.name, 0), 0, hashtextextended(k.ordering_key, 0), 0, 4
    , hashtextextended('kept', 0), case when k.external_job_id like '%%later%%' then k.scheduled_at + interval '1 hour' end
  from kept k cross join lateral (select orchestrator.destination_name('HTTP', k.destination) as name) d
  where k.external_job_id ~ 'herd|later|ordered'
  order by 1
), ended as (
  insert into orchestrator.outcome (event_id, scheduled_at, due_at, finished_at, worker, attempt, result, error)
  select k.id, k.scheduled_at, k.scheduled_at, k.scheduled_at, 0, 1, d.result, d.error
  from kept k
  cross join lateral (select case when k.external_job_id like '%%dead%%' then 'dead' else 'delivered' end as result
    , case when k.external_job_id like '%%dead%%' then 'HTTP 500' end as error) d
  where k.external_job_id ~ 'ended|dead'
), mourned as (
  insert into orchestrator.dead_letter (event_id, scheduled_at, died_at, attempts, reason)
  select k.id, k.scheduled_at, k.scheduled_at, 1, 'HTTP 500' from kept k where k.external_job_id like '%%dead%%' order by 1
), told as (
  insert into orchestrator.outbox (created_at, kind, value) select now(), 'answer', 'x' from generate_series(1, %(rows)s)
), counted as (
  insert into orchestrator.statistic_folded (minute, name, source, destination, value)
  select date_trunc('minute', %(due)s) - n %% 100 * interval '1 min', 'accepted', %(name)s || n, 'x', 1 from generate_series(1, %(rows)s) n
)
insert into orchestrator.horizon (id, scheduled_at, created_at, max_retries, source, external_job_id, delivery_type, destination, payload)
select orchestrator.event_id('kept', %(name)s || 'beyond' || n, at), at, now(), 3, 'kept', %(name)s || 'beyond' || n, 'HTTP', 'https://host.example/hook', '{}'
from (select n, %(due)s + interval '90 days' + n * interval '1 s' as at from generate_series(1, %(rows)s) n) b
"""  # noqa: E501


def _fill(client: Client, rows: int, name: str) -> None:
    client.connection.execute(_FILL, {"rows": rows, "name": name, "due": DUE})


Step = Callable[[], object]


def _steps(client: Client, count: int, name: str) -> Iterator[tuple[str, Step]]:
    """Calls of functions for `count` rows each, by what they do; what one step needs, those before it have made."""
    leases: list[Any] = []
    made: list[str] = []
    dead: list[str] = []

    def submit() -> None:
        answers = client.submit(
            *[
                event(
                    external_job_id=f"{name}-{n}",
                    scheduled_at=DUE - seconds(5),
                    ordering_key=f"key-{n % 3}" if n % 9 == 0 else None,
                )
                for n in range(max(count, 40))
            ],
            *[event(external_job_id=f"{name}-later-{n}", scheduled_at=NOON + timedelta(days=1)) for n in range(3)],
        )
        assert all(answer.result in ("accepted", "duplicate") for answer in answers)
        made[:] = [str(answer.id) for answer in answers]

    def claim() -> None:
        leases[:] = sorted(client.claim(count))
        assert leases

    def claim_for_dispatch() -> None:
        leases[:] = sorted(client.claim_for_dispatch(count)[0])
        assert leases

    def finish(result: str) -> Step:
        return lambda: client.finish(results(leases, result))

    def submit_many() -> None:
        with client.transaction():
            submit_directly(
                client, [submission(f"{name}-direct-{n}", scheduled_at=NOON + timedelta(days=1)) for n in range(count)]
            )

    def submit_small() -> None:
        submit_in_one_call(
            client, [submission(f"{name}-small-{n}", scheduled_at=NOON + timedelta(days=1)) for n in range(count)]
        )

    yield "submit", submit
    yield "submit again", submit
    yield "submit directly", submit_many
    yield "submit in one call", submit_small
    yield "submit in one call again", submit_small
    yield (
        "look when the next is due",
        lambda: client.value("select orchestrator.next_due_at(), orchestrator.next_lease_end()"),
    )
    for result in ("delivered", "retry", "fail"):
        yield "claim", claim
        yield "release", lambda: client.release(leases)
        yield "claim for dispatch", claim_for_dispatch
        yield f"finish: {result}", finish(result)
    yield "finish again", finish("delivered")
    yield "claim", claim
    yield "release", lambda: client.release(leases)
    yield "cancel", lambda: client.cancel(made[-1])
    yield "cancel by external id", lambda: client.cancel_external(f"{name}-later-1")
    yield (
        "count what a filter names",
        lambda: client.rows(
            "select * from orchestrator.cancel_events(p_source => 'kept', p_dry_run => true, p_limit => %s)", count
        ),
    )
    yield (
        "cancel by filter",
        lambda: client.rows(
            "select * from orchestrator.cancel_events(p_destination => '*.example', p_limit => %s)", count
        ),
    )
    yield (
        "reschedule",
        lambda: client.rows(
            "select * from orchestrator.reschedule_event(%s::uuid, %s)", made[-3], NOON + timedelta(days=2)
        ),
    )
    dead[:] = client.column("select event_id::text from orchestrator.dead_letter limit 1")
    yield "list dead letters", lambda: client.rows("select orchestrator.list_dead_letters(%s)", count)
    yield (
        "list dead letters of a page",
        lambda: client.rows(
            "select orchestrator.list_dead_letters(%s, %s, %s::uuid)", count, DUE - timedelta(days=1), made[0]
        ),
    )
    yield "redrive", lambda: client.rows("select orchestrator.redrive_event(%s::uuid)", dead[0])
    yield (
        "redrive many",
        lambda: client.rows("select * from orchestrator.redrive_dead_letters(p_reason => '500', p_limit => %s)", count),
    )
    yield (
        "purge",
        lambda: client.rows("select * from orchestrator.purge_dead_letters(p_reason => '500', p_limit => %s)", count),
    )
    yield "get", lambda: client.get(made[0])
    yield "get by external id", lambda: client.column("select orchestrator.events_by_external_id(%s)", f"{name}-0")
    yield (
        "carry out commands",
        lambda: client.value(
            "select orchestrator.execute_commands('t', %s)",
            json.dumps(
                [
                    {"id": "1", "command": "cancel", "event_id": made[1]},
                    {"id": "2", "command": "cancel", "external_job_id": f"{name}-2"},
                ]
            ),
        ),
    )
    yield (
        "publish",
        lambda: client.rows(
            "select orchestrator.outbox_published(array(select at from orchestrator.outbox_batch(%s)))", count
        ),
    )
    yield (
        "set messages aside",
        lambda: client.rows(
            """select orchestrator.outbox_failed(array_agg(at), array_agg('no'::text))
            from orchestrator.outbox_batch(%s)""",
            count,
        ),
    )
    yield "expire", lambda: client.at(NOON + timedelta(days=20)).value("select orchestrator.expire_events(%s)", count)
    client.at(NOON)
    yield "move the horizon", lambda: client.value("select orchestrator.move_horizon(%s)", count)
    yield "raise floors", lambda: client.at(NOON + seconds(5)).value("select orchestrator.raise_floors()")
    yield (
        "let ordering keys go on",
        lambda: client.rows(
            """select orchestrator.advance_ordering(array(
              select hashtextextended('key-' || n, 0) from generate_series(1, %s) n))""",
            count,
        ),
    )
    yield "let all that wait go on", lambda: client.value("select orchestrator.advance_all_orderings()")
    yield "pass a dead letter", lambda: client.value("select orchestrator.pass_dead_letter(%s::uuid)", dead[0])
    yield (
        "count what happened",
        lambda: client.rows("select * from orchestrator.statistics_by(%s)", NOON - seconds(120)),
    )
    yield "fold statistics", lambda: client.value("select orchestrator.fold_statistics(%s)", NOON)
    client.rows(
        "select orchestrator.configure_destination('host-1.example', p_rate_per_second => 50, p_max_parallel => 20)"
    )
    client.rows("select orchestrator.configure_destination('host-2.example', p_max_parallel => 20)")
    client.at(NOON + seconds(10))
    yield "claim and move what has a lane of its own", claim
    yield "finish of own lanes", finish("retry")


def _rows(node: dict[str, Any]) -> float:
    loops = node["Actual Loops"]
    own: float = loops * (
        node["Actual Rows"]
        + sum(node.get(f"Rows Removed by {by}", 0) for by in ("Filter", "Join Filter", "Index Recheck"))
    )
    return own + sum(_rows(below) for below in node.get("Plans", []))


def _blocks(node: dict[str, Any]) -> int:
    return int(node.get("Shared Hit Blocks", 0) + node.get("Shared Read Blocks", 0))


def _touched(client: Client, work: Step) -> tuple[float, int, str]:
    """The rows that all nodes of all statements handled, the blocks that the largest read, and that with most rows."""
    documents: list[dict[str, Any]] = []

    def gather(message: Any) -> None:
        text = str(message.message_primary)
        if "plan:" in text:
            documents.append(json.loads(text.split("plan:", 1)[1]))

    client.rows("set auto_explain.log_min_duration = 0")
    client.rows("set client_min_messages = notice")
    client.connection.add_notice_handler(gather)
    try:
        work()
    finally:
        client.connection.remove_notice_handler(gather)
        client.rows("set auto_explain.log_min_duration = -1")
        client.rows("set client_min_messages = warning")
    plans = [document["Plan"] for document in documents]
    largest = max(documents, key=lambda document: _rows(document["Plan"]))
    return sum(map(_rows, plans)), max(map(_blocks, plans)), json.dumps(largest)


def _open(url: str, settings: dict[str, str]) -> Client:
    client = Client(url).at(NOON)
    client.rows("load 'auto_explain'")
    for name, value in {
        "log_nested_statements": "on", "log_analyze": "on", "log_buffers": "on", "log_timing": "off",
        "log_format": "json", "log_level": "notice", "log_min_duration": "-1",
    }.items():  # fmt: skip
        client.rows("select set_config('auto_explain.' || %s, %s, false)", name, value)
    for name, value in settings.items():
        client.rows("select set_config(%s, %s, false)", name, value)
    return client


def _run(client: Client, count: int, name: str, see: Callable[[str, Step], object]) -> None:
    client.at(NOON)
    client.rows("begin")
    for what, work in _steps(client, count, name):
        see(what, work)
    client.rows("rollback")


@pytest.mark.parametrize("state", STATES, ids=[state.__name__.removeprefix("_") for state in STATES])
def test_a_function_reads_only_the_rows_it_needs_whenever_its_plan_was_made(
    databases: Databases, state: Callable[[Client], None]
) -> None:
    too_much = []
    with databases.migrated() as url, ExitStack() as sessions:
        filling = sessions.enter_context(Client(url))
        filling.rows("select orchestrator.set_outbox('{timestamp,dlq}')")
        state(filling)
        clients = {name: sessions.enter_context(_open(url, settings)) for name, settings in FOREIGN.items()}
        for number, client in enumerate(clients.values()):
            _run(client, FEW, f"early-{number}", lambda _, work: work())
        _fill(filling, FULL, "full")
        for number, (name, client) in enumerate(clients.items()):

            def see(what: str, work: Step, client: Client = client, name: str = name) -> None:
                rows, blocks, largest = _touched(client, work)
                most = (
                    MANY * (PER_LOOK if what.startswith(("claim", "finish", "submit again", "redrive")) else PER_ITEM)
                    + PER_CALL
                )
                if rows > most or blocks > most:
                    too_much.append(f"{name}: {what}: {rows:.0f} rows, {blocks} blocks: {largest}")

            _run(client, MANY, f"late-{number}", see)
    assert not too_much, "\n".join(too_much)


BULK = 50_000  # rows of one call: compared with each other they would take ten seconds and more

_TIMERS: LiteralString = """
insert into orchestrator.event
  (id, scheduled_at, created_at, max_retries, source, external_job_id, delivery_type, destination, payload)
select orchestrator.event_id('bulk', %(name)s || n, %(due)s), %(due)s, %(due)s, 3, 'bulk', %(name)s || n, 'HTTP', 'https://big.example/', '{}'
from generate_series(1, %(rows)s) n;
insert into orchestrator.timer (event_id, scheduled_at, due_at, lane, destination, priority, attempt, max_attempts, source, expires_at)
select e.id, e.scheduled_at, e.scheduled_at, d.hash & 63, d.hash, 0, 0, 4, hashtextextended('bulk', 0), e.scheduled_at
from orchestrator.event e cross join (select hashtextextended('big.example', 0) as hash) d
where e.external_job_id like %(name)s || '%%'
"""  # noqa: E501
_MESSAGES: LiteralString = (
    "insert into orchestrator.outbox (created_at, kind, value) select now(), 'answer', %(name)s"
    " from generate_series(1, %(rows)s)"
)
_BATCH: LiteralString = "from orchestrator.outbox_batch(50000)"

# What is filled in, what has to be done with it, and what is done before.
BULKS: dict[str, tuple[LiteralString, LiteralString, LiteralString]] = {
    "settle lanes": (
        _TIMERS,
        "select orchestrator.reroute_remaining()",
        "select orchestrator.configure_destination('big.example', p_max_parallel => 5)",
    ),
    "expire": (_TIMERS, "select orchestrator.expire_events(50000)", "select 1"),
    "forget requests": (
        """insert into orchestrator.request (id, kept_at, answer)
        select gen_random_uuid(), %(due)s - interval '1 hour', to_json(%(name)s::text)
        from generate_series(1, %(rows)s)""",
        "select orchestrator.forget_requests(orchestrator.now())",
        "select 1",
    ),
    "fold statistics": (
        """insert into orchestrator.statistic (minute, name, source, destination, source_label, value)
        select %(due)s, 'accepted', 1, 2, %(name)s, 1 from generate_series(1, %(rows)s)""",
        "select orchestrator.fold_statistics(orchestrator.now())",
        "select 1",
    ),
    "publish": (_MESSAGES, f"select orchestrator.outbox_published(array(select at {_BATCH}))", "select 1"),
    "set messages aside": (
        _MESSAGES,
        f"select orchestrator.outbox_failed(array_agg(at), array_agg('no'::text)) {_BATCH}",
        "select 1",
    ),
}


@pytest.mark.parametrize("bulk", list(BULKS))
def test_a_sweep_over_a_full_table_takes_as_long_by_a_plan_of_when_it_was_empty(
    databases: Databases, bulk: str
) -> None:
    fill, work, prepare = BULKS[bulk]

    def took_s(client: Client) -> tuple[int, float]:
        began = perf_counter()
        return client.value(work), perf_counter() - began

    with databases.migrated() as url, Client(url).at(NOON) as client, Client(url).at(NOON) as kept:
        given = {"due": DUE}
        cursor = psycopg.ClientCursor(client.connection)
        for n in range(7):
            cursor.execute(fill, {**given, "rows": 3, "name": f"few-{n}-"})
            client.rows(prepare)
            for _ in range(2):
                kept.value(work)
            client.rows("select orchestrator.delete_destination('big.example')")
            for _ in range(2):
                kept.value(work)
        cursor.execute(fill, {**given, "rows": BULK, "name": "full-"})
        client.rows(prepare)
        with Client(url).at(NOON) as fresh:
            fresh.rows("begin")
            done, fresh_s = took_s(fresh)
            fresh.rows("rollback")
        assert done >= BULK
        done, kept_s = took_s(kept)
        assert done >= BULK
        assert kept_s < 5 * fresh_s + 1


def test_a_function_that_pins_one_setting_of_the_planner_pins_all_of_them_and_again_when_reapplied(
    databases: Databases,
) -> None:
    pinned = """select count(*), min(cardinality(p.proconfig)) from pg_proc p
      where p.pronamespace = 'orchestrator'::regnamespace and array_to_string(p.proconfig, ' ') like '%enable_%'"""
    with databases.migrated() as url, Client(url) as client:
        [(functions, settings)] = client.rows(pinned)
        assert functions > 30
        assert settings > 25
        client.rows("update orchestrator.migration set checksum = '' where file = 'functions/30_claim.sql'")
        migrate(url)
        assert client.rows(pinned) == [(functions, settings)]
