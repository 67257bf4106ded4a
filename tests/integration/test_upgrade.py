"""Upgrading under load: programs of the version before and of this one work side by side on one database.

``tests/upgrade/previous.tar.xz`` is the version before, as ``git archive`` gives orchestrator/ (without bench/ and
dev/), sql/ and pyproject.toml; it runs with the packages of this one.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from orchestrator.database import Database
from orchestrator.database.maintenance import Retention
from orchestrator.database.migrate import check, migrate
from orchestrator.events.parsing import parse_submission
from orchestrator.settings import Settings
from tests.conftest import Spawn
from tests.support.dispatching import arrivals, assert_laws, soon
from tests.support.processes import ROOT, Spawned
from tests.support.receiver import Answer, Receiver
from tests.support.sql_client import Client
from tests.support.waiting import eventually

ARCHIVE = ROOT / "tests" / "upgrade" / "previous.tar.xz"

# A client of the version before, that stays: batches go on in the session that they began in. It prints the ids of what
# was accepted, a line a batch, until its standard input ends.
CLIENT = """
import asyncio, json, os, sys, traceback
from datetime import UTC, datetime, timedelta
from orchestrator.config import Settings
from orchestrator.database import Database
from orchestrator.events import parse_submission

def submission(hook, seconds):
    at = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
    fields = {"source": "client", "scheduled_at": at, "destination": hook, "payload": {"n": 1}, "max_retries": 3}
    return parse_submission(json.dumps(fields).encode(), settings)

async def main():
    stopped = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    async with Database(settings, role="api") as database:
        while not stopped.done():
            answers = await database.submit([submission(sys.argv[1], n / 4) for n in range(5)])
            assert {answer.result for answer in answers} == {"accepted"}, answers
            print(json.dumps([answer.id for answer in answers]), flush=True)
            await asyncio.sleep(0.03)

settings = Settings.from_env({"DATABASE_URL": sys.argv[2], "DB_POOL_MAX_SIZE": "1", "DB_POOL_MIN_IDLE": "1"})
try:
    asyncio.run(main())
except BaseException:
    traceback.print_exc()
    os._exit(1)  # without waiting for the end of its standard input
"""


class Previous:
    """The version before: its programs, on a database of this test's own."""

    def __init__(self, root: Path, environ: dict[str, str]) -> None:
        self.root = root
        self.environ = environ
        self._started: list[Spawned] = []
        self._clients: list[subprocess.Popen[str]] = []

    def spawn(self, *arguments: str, **given: str) -> Spawned:
        log = self.root / f"process-{len(self._started) + 1}.log"
        self._started.append(Spawned(arguments, self.environ | given, log, root=self.root))
        return self._started[-1]

    async def command(self, *arguments: str, stdin: str = "") -> str:
        """Runs a command, which must succeed; returns what it printed."""
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "orchestrator", *arguments],
            cwd=self.root,
            env={"PATH": os.environ["PATH"], "HOME": str(self.root)} | self.environ,
            input=stdin,
            text=True,
            capture_output=True,
            timeout=30,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    async def submit(self, *events: dict[str, Any]) -> list[str]:
        """Submits events by the command line, which must accept them; returns their ids."""
        told = json.loads(await self.command("submit", "-", "--json", stdin="\n".join(map(json.dumps, events))))
        assert told["accepted"] == len(events), told
        return [result["id"] for result in told["results"]]

    def client(self, hook: str) -> subprocess.Popen[str]:
        """Starts to submit, in one session, until `ids_of` ends it."""
        command = [sys.executable, "-c", CLIENT, hook, self.environ["DATABASE_URL"]]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._clients.append(subprocess.Popen(command, cwd=self.root, text=True, **pipes))  # type: ignore[call-overload]
        return self._clients[-1]

    async def ids_of(self, client: subprocess.Popen[str]) -> list[str]:
        """Ends a client, which must not have failed; returns what it has submitted."""
        printed, complaint = await asyncio.to_thread(client.communicate, timeout=20)
        assert client.returncode == 0, complaint
        return [identity for line in printed.splitlines() for identity in json.loads(line)]

    def discard(self) -> None:
        for process in self._started:
            process.discard()
        for client in self._clients:
            client.kill()
            client.communicate()


@pytest.fixture
def previous(
    empty_database_url: str, environ: Callable[..., dict[str, str]], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Previous]:
    with tarfile.open(ARCHIVE) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 is the first to know it
        archive.extractall(tmp_path)
    previous = Previous(tmp_path, environ(DATABASE_URL=empty_database_url))
    yield previous
    previous.discard()
    for log in tmp_path.glob("*.log"):
        request.node.add_report_section("teardown", f"log of the version before: {log.name}", log.read_text())


def states(client: Client) -> dict[str, str]:
    rows = client.rows("select id::text, status from orchestrator.event_status")
    return dict(rows)


async def test_old_and_new_programs_share_a_database_through_an_upgrade(
    previous: Previous, spawn: Spawn, receiver: Receiver
) -> None:
    url = previous.environ["DATABASE_URL"]
    assert "0003_destinations.sql" in await previous.command("migrate")
    with Client(url) as client:
        client.rows("insert into orchestrator.retry_policy (name, schedule) values ('slow', '{1 hour}')")
        hook = receiver.url("/hook")
        refused = receiver.script("/refused", Answer(410))
        fails = [receiver.script(f"/fails/{n}", Answer(503), Answer(204)) for n in range(4)]

        def event(name: str, destination: str = hook, at: datetime | None = None, **more: Any) -> dict[str, Any]:
            scheduled_at = (at or soon(0)).isoformat()
            return {"external_job_id": name, "source": "shop", "scheduled_at": scheduled_at,
                "destination": destination, "payload": {"name": name}, "max_retries": 3} | more  # fmt: skip

        # Every state that an event can be in, made by the old programs.
        [held] = await previous.submit(event("held"))
        assert client.column("select event_id::text from orchestrator.claim_due_events(1, 0, '1 hour')") == [held]
        old = previous.spawn("run", LOG_LEVEL="WARNING")
        await previous.command("destinations", "set", f"127.0.0.1:{receiver.port}", "--max-parallel", "20")
        slow: dict[str, Any] = {"retry_policy": "slow", "priority": 3}
        kept = await previous.submit(
            *(event(f"delivered {n}") for n in range(5)),
            *(event(f"dead {n}", refused) for n in range(3)),
            *(event(f"retrying {n}", fails[n], **slow) for n in range(3)),
            event("first of its key", fails[3], ordering_key="key", **slow),
            *(event(f"later of its key {n}", at=soon(1), ordering_key="key") for n in range(3)),
            *(event(f"scheduled {n}", at=soon(6), spread_seconds=1) for n in range(3)),
            *(event(f"cancelled {n}", at=soon(3600)) for n in range(3)),
            event("far", at=soon(20 * 86_400)),
        )
        names: dict[str, str] = dict(client.rows("select id::text, external_job_id from orchestrator.event"))
        for identity in kept:
            if names[identity].startswith("cancelled"):
                client.cancel(identity)
        submitting = previous.client(hook)
        retried = [identity for identity, name in names.items() if name.startswith(("retrying", "first"))]
        dead = [identity for identity, name in names.items() if name.startswith("dead")]
        settled = [i for i, name in names.items() if not name.startswith(("scheduled", "later"))]

        def reached() -> bool:
            found = states(client)
            assert {found[identity] for identity in retried} == {"retrying"}
            assert set(found.values()) >= {"scheduled", "retrying", "in_flight", "delivered", "dead", "cancelled"}
            return True

        await eventually(reached)
        assert submitting.poll() is None
        await receiver.wait_for(50, "/hook")

        # A new program does not start on the old schema.
        early = spawn("dispatch", DATABASE_URL=url)
        assert await early.wait() == 1
        assert "0004_life.sql" in early.log()
        assert "is missing; run: orchestrator migrate" in early.log()

        before = {identity: state for identity, state in states(client).items() if identity in settled}

        report = await asyncio.to_thread(migrate, url, retention=Retention(30, None, None, None))
        assert "schema/0004_life.sql" in report.applied
        assert check(url) == []

        assert {identity: state for identity, state in states(client).items() if identity in settled} == before
        assert client.value("select retention_days from orchestrator.control") == 30

        # Old programs go on with the new schema, those that were there and new ones.
        assert client.value("select orchestrator.release_events(%s::uuid[], '{1}')", [held]) == 1
        client.rows(
            "update orchestrator.timer set due_at = orchestrator.now() where event_id = any (%s::uuid[])", retried
        )
        await receiver.wait_for(len(receiver.received("/hook")) + 50, "/hook")
        another = previous.client(hook)
        new = spawn("dispatch", DATABASE_URL=url, LOG_LEVEL="WARNING")
        far = [identity for identity, name in names.items() if name.startswith("far")]
        told = await asyncio.gather(
            *(previous.command("cancel", identity) for identity in far),
            previous.command("get", dead[0], "--json"),
            previous.command("stats", "--json"),
            previous.command("maintain", "--json"),
        )
        assert json.loads(told[len(far)])["status"] == "dead"
        await receiver.wait_for(len(receiver.received("/hook")) + 50, "/hook")

        # By what they share, both programs have delivered since.
        workers = "select count(distinct worker) from orchestrator.outcomes where result = 'delivered'"
        await eventually(lambda: client.value(workers) == 2)
        ids = [held, *kept, *await previous.ids_of(submitting), *await previous.ids_of(another)]
        assert await old.stop() == 0
        await eventually(lambda: client.value("select count(*) from orchestrator.timer") == 0, 20)
        assert await new.stop() == 0

        ends = Counter(states(client).values())
        assert ends == {"delivered": len(ids) - 3 - 4, "dead": 3, "cancelled": 4}
        cancelled = {identity for identity, state in states(client).items() if state == "cancelled"}
        assert arrivals(receiver.requests) == {i: 2 if i in retried else 1 for i in ids if i not in cancelled}
        assert_laws(client, receiver.requests, ids)
        order = [json.loads(request.body)["name"] for request in receiver.requests if b"of its key" in request.body]
        assert order == ["first of its key"] * 2 + [f"later of its key {n}" for n in range(3)]
        for _ in range(2):
            counts = client.statistics()
            assert (counts["scheduled"], counts["retrying"], counts["in_flight"], counts["dead_letters"]) == (
                0,
                0,
                0,
                3,
            )
            assert client.totals() == {"accepted": len(ids), "retried": len(retried), **ends}
            client.rows("select orchestrator.run_maintenance()")
        assert client.value("select problems from orchestrator.maintenance_run order by run desc limit 1") == []


async def test_an_upgrade_keeps_ids_and_keeps_no_event_twice(previous: Previous) -> None:
    """Whichever version has submitted an event first, its id stays, and the other one's submission is a duplicate."""
    url = previous.environ["DATABASE_URL"]
    settings = Settings.from_env(previous.environ)
    await previous.command("migrate")

    def event(name: str, **more: Any) -> dict[str, Any]:
        return {"external_job_id": name, "source": "shop", "scheduled_at": due.isoformat(),
            "destination": "https://receiver.example/hook", "payload": {"name": name}} | more  # fmt: skip

    due = soon(3600)
    events = [event("plain"), event("keyed", ordering_key="client-7"), event("moved")]
    kept = await previous.submit(*events)
    await asyncio.to_thread(migrate, url)
    later = [*events, event("later"), event("later keyed", ordering_key="client-7")]
    async with Database(settings, role="api") as database:
        await database.cancel(kept[0])
        moved = await database.reschedule(kept[2], None, scheduled_at=soon(7200).isoformat())
        assert moved is not None
        assert moved.successor is not None
        for result in ("accepted", "duplicate"):
            answers = await database.submit([parse_submission(json.dumps(each).encode(), settings) for each in later])
            assert [(a.id, a.result, a.status) for a in answers[:3]] == [
                (kept[0], "duplicate", "cancelled"),
                (kept[1], "duplicate", "scheduled"),
                (kept[2], "duplicate", "rescheduled"),
            ]
            assert [answer.result for answer in answers[3:]] == [result] * 2
    told = await previous.command("submit", "-", "--json", stdin="\n".join(map(json.dumps, later)))
    assert (json.loads(told)["accepted"], json.loads(told)["duplicates"]) == (0, 5)
    with Client(url) as client:
        ids = client.column("select id::text from orchestrator.event order by id")
        assert ids == sorted([*kept, moved.successor, *(answer.id for answer in answers[3:])])
