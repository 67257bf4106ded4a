"""The restore drill: under load, the server is lost with its disk; what is restored goes on, and keeps the laws.

The API, an ingester and a dispatcher keep running through it, with what they remember of a future that was undone.
Prints RPO, the seconds before the crash of which submissions that the API had acknowledged are lost, and RTO, the
seconds from the start of the restore until the first delivery: `pytest tests/drills/test_restore_drill.py`.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Set
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import httpx
import pytest

from orchestrator.database.migrate import migrate
from orchestrator.dev.operating_system import free_port
from orchestrator.dev.postgres import EmbeddedPostgres
from orchestrator.dev.postgres_install import find_installation
from tests.conftest import Spawn
from tests.integration.api_support import status, until
from tests.integration.api_support import submission as body
from tests.support.backups import DATABASE, Site, site
from tests.support.brokers import Kafka
from tests.support.databases import temporary_server
from tests.support.dispatching import arrivals, soon, statuses
from tests.support.ingesting import Topic, producing
from tests.support.ingesting import submission as record
from tests.support.laws import violations
from tests.support.processes import Spawned
from tests.support.receiver import HANG, Answer, Receiver
from tests.support.sql_client import Client
from tests.support.waiting import eventually

Tell = Callable[[str], None]

_PAUSE_S = 0.02
_DRAINED_S = 120.0


@pytest.fixture
def lost() -> Iterator[Site]:
    """A site that will be lost; it archives every second."""
    with site(archive_timeout="1s") as made:
        yield made


@pytest.fixture
async def topic(kafka: Kafka) -> Topic:
    return await Topic.new(kafka)


class Load:
    """Submissions over HTTP and Kafka, due soon, until the block of `loading` ends. Times are Unix seconds."""

    def __init__(self, http: httpx.AsyncClient, topic: Topic, destination: str) -> None:
        self._http = http
        self._topic = topic
        self._destination = destination
        self.accepted: dict[str, float] = {}
        """When the API acknowledged each event, by its id."""
        self.asked: dict[str, float] = {}
        """When it was asked to keep each event, by its id."""
        self.produced: dict[str, float] = {}
        """When Kafka acknowledged each record, by its external_job_id."""
        self._tasks: list[asyncio.Task[None]] = []

    async def post(self, name: str, at: datetime, destination: str | None = None) -> str | None:
        """The id of the event; None if the API did not take it."""
        asked = body(external_job_id=name, scheduled_at=at.isoformat(), destination=destination or self._destination)
        began_s = time.time()
        answer = await self._http.post("/api/v1/events", json=asked)
        if answer.status_code != 201:
            assert answer.status_code == 503, answer.text
            return None
        uid: str = answer.json()["id"]
        self.asked[uid], self.accepted[uid] = began_s, time.time()
        return uid

    async def _posting(self, poster: int) -> None:
        n = 0
        while True:
            n += 1
            await self.post(f"posted-{poster}-{n}", soon(0.5))
            await asyncio.sleep(_PAUSE_S)

    async def _producing(self) -> None:
        async with producing(self._topic) as producer:
            n = 0
            while True:
                n += 1
                at = soon(0.5)
                value = record(n, scheduled_at=at.isoformat(), destination=self._destination)
                await producer.send_and_wait(self._topic.name, value, partition=n % 4)
                self.produced[f"job-{n}"] = time.time()
                await asyncio.sleep(_PAUSE_S)

    def start(self) -> None:
        self._tasks = [asyncio.create_task(work) for work in (self._posting(1), self._posting(2), self._producing())]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            assert isinstance(outcome, asyncio.CancelledError), outcome
        self._tasks = []


class Roles:
    """The processes of the product, on one URL."""

    def __init__(self, spawn: Spawn, url: str, topic: Topic) -> None:
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        env = {"DATABASE_URL": url, "SCHEDULER_LEASE_SECONDS": "15", "HTTP_TIMEOUT_SECONDS": "5"}
        self._env = env | topic.environ
        self._spawn = spawn
        self.api = spawn("api", SERVER_PORT=str(port), **env)
        self.ingest = spawn("ingest", **self._env)
        self.dispatch = self.dispatcher()

    def dispatcher(self) -> Spawned:
        return self._spawn("dispatch", **{name: self._env[name] for name in list(self._env)[:3]})

    def all_run(self) -> bool:
        return all(process.returncode is None for process in (self.api, self.ingest, self.dispatch))


@asynccontextmanager
async def loading(roles: Roles, topic: Topic, receiver: Receiver) -> AsyncIterator[Load]:
    async with httpx.AsyncClient(base_url=roles.address, timeout=60, trust_env=False) as http:

        async def ready() -> bool:
            return await status(http, "/ready") == 200

        await until(ready, 60)
        load = Load(http, topic, receiver.url())
        load.start()
        try:
            yield load
        finally:
            await load.stop()


async def grown(load: Load, receiver: Receiver, by: int = 40) -> None:
    """Returns when so many more have been submitted in each way, and delivered."""
    count = len(load.accepted) + by, len(load.produced) + by, len(receiver.requests) + by
    await eventually(
        lambda: (
            len(load.accepted) >= count[0] and len(load.produced) >= count[1] and len(receiver.requests) >= count[2]
        ),
        60,
    )


async def judge(
    client: Client, load: Load, receiver: Receiver, roles: Roles, cancelled: Set[str] = frozenset()
) -> set[str]:
    """Nothing is early or doubled, and nothing is lost but the ids that it returns, which the API had acknowledged."""
    jobs = "select external_job_id from orchestrator.event where source = 'tests'"
    await eventually(lambda: set(client.column(jobs)) >= set(load.produced), _DRAINED_S)
    await eventually(lambda: client.value("select count(*) from orchestrator.timer") == 0, _DRAINED_S)
    found = client.column(jobs)
    assert len(found) == len(set(found)), "records became several events"
    kept = set(client.column("select id::text from orchestrator.event"))
    gone = set(load.accepted) - kept
    assert violations(client.connection, acknowledged=kept, finished=True) == []
    assert client.totals()["accepted"] == len(kept)
    ended = statuses(client, kept)
    assert ended["delivered"] == len(kept - cancelled), ended
    arrived = arrivals(receiver.requests)
    assert set(arrived) & kept == kept - cancelled
    due: dict[str, datetime] = dict(client.rows("select id::text, scheduled_at from orchestrator.event"))
    early = [
        request.headers["webhook-id"]
        for request in receiver.requests
        if request.headers["webhook-id"] in due
        and datetime.fromtimestamp(request.arrived_at, UTC) < due[request.headers["webhook-id"]]
    ]
    assert early == []
    assert roles.all_run()
    return gone


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Tell:
    """Prints a line where the user sees it."""

    def show(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n{line}\n")

    return show


async def first_delivery_after(receiver: Receiver, began: float) -> float:
    def arrived() -> float | None:
        return next((request.arrived_at for request in receiver.requests if request.arrived_at > began), None)

    found = await eventually(arrived, 120)
    assert found is not None
    return found


async def test_a_lost_server_is_restored_to_the_latest_moment_under_load(
    lost: Site, spawn: Spawn, topic: Topic, receiver: Receiver, tell: Tell
) -> None:
    await asyncio.to_thread(lost.made, "base-backup")
    roles = Roles(spawn, lost.url, topic)
    async with loading(roles, topic, receiver) as load:
        await grown(load, receiver)
        await asyncio.to_thread(lost.made, "base-backup")
        await grown(load, receiver, by=150)
        crashed_s = time.time()
        await asyncio.to_thread(lost.lose)
        before = len(load.produced)
        await eventually(lambda: len(load.produced) > before)  # Kafka takes on
        began_s = time.time()
        server = await asyncio.to_thread(lost.restore, "latest")
        delivered_s = await first_delivery_after(receiver, began_s)
        await grown(load, receiver)
        await load.stop()
        with Client(server.url(DATABASE)) as client:
            gone = await judge(client, load, receiver, roles)
    assert [uid for uid in gone if load.asked[uid] > began_s] == []
    rpo_s = crashed_s - min((load.accepted[uid] for uid in gone), default=crashed_s)
    tell(
        f"restored to the latest moment: RPO {rpo_s:.1f} s of direct submissions ({len(gone)} of {len(load.accepted)}"
        f" lost), 0 s of {len(load.produced)} records of Kafka; RTO {delivered_s - began_s:.1f} s"
    )
    assert rpo_s < 30


async def test_a_server_is_restored_to_a_moment_while_processes_remember_what_came_after_it(
    lost: Site, spawn: Spawn, topic: Topic, receiver: Receiver, tell: Tell
) -> None:
    held = receiver.script("/held", HANG, Answer())
    await asyncio.to_thread(lost.made, "base-backup")
    roles = Roles(spawn, lost.url, topic)
    async with loading(roles, topic, receiver) as load:
        await grown(load, receiver)
        taken = await load.post("taken back", soon(3600))
        under_way = await load.post("held", soon(2), held)
        assert taken is not None
        assert under_way is not None
        with Client(lost.url) as client:
            moment = client.value("select clock_timestamp()::text")
            moment_s = client.value("select extract(epoch from clock_timestamp())::float8")
            client.rows("select orchestrator.cancel_event(%s)", taken)
            future_offsets = "select sum(next_offset) from orchestrator.ingest_offset"
            await grown(load, receiver)
            await receiver.wait_for(1, "/held", 60)  # its lease is from a time that will not have been
            ahead = client.value(future_offsets)
        await asyncio.to_thread(lost.archive_all)
        crashed_s = time.time()
        await asyncio.to_thread(lost.lose)
        began_s = time.time()
        server = await asyncio.to_thread(lost.restore, moment)
        with Client(server.url(DATABASE)) as client:
            assert client.value("select timeline_id from pg_control_checkpoint()") == 1 + 1
        delivered_s = await first_delivery_after(receiver, began_s)
        second = roles.dispatcher()
        await grown(load, receiver)
        await load.stop()
        with Client(server.url(DATABASE)) as client:
            # What was cancelled after the moment would be delivered, unless it is cancelled again.
            assert statuses(client, [taken]) == {"scheduled": 1}
            client.rows("select orchestrator.cancel_event(%s)", taken)
            gone = await judge(client, load, receiver, roles, cancelled={taken})
            assert client.value(future_offsets) > ahead
        assert second.returncode is None
    # These were kept after the moment, and before the restored server took over.
    assert [uid for uid in gone if load.accepted[uid] < moment_s or load.asked[uid] > began_s] == []
    assert {uid for uid in load.asked if load.asked[uid] > moment_s and load.accepted[uid] < crashed_s} - gone == set()
    assert len(receiver.received("/held")) >= 2
    again = [uid for uid, count in arrivals(receiver.requests).items() if count > 1]
    assert len(again) > 1
    tell(
        f"restored to a moment {began_s - moment_s:.1f} s earlier: {len(gone)} direct submissions after it are gone,"
        f" {len(again)} events were delivered again; RTO {delivered_s - began_s:.1f} s"
    )


async def test_a_dump_restored_into_an_empty_cluster_goes_on(
    lost: Site, spawn: Spawn, topic: Topic, receiver: Receiver, younger: EmbeddedPostgres, tell: Tell
) -> None:
    roles = Roles(spawn, lost.url, topic)
    async with loading(roles, topic, receiver) as load:
        await grown(load, receiver)
        dumping_s = time.time()
        dump = await asyncio.to_thread(lost.made, "dump")
        await grown(load, receiver)
        crashed_s = time.time()
        await load.stop()
        for process in (roles.api, roles.ingest, roles.dispatch):
            await process.kill()
        await asyncio.to_thread(lost.lose)
        began_s = time.time()
        url = younger.ensure_database(DATABASE)
        programs = find_installation().bin_dir
        command = [f"{programs}/pg_restore", "--no-owner", "--no-acl", "--exit-on-error", "-j2", "-d", url, str(dump)]
        await asyncio.to_thread(subprocess.check_call, command)
        await asyncio.to_thread(migrate, url)
        later = Roles(spawn, url, topic)
        delivered_s = await first_delivery_after(receiver, began_s)
        with Client(url) as client:
            gone = await judge(client, load, receiver, later)
            assert client.value("select last_success from orchestrator.backups() where kind = 'logical'") is None
    assert {uid for uid in gone if load.accepted[uid] < dumping_s} == set()
    assert gone
    tell(
        f"restored from a dump: RPO {crashed_s - dumping_s:.1f} s of direct submissions ({len(gone)} of"
        f" {len(load.accepted)} lost), 0 s of {len(load.produced)} records of Kafka; RTO {delivered_s - began_s:.1f} s"
    )


@pytest.fixture
def younger() -> Iterator[EmbeddedPostgres]:
    with temporary_server() as server:
        yield server


async def test_a_server_restored_aside_leaves_the_other_one_and_its_archive_alone(lost: Site) -> None:
    await asyncio.to_thread(lost.made, "base-backup")
    with Client(lost.url) as client:
        uid = client.schedule()
        await asyncio.to_thread(lost.archive_all)
        before = sorted(path.name for path in (lost.root / "wal").glob("0*"))
        aside = await asyncio.to_thread(lost.restore, "latest", "--aside")
        with Client(aside.url(DATABASE)) as other:
            assert statuses(other, [uid]) == {"scheduled": 1}
            assert other.value("show archive_mode") == "off"
            other.rows("select pg_switch_wal()")
        assert client.value("select pg_is_in_recovery()") is False
    assert [path.name for path in (lost.root / "wal").iterdir() if path.name.startswith("00000002")] == []
    assert set(before) <= {path.name for path in (lost.root / "wal").iterdir()}


async def test_a_restored_server_can_be_backed_up_and_restored_again(lost: Site) -> None:
    await asyncio.to_thread(lost.made, "base-backup")
    with Client(lost.url) as client:
        first = client.schedule(external_job_id="first")
        ended = client.value("select date_trunc('second', clock_timestamp())::text")
        # A backup is named for the next full second, and serves from then on.
        passed = f"select clock_timestamp() > '{ended}'::timestamptz + interval '1 s'"
        await eventually(lambda: client.value(passed))
        moment = client.value("select clock_timestamp()::text")
        client.schedule(external_job_id="undone")
    await asyncio.to_thread(lost.archive_all)
    await asyncio.to_thread(lost.lose)
    server = await asyncio.to_thread(lost.restore, moment)
    url = server.url(DATABASE)
    with Client(url) as client:
        second = client.schedule(external_job_id="second")
    await asyncio.to_thread(lost.made, "base-backup", DATABASE_URL=url)
    with Client(url) as client:
        third = client.schedule(external_job_id="third")
        client.rows("select pg_switch_wal()")
        archived = "select last_archived_wal from pg_stat_archiver"
        last = client.value("select pg_walfile_name(pg_current_wal_lsn() - 1)")
        await eventually(lambda: client.value(archived) >= last, 30)
    await asyncio.to_thread(lost.made, "verify", DATABASE_URL=url)
    await asyncio.to_thread(server.stop)
    again = await asyncio.to_thread(lost.restore, "latest")
    with Client(again.url(DATABASE)) as client:
        assert client.value("select timeline_id from pg_control_checkpoint()") == 3
        assert sorted(client.column("select id::text from orchestrator.event")) == sorted([first, second, third])
