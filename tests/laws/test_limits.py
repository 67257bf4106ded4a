"""Any history of limits, failures, pauses, moves of the clock and claims by several workers keeps what limits promise.

The histories and their model are in limits_machine.py; below them, real sessions at once on the real clock.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import LiteralString

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.laws.limits_machine import NAMES, RETRY_S, Histories
from tests.support.databases import Databases
from tests.support.laws import violations
from tests.support.sql_client import NOON, Client, Result, seconds, wait_for
from tests.support.sql_client import event as submission


@pytest.mark.hypothesis
@pytest.mark.timeout(300)
def test_every_history_keeps_the_limits(databases: Databases) -> None:
    with databases.migrated() as url, Client(url) as client:
        client.keep_three_days()
        for name, blocks in (("passing", False), ("blocking", True)):
            client.rows(
                "insert into orchestrator.retry_policy (name, jitter, schedule, dead_blocks) values (%s, 0, %s, %s)",
                name, [seconds(RETRY_S)], blocks,
            )  # fmt: skip
        hosts = [*NAMES[:2], _neighbour(client, NAMES[0])]
        run_state_machine_as_test(
            type("Machine", (Histories,), {"client": client, "hosts": hosts}),
            settings=settings(
                max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )


def _neighbour(client: Client, host: str) -> str:
    """Another host that shares its lane."""
    name: str = client.value(
        """select 'two-' || n || '.test' from generate_series(1, 1000) n
        where hashtextextended('two-' || n || '.test', 0) & 63 = hashtextextended(%s, 0) & 63 limit 1""",
        host,
    )
    return name


# Real sessions at once, on the real clock


class Fleet:
    """Threads that work until told to stop; an exception in one of them fails the test."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []
        self.stopping = threading.Event()

    def start(self, count: int, work: Callable[[Client, int], None]) -> None:
        """`work` is given a session of its own and a number from 1, again and again."""
        for number in range(1, count + 1):
            self._threads.append(threading.Thread(target=self._run, args=(work, number)))
            self._threads[-1].start()

    def _run(self, work: Callable[[Client, int], None], number: int) -> None:
        try:
            with Client(self._url) as client:
                while not self.stopping.is_set():
                    work(client, number)
        except BaseException as error:
            self._errors.append(error)
            self.stopping.set()

    def finish(self) -> None:
        self.stopping.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]


@contextmanager
def fleet(url: str) -> Iterator[Fleet]:
    working = Fleet(url)
    try:
        yield working
    finally:
        working.finish()


def _backlog(client: Client, host: str, count: int) -> None:
    client.rows(
        """select orchestrator.submit_events((
          select jsonb_agg(jsonb_build_object('source', 'tests', 'scheduled_at', to_json(now()) #>> '{}',
            'destination', 'https://' || %s || '/', 'payload', n)) from generate_series(1, %s) n))""",
        host, count,
    )  # fmt: skip


def test_eight_sessions_keep_a_rate_and_reach_it(database_url: str) -> None:
    rate, burst, run_s, ahead_s = 300, 20, 4.0, 0.2
    starts: list[float] = []
    asked: list[float] = []
    with Client(database_url) as client:
        client.rows("select orchestrator.configure_destination('one.example', %s, %s)", rate, burst)
        _backlog(client, "one.example", int(rate * run_s * 2))
    with fleet(database_url) as working:

        def work(client: Client, number: int) -> None:
            leases = client.claim(20, worker=number, lookahead_s=ahead_s)
            asked.append(time.monotonic())
            starts.extend(lease.start_at.timestamp() for lease in leases)
            client.finish([Result(lease.event_id, lease.attempt) for lease in leases], worker=number)
            if not leases:
                time.sleep(0.005)

        working.start(8, work)
        working.stopping.wait(run_s)
    starts.sort()
    asked.sort()
    # Slots that are due further ahead than claims look are lost while the machine lets nobody ask.
    stalled_s = sum(max(0.0, later - earlier - ahead_s) for earlier, later in itertools.pairwise(asked))
    for n in range(len(starts)):
        window = sum(at < starts[n] + 1.0 for at in starts[n:])
        assert window <= rate + burst, f"{window} in a second"
    warm_at = starts[0] + 1.0  # each session makes its plans first
    assert sum(at >= warm_at for at in starts) >= 0.95 * rate * (starts[-1] - warm_at - stalled_s)


def test_eight_sessions_never_exceed_a_bound_though_some_vanish(database_url: str) -> None:
    bound, run_s, lease_s, enough = 5, 4.0, 1.0, 200
    under_way: list[tuple[float, int]] = []
    with Client(database_url) as client:
        client.rows("select orchestrator.configure_destination('one.example', p_max_parallel => %s)", bound)
        _backlog(client, "one.example", 3000)
    with fleet(database_url) as working:

        def work(client: Client, number: int) -> None:
            leases = client.claim(3, worker=number, lease_s=lease_s, lookahead_s=0.2)
            if not leases:
                time.sleep(0.005)
            elif random.random() < 0.02:
                return  # these leases run out
            else:
                under_way.append((time.monotonic(), len(leases)))
                time.sleep(random.uniform(0, 0.01))
                under_way.append((time.monotonic(), -len(leases)))
                client.finish([Result(lease.event_id, lease.attempt) for lease in leases], worker=number)

        def watch(client: Client, _: int) -> None:
            leased = client.value("select count(*) from orchestrator.timer where lease_until > clock_timestamp()")
            assert leased <= bound
            time.sleep(0.01)

        working.start(8, work)
        working.start(1, watch)
        working.stopping.wait(run_s)
        # It does not stand still, however slow the machine is.
        wait_for(lambda: working.stopping.is_set() or sum(max(change, 0) for _, change in [*under_way]) > enough, 60)
    counts = list(itertools.accumulate(change for _, change in sorted(under_way)))
    assert max(counts) <= bound


def test_two_sessions_that_trip_a_breaker_at_once_open_it_once(database_url: str) -> None:
    # The observer is in no transaction: within one, the server would show the activity of its first question.
    with Client(database_url) as first, Client(database_url) as second, Client(database_url) as observer:
        first.rows("select orchestrator.configure_destination('one.example', p_breaker_failures => 3)")
        first.schedule_many(6, destination="https://one.example/", scheduled_at=datetime.now(NOON.tzinfo))
        leases = first.claim(6)
        assert len(leases) == 6
        results = [Result(lease.event_id, lease.attempt, "retry") for lease in leases]
        with ThreadPoolExecutor(1) as thread:
            with first.transaction():
                first.finish(results[:3])
                finishing = thread.submit(second.finish, results[3:])
                observer.wait_until_blocked(second)
            finishing.result(10)
        assert first.rows("select breaker, openings from orchestrator.lane where name = 'one.example'") == [("open", 1)]


def test_events_of_a_key_end_in_order_and_one_at_a_time_under_every_load(database_url: str) -> None:
    """Their times grow as they are submitted; claims, retries, releases and cancels go on all the while."""
    keys, each = 6, 60
    ended: defaultdict[str, list[int]] = defaultdict(list)
    holding: Counter[str] = Counter()
    lock = threading.Lock()
    submitted = Counter[int]()
    hosts = ["https://one.example/", "https://two.example/", "https://three.example/"]
    with Client(database_url) as client:
        client.rows("insert into orchestrator.retry_policy (name, jitter, schedule) values ('soon', 0, '{5 ms}')")
        client.rows("select orchestrator.configure_destination('one.example', p_max_parallel => 4)")
        client.rows("select orchestrator.configure_destination('two.example', 500, 50, p_breaker_failures => 0)")
        client.rows("select orchestrator.configure_destination('three.example', p_breaker_failures => 0)")

    def submit(client: Client, number: int) -> None:
        for key in range(number, keys + 1, 2):
            if submitted[key] < each:
                now = datetime.now(NOON.tzinfo)
                client.submit(
                    *[
                        submission(
                            source=f"key {key}", external_job_id=str(submitted[key] + n), ordering_key=f"key {key}",
                            scheduled_at=now + timedelta(microseconds=n), destination=random.choice(hosts),
                            retry_policy="soon", max_retries=100, priority=random.choice([0, 3]),
                        )
                        for n in range(3)
                    ]
                )  # fmt: skip
                submitted[key] += 3
        time.sleep(0.01)

    def work(client: Client, number: int) -> None:
        leases = client.claim(random.choice([2, 50]), worker=number)
        with lock:
            for lease in leases:
                holding[lease.source] += 1
                assert holding[lease.source] == 1, f"two of {lease.source} at a time"
        time.sleep(random.uniform(0, 0.004))
        kinds = random.choices(["delivered", "retry", "release"], [6, 2, 1], k=len(leases))
        with lock:
            for lease, kind in zip(leases, kinds, strict=True):
                holding[lease.source] -= 1
                if kind == "delivered":
                    ended[lease.source].append(int(lease.external_job_id or -1))
        client.finish(
            [
                Result(lease.event_id, lease.attempt, kind)
                for lease, kind in zip(leases, kinds, strict=True)
                if kind != "release"
            ],
            worker=number,
        )
        client.release([lease for lease, kind in zip(leases, kinds, strict=True) if kind == "release"])

    def cancel(client: Client, _: int) -> None:
        ids = client.column("select event_id from orchestrator.timer order by random() limit 1")
        for uid in ids:
            client.cancel(str(uid))
        time.sleep(0.02)

    def operate(client: Client, _: int) -> None:
        client.rows(random.choice(operations))
        time.sleep(0.02)

    operations: list[LiteralString] = [
        "select orchestrator.run_maintenance(1, 1)",
        "select orchestrator.configure_destination('*.example', p_max_parallel => 7, p_breaker_failures => 3)",
        "select orchestrator.configure_destination('three.example', 500, 50, 3)",
        "select orchestrator.delete_destination('*.example')",
        "select orchestrator.delete_destination('three.example')",
        "select orchestrator.pause_destination('two.example')",
        "select orchestrator.resume_destination('two.example')",
        "select orchestrator.close_breaker('*.example')",
    ]
    with fleet(database_url) as working, Client(database_url) as client:
        working.start(2, submit)
        working.start(4, work)
        working.start(1, cancel)
        working.start(1, operate)
        wait_for(lambda: working.stopping.is_set() or min(submitted[key] for key in range(1, keys + 1)) >= each, 20)
        operations[:] = ["select orchestrator.resume_destination('two.example')"]
        wait_for(lambda: working.stopping.is_set() or not client.value("select count(*) from orchestrator.timer"), 20)
    with Client(database_url) as client:
        assert violations(client.connection, finished=True) == []
    assert len(ended) == keys
    for key, order in ended.items():
        assert order == sorted(order), f"{key} was delivered out of order"
