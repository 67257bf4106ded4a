"""A session of psql in Python: the SQL functions, called as a client calls them, one answer a row.

The clock is the session's own: `Client.at` sets ``orchestrator.now`` for everything that it does from then on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, LiteralString, NamedTuple, Self, TypeVar

import psycopg
from psycopg import sql
from psycopg.rows import TupleRow, namedtuple_row
from psycopg.types.json import Jsonb

from orchestrator.database import Finished
from orchestrator.database.delivered import delivered_arguments
from orchestrator.database.leases import FINISH_DELIVERED

T = TypeVar("T")

# Noon of today: the partitions reach from a week ago to a month from now, and no test crosses midnight.
NOON = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0)
HOST = "https://receiver.example"


def seconds(amount: float) -> timedelta:
    return timedelta(seconds=amount)


def event(**changes: Any) -> dict[str, Any]:
    """A submission due at `NOON`; a change to ... leaves the field out."""
    fields: dict[str, Any] = {
        "source": "tests",
        "scheduled_at": NOON,
        "destination": f"{HOST}/hook",
        "payload": {"n": 1},
    } | changes
    fields = {name: value for name, value in fields.items() if value is not ...}
    if isinstance(fields.get("scheduled_at"), datetime):
        fields["scheduled_at"] = fields["scheduled_at"].isoformat()
    return fields


class Answer(NamedTuple):
    """What `submit_events` says of one item."""

    n: int
    id: str | None
    result: str
    field: str | None
    reason: str | None
    status: str | None


class Lease(NamedTuple):
    """What `claim_due_events` gives, without what the event itself says."""

    event_id: str
    attempt: int
    due_at: datetime
    lease_until: datetime
    scheduled_at: datetime
    source: str
    external_job_id: str | None
    delivery_type: str
    destination: str | None
    ordering_key: str | None
    headers: Any
    payload: Any
    start_at: datetime
    lane: int
    options: Any
    waited: Any
    expires_at: datetime | None
    correlation_id: str | None
    traceparent: str | None


class Result(NamedTuple):
    """The result of one attempt, as `finish_events` takes it."""

    event_id: str
    attempt: int
    result: str = "delivered"
    status_code: int | None = None
    started_at: float | None = None
    finished_at: float | None = None
    error: str | None = None
    response: str | None = None
    retry_after: float | None = None


class Finish(NamedTuple):
    event_id: str
    result: str
    due_at: datetime | None
    attempt: int


class Cancel(NamedTuple):
    event_id: str
    result: str
    status: str


def results(leases: Iterable[Lease], result: str = "delivered", **more: Any) -> list[Result]:
    return [Result(lease.event_id, lease.attempt, result, **more) for lease in leases]


class Client:
    """One autocommitting session."""

    def __init__(self, url: str) -> None:
        self.connection: psycopg.Connection[TupleRow] = psycopg.connect(
            url, autocommit=True, options="-c timezone=UTC -c client_min_messages=warning"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.connection.close()

    @property
    def pid(self) -> int:
        return self.connection.info.backend_pid

    def rows(self, query: LiteralString, *values: Any) -> list[TupleRow]:
        cursor = self.connection.execute(query, values or None)
        return cursor.fetchall() if cursor.description else []

    def column(self, query: LiteralString, *values: Any) -> list[Any]:
        return [row[0] for row in self.rows(query, *values)]

    def value(self, query: LiteralString, *values: Any) -> Any:
        rows = self.rows(query, *values)
        return rows[0][0] if rows else None

    @contextmanager
    def transaction(self) -> Any:
        with self.connection.transaction():
            yield

    def at(self, moment: datetime | None) -> Self:
        """Sets this session's clock; None lets it run again."""
        self.rows("select set_config('orchestrator.now', %s, false)", "" if moment is None else moment.isoformat())
        return self

    def keep_three_days(self) -> None:
        """Leaves the partitions around `NOON` alone: what looks at every one is ten times faster without the others."""
        days = [NOON + timedelta(days=day) for day in (-1, 0, 1)]
        for name in self.column(
            """select c.relname from pg_class c
            where c.relnamespace = 'orchestrator'::regnamespace
              and c.relname ~ '^(event|outcome|delivered_batch)_p[0-9]{8}$'
              and (right(c.relname, 8) <> all (%s) or not c.relispartition)""",
            [f"{day:%Y%m%d}" for day in days],
        ):
            self.connection.execute(sql.SQL("drop table orchestrator.{}").format(sql.Identifier(name)))
        self.rows("delete from orchestrator.retired_partition")
        self.rows("select orchestrator.create_partitions(%s, %s)", days[0].date(), days[-1].date())
        self.rows("select orchestrator.update_horizon_start()")

    def forget_floors(self) -> None:
        """Has claims look at everything, whatever the clock showed before."""
        self.rows("select orchestrator.reset_floors()")
        self.rows("update orchestrator.control set floors_at = '-infinity'")

    def forget_destinations(self) -> None:
        """Leaves only the shared lanes; no timer may wait in another."""
        self.rows("delete from orchestrator.lane where lane > 63")
        self.rows("delete from orchestrator.destination")
        self.rows("update orchestrator.control set rerouted_by = null, paused_at = null, resumed_at = null")
        self.rows("select setval('orchestrator.lane_number', 64, false)")

    def set_role(self, role: str) -> None:
        self.connection.execute(sql.SQL("set role {}").format(sql.Identifier(role)))

    # Submitting

    def submit(self, *events: Any) -> list[Answer]:
        return self.submit_json(events)

    def submit_json(self, document: Any) -> list[Answer]:
        rows = self.rows("select * from orchestrator.submit_events(%s)", Jsonb(document))
        return [Answer(n, None if uid is None else str(uid), *rest) for n, uid, *rest in rows]

    def schedule(self, **changes: Any) -> str:
        """Submits one event, which must be accepted, and returns its id."""
        [answer] = self.submit(event(**changes))
        assert answer.result == "accepted", answer
        assert answer.id is not None
        return answer.id

    def schedule_many(self, count: int, **changes: Any) -> list[str]:
        """Accepts `count` events that differ in their ids only."""
        answers = self.submit(*[event(**changes) for _ in range(count)])
        assert {answer.result for answer in answers} == {"accepted"}, answers
        return [str(answer.id) for answer in answers]

    # The life of a lease

    def claim(
        self,
        batch: int = 1000,
        *,
        worker: int = 0,
        lease_s: float = 60,
        lookahead_s: float = 0,
        skip: Sequence[int] = (),
        max_parallel: int | None = None,
    ) -> list[Lease]:
        rows = self.rows(
            """select * from orchestrator.claim_due_events(
              %s, %s, make_interval(secs => %s), make_interval(secs => %s), %s::integer[], %s)""",
            batch,
            worker,
            lease_s,
            lookahead_s,
            list(skip),
            max_parallel,
        )
        return [Lease(str(event_id), *rest) for event_id, *rest in rows]

    def claim_for_dispatch(
        self, batch: int = 1000, *, lookahead_s: float = 0, max_parallel: int | None = None
    ) -> tuple[list[Any], Any]:
        """What a dispatcher is given: rows for the leases, and the one that says what holds for the claim."""
        with self.connection.cursor(row_factory=namedtuple_row) as cursor:
            cursor.execute(
                "select * from orchestrator.claim_for_dispatch(%s, 0, '60 s', make_interval(secs => %s), '{}', %s)",
                (batch, lookahead_s, max_parallel),
            )
            rows: list[Any] = cursor.fetchall()
        *leases, last = rows
        assert last.event_id is None
        return leases, last

    def claim_again_at(self) -> datetime | None:
        """When, by the claim before, another makes sense; None: limits say nothing of it."""
        moment: datetime | None = self.value(
            "select to_timestamp(nullif(current_setting('orchestrator.claim_again_at', true), '')::float8)"
        )
        return moment

    def claim_on(self, batch: int = 1000, **how: Any) -> list[Lease]:
        """Claims as a dispatcher does: again at once while a claim that gave fewer says that there is more by now."""
        leases = self.claim(batch, **how)
        for _ in range(1000):
            again_at = self.claim_again_at()
            if len(leases) >= batch or again_at is None or again_at > self.value("select orchestrator.now()"):
                return leases
            leases += self.claim(batch - len(leases), **how)
        raise AssertionError(f"claims do not come to an end: the last one said {again_at}")

    def finish(self, given: Sequence[Result], *, worker: int = 0) -> list[Finish]:
        rows = self.rows(
            """select * from orchestrator.finish_events(%s::uuid[], %s::integer[], %s::text[], %s::integer[],
              %s::float8[], %s::float8[], %s::text[], %s::text[], %s::float8[], %s)""",
            *([list(column) for column in zip(*given, strict=True)] or [[]] * 9),
            worker,
        )
        return [Finish(str(event_id), *rest) for event_id, *rest in rows]

    def finish_as_dispatcher(
        self, leases: Iterable[Lease], given: Sequence[Result], *, worker: int = 0
    ) -> list[Finish]:
        """As `Leases.finish` does: deliveries at the first attempt in batches, however few, and then the others."""
        timers: dict[str, str] = dict(self.rows("select event_id::text, ctid::text from orchestrator.timer"))
        due = {(lease.event_id, lease.attempt): lease for lease in leases}
        plain = [
            Finished(
                each.event_id, 1, each.result, each.status_code, each.started_at or 0.0, each.finished_at or 0.0,
                None, None, None, each.started_at or 0.0,
                scheduled_at=f"{due[each.event_id, 1].scheduled_at:%Y-%m-%d %H:%M:%S.%f}+00",
                due_at=due[each.event_id, 1].due_at.timestamp(), timer=timers.get(each.event_id, "(0,1)"),
            )
            for each in sorted(given)
            if each.attempt == 1 and each.result == "delivered" and not each.error and not each.response
        ]  # fmt: skip
        missed: list[str] | None = [each.event_id for each in plain]
        if plain and (arguments := delivered_arguments(plain)) is not None:
            missed = self.value(FINISH_DELIVERED, *arguments, worker)
        recorded = {each.event_id for each in plain} - set(missed or ())
        rest = [each for each in given if each.attempt > 1 or each.event_id not in recorded]
        return self.finish(rest, worker=worker) if rest else []

    def release(self, leases: Iterable[Lease]) -> int:
        held = list(leases)
        released: int = self.value(
            "select orchestrator.release_events(%s::uuid[], %s::integer[])",
            [lease.event_id for lease in held],
            [lease.attempt for lease in held],
        )
        return released

    def cancel(self, event_id: str) -> list[Cancel]:
        return [
            Cancel(str(uid), *rest)
            for uid, *rest in self.rows("select * from orchestrator.cancel_event(%s::uuid)", event_id)
        ]

    def cancel_external(self, external_job_id: str) -> list[Cancel]:
        rows = self.rows("select * from orchestrator.cancel_event(p_external_job_id => %s)", external_job_id)
        return [Cancel(str(uid), *rest) for uid, *rest in rows]

    # Asking

    def get(self, event_id: str) -> Any:
        return self.value("select orchestrator.get_event(%s)", event_id)

    def status(self, event_id: str) -> str:
        status: str = self.value("select status from orchestrator.event_status where id = %s", event_id)
        return status

    def outcomes(self, event_id: str) -> list[tuple[int, str]]:
        """(attempt, result) of every outcome, in the order they were recorded."""
        rows = self.rows("select attempt, result from orchestrator.outcome where event_id = %s order by ctid", event_id)
        return [(attempt, result) for attempt, result in rows]

    def statistics(self) -> Any:
        return self.value("select orchestrator.statistics()")

    def totals(self) -> dict[str, int]:
        return {name: count for name, count in self.statistics()["totals"].items() if count}

    def wait_until_blocked(self, other: Client) -> None:
        """Returns when the other session waits for a lock."""
        wait_for(
            lambda: self.value(
                "select wait_event_type = 'Lock' and state = 'active' from pg_stat_activity where pid = %s", other.pid
            )
        )


def wait_for(condition: Callable[[], T], timeout_s: float = 10) -> T:
    """Calls `condition` until it returns something truthy, and returns that."""
    deadline = time.monotonic() + timeout_s
    while not (outcome := condition()):
        assert time.monotonic() < deadline, f"not true within {timeout_s} s"
        time.sleep(0.002)
    return outcome
