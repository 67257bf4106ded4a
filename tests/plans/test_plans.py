"""The plans of hot functions, as executed inside them, on 216,000 events in 30 daily partitions.

auto_explain reports every statement that a function runs. Each test runs with statistics that were never
gathered, that are of the time when everything was empty, and with current ones: a plan that is right only after
ANALYZE stops the service on the first busy day.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import pytest

from tests.sql.test_submit import submission
from tests.support.copying import submit_directly, submit_in_one_call
from tests.support.databases import Databases
from tests.support.sql_client import HOST, NOON, Client, Lease, event, results, seconds

# One worker fills its tables, not each of them (make test: --dist loadgroup).
pytestmark = pytest.mark.xdist_group("plans")

EVENTS = 216_000
DAYS = 30
FIRST = NOON.replace(hour=0) - timedelta(days=5)
SPACING = timedelta(days=DAYS) / EVENTS
TABLES = (
    "select oid from pg_class where relnamespace = 'orchestrator'::regnamespace and relkind in ('r', 'p', 'i', 'I')"
)

_LOAD = """
insert into orchestrator.event
  (id, scheduled_at, created_at, max_retries, source, external_job_id, delivery_type, destination, payload)
select orchestrator.event_id('plans', 'job-' || n, at), at, %(first)s, 3, 'plans', 'job-' || n, 'HTTP'
  , 'https://host-' || n %% 50 || '.example/hook', '{"n": 1}'
from (select n, %(first)s + n * %(spacing)s as at from generate_series(0, %(events)s - 1) n) t
"""
# Everything before yesterday is done; what is due since then waits.
_ARM = """
insert into orchestrator.timer (event_id, scheduled_at, due_at, lane, destination, priority, attempt, max_attempts)
select id, scheduled_at, scheduled_at, orchestrator.lane_for(name), hashtextextended(name, 0), 0, 0, 4
from orchestrator.event cross join lateral (select orchestrator.destination_name('HTTP', destination) as name) d
where scheduled_at >= %(since)s
"""
_FINISH = """
insert into orchestrator.outcome (event_id, scheduled_at, due_at, finished_at, worker, attempt, result)
select id, scheduled_at, scheduled_at, scheduled_at, 0, 1, 'delivered'
from orchestrator.event where scheduled_at < %(since)s
"""


class Scan(NamedTuple):
    """A node that read a table or an index."""

    kind: str
    table: str
    by: str


_SMALL = {"control", "destination", "lane"}


class Plans:
    """The executed plans of some statements."""

    def __init__(self, documents: Sequence[dict[str, Any]]) -> None:
        self.nodes = [node for document in documents for node in _walk(document["Plan"])]
        self.texts = [document["Query Text"] for document in documents]
        self._documents = documents

    @property
    def kinds(self) -> set[str]:
        """What the nodes are, but for scans of tables that have a row for each lane or fewer."""
        return {node["Node Type"] for node in self.nodes if node.get("Relation Name") not in _SMALL}

    def kinds_beside(self, table: str) -> set[str]:
        """What the nodes of those statements are that read the table."""
        found: set[str] = set()
        for document in self._documents:
            nodes = list(_walk(document["Plan"]))
            if any(_is(node, table) for node in nodes):
                found |= {node["Node Type"] for node in nodes}
        return found

    def of(self, text: str) -> Plans:
        """Those of statements with this text."""
        return Plans([document for document in self._documents if text in document["Query Text"]])

    def scans(self, of: str) -> set[Scan]:
        """Executed scans of a table, or of its partitions, whose names are cut off."""
        return {
            Scan(node["Node Type"], of, node.get("Index Name", "").replace(node["Relation Name"], of))
            for node in self.nodes
            if _is(node, of) and node["Node Type"].endswith("Scan")
        }

    def partitions(self, of: str) -> set[str]:
        """Partitions that were read, by their days."""
        return {
            node["Relation Name"].removeprefix(f"{of}_p") for node in self.nodes if _is(node, of) and _is_scan(node)
        }

    def rows_read(self, of: str) -> float:
        """Rows that scans of the table returned or threw away."""
        read: float = sum(
            node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0))
            for node in self.nodes
            if _is(node, of) and _is_scan(node)
        )
        return read


def _is(node: dict[str, Any], table: str) -> bool:
    name: str = node.get("Relation Name", "")
    return name == table or name.startswith(f"{table}_p2")


def _is_scan(node: dict[str, Any]) -> bool:
    return bool(node["Node Type"].endswith("Scan"))


def _walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The node and those below it, leaving out what was never executed."""
    if node["Actual Loops"]:
        yield node
    for below in node.get("Plans", []):
        yield from _walk(below)


def _day(moment: datetime) -> str:
    return f"{moment:%Y%m%d}"


@pytest.fixture(scope="module")
def filled(databases: Databases) -> Iterator[str]:
    with databases.migrated() as url, Client(url) as client:
        client.rows("alter table orchestrator.timer set (autovacuum_enabled = off)")
        values = {"first": FIRST, "spacing": SPACING, "events": EVENTS, "since": NOON - timedelta(days=1)}
        for statement in (_LOAD, _ARM, _FINISH):
            client.connection.execute(statement, values)
        client.rows(
            """insert into orchestrator.statistic_folded (minute, name, source, destination, value)
            select %s, 'accepted', '', '', %s""",
            NOON,
            EVENTS,
        )
        yield url


def _never(client: Client) -> None:
    client.connection.execute(f"delete from pg_statistic where starelid in ({TABLES})")
    client.connection.execute(f"update pg_class set reltuples = -1, relpages = 0 where oid in ({TABLES})")


def _when_empty(client: Client) -> None:
    """As vacuum leaves them: new partitions have no pages yet, the timers' table has pages, all of them free."""
    _never(client)
    client.connection.execute(f"update pg_class set reltuples = 0 where oid in ({TABLES})")
    client.rows("update pg_class set relpages = 500 where oid = 'orchestrator.timer'::regclass")
    client.rows(
        """update pg_class set relpages = 50
        where oid in ('orchestrator.timer_pkey'::regclass, 'orchestrator.timer_due'::regclass)"""
    )


def _now(client: Client) -> None:
    client.rows(
        """analyze orchestrator.event, orchestrator.timer, orchestrator.outcome, orchestrator.delivered_batch,
        orchestrator.lane, orchestrator.retry_policy"""
    )


@pytest.fixture(
    scope="module", params=[_never, _when_empty, _now], ids=["never analyzed", "analyzed when empty", "analyzed"]
)
def url(request: pytest.FixtureRequest, filled: str) -> str:
    gather: Callable[[Client], None] = request.param
    with Client(filled) as client:
        gather(client)
    return filled


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    """A new session, which has no plan yet, in a transaction that leaves the data as it was."""
    with Client(url) as client:
        client.at(NOON)
        client.rows("load 'auto_explain'")
        for name, value in {
            "log_nested_statements": "on", "log_analyze": "on", "log_timing": "off", "log_format": "json",
            "log_level": "notice", "log_min_duration": "-1",
        }.items():  # fmt: skip
            client.rows("select set_config('auto_explain.' || %s, %s, false)", name, value)
        client.rows("begin")
        yield client
        client.rows("rollback")


@contextmanager
def explained(client: Client) -> Iterator[Callable[[], Plans]]:
    """Gathers the plans of everything that runs inside."""
    documents: list[dict[str, Any]] = []

    def gather(message: Any) -> None:
        text = str(message.message_primary)
        if "plan:" in text:
            documents.append(json.loads(text.split("plan:", 1)[1]))

    client.rows("set local auto_explain.log_min_duration = 0")
    client.rows("set local client_min_messages = notice")
    client.connection.add_notice_handler(gather)
    try:
        yield lambda: Plans(documents)
    finally:
        client.connection.remove_notice_handler(gather)
        client.rows("set local auto_explain.log_min_duration = -1")
        client.rows("set local client_min_messages = warning")


def plans_of(client: Client, work: Callable[[], object], *, warm_ups: int = 0) -> Plans:
    """The plans of the work; `warm_ups` runs before it let the server settle for a generic plan."""
    for _ in range(warm_ups):
        work()
    with explained(client) as plans:
        work()
    found = plans()
    assert found.texts
    return found


BY_LANE = {
    Scan("Index Scan", "timer", "timer_due"),
    Scan("Index Only Scan", "timer", "timer_due"),
    Scan("Index Scan", "timer", "timer_own_due"),
    Scan("Index Scan", "timer", "timer_pkey"),  # to prolong the leases of what may take longer
    Scan("Tid Scan", "timer", ""),
}
BY_KEY = {Scan("Index Scan", "timer", "timer_pkey")}
EVENT_BY_KEY = {Scan("Index Scan", "event", "event_pkey"), Scan("Index Only Scan", "event", "event_pkey")}
OUTCOME_BY_ID = {Scan("Index Scan", "outcome", "outcome_event_id_idx"), Scan("Bitmap Heap Scan", "outcome", "")}
BY_AN_INDEX = {"Index Scan", "Index Only Scan", "Bitmap Heap Scan"}


BATCH_INDEX = "delivered_batch_scheduled_at_first_id_last_id_idx"


def deliver(client: Client, count: int, leases: list[Lease] | None = None) -> None:
    """Finishes leases as a dispatcher does, worker 7."""
    began = NOON.timestamp()
    leases = claimed(client, count) if leases is None else leases
    given = results(leases, started_at=began, finished_at=began)
    assert client.finish_as_dispatcher(leases, given, worker=7) == []


def claimed(client: Client, count: int) -> list[Lease]:
    leases = client.claim(count)
    assert len(leases) == count
    return sorted(leases)


@pytest.mark.parametrize("batch", [1, 100, 1000])
@pytest.mark.parametrize("warm_ups", [0, 6])
def test_claiming_reads_due_timers_by_lane_and_their_events_by_key(client: Client, batch: int, warm_ups: int) -> None:
    plans = plans_of(client, lambda: claimed(client, batch), warm_ups=warm_ups)
    assert plans.scans("timer") <= BY_LANE
    assert plans.scans("event") <= EVENT_BY_KEY
    assert not plans.kinds & {"Seq Scan", "Hash Join", "Hash", "Merge Join", "Bitmap Heap Scan"}
    assert plans.partitions("event") <= {_day(NOON - timedelta(days=1)), _day(NOON)}
    # Each lane's first due one; then those in flight ahead of the ones that are given.
    assert plans.rows_read("timer") <= 64 + 3 * batch * (1 + warm_ups) + 64
    assert plans.rows_read("event") == batch


@pytest.mark.parametrize("batch", [1, 100, 1000])
@pytest.mark.parametrize("warm_ups", [0, 6])
def test_a_dispatchers_claim_reads_the_events_in_one_pass_over_their_keys(
    client: Client, batch: int, warm_ups: int
) -> None:
    plans = plans_of(client, lambda: client.claim_for_dispatch(batch), warm_ups=warm_ups)
    assert plans.scans("timer") <= BY_LANE
    assert plans.scans("event") <= EVENT_BY_KEY
    assert "Nested Loop" not in plans.kinds_beside("event")
    assert plans.partitions("event") <= {_day(NOON - timedelta(days=1)), _day(NOON)}
    assert plans.rows_read("event") == batch


def test_a_claim_that_finds_nothing_touches_no_event(client: Client) -> None:
    client.at(FIRST - timedelta(days=1))
    plans = plans_of(client, client.claim)
    assert plans.scans("timer") <= BY_LANE
    assert plans.partitions("event") == set()
    assert plans.rows_read("timer") == 0


@pytest.mark.parametrize("function", ["next_due_at", "next_lease_end"])
def test_when_to_claim_next_is_read_from_one_timer_a_lane(client: Client, function: str) -> None:
    plans = plans_of(client, lambda: client.value(f"select orchestrator.{function}()"))
    assert plans.scans("timer") <= BY_LANE
    assert plans.rows_read("timer") <= 64


@pytest.mark.parametrize("kind", ["delivered", "retry", "fail"])
@pytest.mark.parametrize("count", [1, 500])
def test_finishing_finds_timers_by_key(client: Client, kind: str, count: int) -> None:
    for _ in range(6):
        client.finish(results(claimed(client, count), kind))
        client.rows("update orchestrator.lane set breaker = 'closed', open_until = '-infinity'")
    leases = claimed(client, count)
    plans = plans_of(client, lambda: client.finish(results(leases, kind)))
    assert plans.scans("timer") == BY_KEY
    assert plans.rows_read("timer") == count
    assert plans.scans("event") <= (EVENT_BY_KEY if kind == "retry" else set())
    assert plans.scans("outcome") <= OUTCOME_BY_ID
    assert plans.partitions("outcome") <= {_day(NOON - timedelta(days=1)), _day(NOON)}
    assert "Nested Loop" not in plans.kinds_beside(
        "timer"
    )  # between the timers and the arrays: the square of the batch


@pytest.mark.parametrize("count", [2, 500])
def test_finishing_in_batches_finds_timers_at_their_places(client: Client, count: int) -> None:
    for _ in range(6):
        deliver(client, count)
    leases = claimed(client, count)
    plans = plans_of(client, lambda: deliver(client, count, leases))
    finishing = plans.of("delete from orchestrator.timer")
    assert finishing.scans("timer") == {Scan("Tid Scan", "timer", "")}
    assert finishing.rows_read("timer") == count
    assert "Hash Join" not in finishing.kinds
    assert plans.scans("event") == set()
    assert plans.scans("outcome") == set()


def test_a_repeated_batch_is_looked_for_in_the_ten_seconds_of_its_events(client: Client) -> None:
    kept = [claimed(client, 200) for _ in range(5)]
    for leases in kept:
        deliver(client, 200, leases)
    plans = plans_of(client, lambda: client.finish(results(kept[3]), worker=7))
    assert plans.scans("delivered_batch") <= {Scan("Index Scan", "delivered_batch", BATCH_INDEX)}
    assert plans.partitions("delivered_batch") <= {_day(NOON - timedelta(days=1)), _day(NOON)}
    assert plans.scans("outcome") <= OUTCOME_BY_ID


@pytest.mark.parametrize("warm_ups", [0, 7])
def test_an_event_in_a_batch_is_found_by_its_id(client: Client, warm_ups: int) -> None:
    leases = claimed(client, 400)
    deliver(client, 400, leases)
    uid = leases[7].event_id
    plans = plans_of(client, lambda: client.get(uid), warm_ups=warm_ups)
    assert client.get(uid)["status"] == "delivered"
    assert plans.scans("delivered_batch") <= {
        Scan("Index Scan", "delivered_batch", BATCH_INDEX), Scan("Bitmap Heap Scan", "delivered_batch", ""),
    }  # fmt: skip
    assert plans.partitions("delivered_batch") == {_day(leases[7].scheduled_at)}
    assert plans.rows_read("delivered_batch") <= 3 * 3
    assert plans.scans("event") <= EVENT_BY_KEY


def test_repeating_a_finish_looks_for_its_outcomes_in_the_days_of_its_events(client: Client) -> None:
    leases = claimed(client, 200)
    client.finish(results(leases))
    plans = plans_of(client, lambda: client.finish(results(leases)))
    assert plans.scans("outcome") <= OUTCOME_BY_ID
    assert plans.partitions("outcome") <= {_day(NOON - timedelta(days=1)), _day(NOON)}


@pytest.mark.parametrize("kind", ["delivered", "fail"])
@pytest.mark.parametrize("warm_ups", [0, 6])
def test_outbox_messages_of_finished_events_read_each_event_once_by_its_key(
    client: Client, kind: str, warm_ups: int
) -> None:
    client.rows("select orchestrator.set_outbox('{timestamp,dlq}')")
    plans = plans_of(client, lambda: client.finish(results(claimed(client, 300), kind)), warm_ups=warm_ups)
    assert plans.scans("event") <= EVENT_BY_KEY
    assert plans.rows_read("event") == 2 * 300  # by the claim, and to tell
    assert plans.scans("outcome") <= OUTCOME_BY_ID
    assert plans.rows_read("outcome") <= 300
    assert plans.partitions("outcome") <= {_day(NOON - timedelta(days=1)), _day(NOON)}


@pytest.mark.parametrize("warm_ups", [0, 6])
def test_a_batch_of_the_outbox_is_read_in_order_and_no_more_of_it(client: Client, warm_ups: int) -> None:
    client.rows(
        """insert into orchestrator.outbox (created_at, kind, value)
        select now(), 'answer', 'x' from generate_series(1, 20000)"""
    )
    plans = plans_of(client, lambda: client.rows("select * from orchestrator.outbox_batch(500)"), warm_ups=warm_ups)
    assert plans.scans("outbox") == {Scan("Index Scan", "outbox", "outbox_order")}
    assert plans.rows_read("outbox") == 500


@pytest.mark.parametrize("count", [1, 500])
def test_releasing_finds_timers_by_key(client: Client, count: int) -> None:
    leases = claimed(client, count)
    plans = plans_of(client, lambda: client.release(leases))
    assert plans.scans("timer") == BY_KEY
    assert plans.rows_read("timer") == count


@pytest.mark.parametrize("duplicates", [False, True])
def test_submitting_reads_no_table_of_events(client: Client, duplicates: bool) -> None:
    batches = iter(range(10))

    def submit() -> None:
        number = 0 if duplicates else next(batches)
        answers = client.submit(*[event(external_job_id=f"{number}-{n}") for n in range(300)])
        assert len(answers) == 300

    plans = plans_of(client, submit, warm_ups=6)
    # But to say what state a duplicate is in.
    assert plans.scans("timer") <= (BY_KEY if duplicates else set())
    assert plans.scans("event") <= (EVENT_BY_KEY if duplicates else set())
    assert plans.rows_read("timer") <= (300 if duplicates else 0)


def test_submitting_directly_reads_no_table_of_events(client: Client) -> None:
    batches = iter(range(10))

    def submit() -> None:
        number = next(batches)
        with client.transaction():
            submit_directly(client, [submission(f"direct-{number}-{n}") for n in range(300)])

    plans = plans_of(client, submit, warm_ups=6)
    assert plans.scans("timer") | plans.scans("event") == set()
    assert plans.rows_read("timer") == 0


@pytest.mark.parametrize("duplicates", [False, True])
def test_submitting_in_one_call_reads_no_table_of_events(client: Client, duplicates: bool) -> None:
    batches = iter(range(10))

    def submit() -> None:
        number = 0 if duplicates else next(batches)
        submit_in_one_call(client, [submission(f"call-{number}-{n}") for n in range(300)])

    plans = plans_of(client, submit, warm_ups=6)
    # But to say what state a duplicate is in.
    assert plans.scans("timer") <= (BY_KEY if duplicates else set())
    assert plans.scans("event") <= (EVENT_BY_KEY if duplicates else set())
    assert plans.rows_read("timer") <= (300 if duplicates else 0)


@pytest.mark.parametrize("warm_ups", [0, 7])
def test_an_event_is_found_by_its_id_in_its_day(client: Client, warm_ups: int) -> None:
    at = FIRST + 1000 * SPACING
    uid = client.value("select orchestrator.event_id('plans', 'job-1000', %s)::text", at)
    plans = plans_of(client, lambda: client.get(uid), warm_ups=warm_ups)
    assert client.get(uid)["status"] == "delivered"
    assert plans.scans("event") <= EVENT_BY_KEY
    assert plans.scans("timer") <= BY_KEY
    assert plans.scans("outcome") <= OUTCOME_BY_ID
    assert plans.partitions("event") == {_day(at)}
    assert plans.partitions("outcome") == {_day(at)}
    assert plans.rows_read("event") <= 3


@pytest.mark.parametrize("warm_ups", [0, 7])
def test_events_of_an_external_id_are_found_by_index(client: Client, warm_ups: int) -> None:
    plans = plans_of(
        client, lambda: client.column("select orchestrator.events_by_external_id('job-1000')"), warm_ups=warm_ups
    )
    assert {scan.kind for scan in plans.scans("event") | plans.scans("outcome")} <= BY_AN_INDEX
    assert plans.scans("timer") <= BY_KEY
    assert plans.rows_read("event") <= 5


@pytest.mark.parametrize("warm_ups", [0, 7])
def test_cancelling_by_id_touches_one_day(client: Client, warm_ups: int) -> None:
    ids = iter(
        client.column(
            "select event_id::text from orchestrator.timer where due_at > %s limit 20", NOON + timedelta(days=9)
        )
    )

    def cancel() -> None:
        assert [answer.result for answer in client.cancel(next(ids))] == ["cancelled"]

    plans = plans_of(client, cancel, warm_ups=warm_ups)
    assert plans.scans("timer") <= BY_KEY
    assert {scan.kind for scan in plans.scans("event") | plans.scans("outcome")} <= BY_AN_INDEX
    assert plans.rows_read("timer") <= 5
    assert plans.rows_read("event") <= 5


@pytest.mark.parametrize("warm_ups", [0, 7])
def test_cancelling_by_external_id_goes_by_index(client: Client, warm_ups: int) -> None:
    numbers = iter(range(EVENTS - 100, EVENTS))

    def cancel() -> None:
        assert [answer.result for answer in client.cancel_external(f"job-{next(numbers)}")] == ["cancelled"]

    plans = plans_of(client, cancel, warm_ups=warm_ups)
    assert plans.scans("timer") <= BY_KEY
    assert {scan.kind for scan in plans.scans("event") | plans.scans("outcome")} <= BY_AN_INDEX
    assert plans.rows_read("timer") <= 5
    assert plans.rows_read("event") <= 8


def test_a_claim_takes_milliseconds(client: Client) -> None:
    durations = []
    for _ in range(20):
        started = time.perf_counter()
        leases = client.claim(100)
        durations.append(time.perf_counter() - started)
        assert len(leases) == 100
        assert client.finish(results(sorted(leases))) == []
    assert statistics.median(durations) < 0.05


def test_the_queues_of_other_days_do_not_slow_the_next_event(client: Client) -> None:
    """Nothing but what is due is read: 160,000 timers of the future cost nothing."""
    client.rows("delete from orchestrator.timer where due_at <= %s", NOON)
    client.submit(event(destination=f"{HOST}/only"))
    plans = plans_of(client, lambda: claimed(client, 1))
    # Deleted ones are still in the index until vacuum has been here, and cost no more than to be passed over.
    assert plans.rows_read("timer") <= 64
    assert client.at(NOON + seconds(1)).claim(1) == []
