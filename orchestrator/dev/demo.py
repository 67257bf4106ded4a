"""`orchestrator demo`: events go through the whole system, and the receiver counts them."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import math
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, NamedTuple, Self

import aiohttp
import uvloop

from orchestrator.database.migrate import migrate
from orchestrator.dev import kafka_wheel
from orchestrator.dev.child_processes import ChildProcesses
from orchestrator.dev.demo_result import Result, result_of
from orchestrator.dev.environment import new_webhook_secret, without_settings
from orchestrator.dev.kafka import WheelBroker
from orchestrator.dev.operating_system import free_port
from orchestrator.dev.postgres import EmbeddedPostgres
from orchestrator.errors import OrchestratorError
from orchestrator.kafka.topics import create_topics
from orchestrator.settings import Settings

_BATCH = 500
_POSTING = 2
_SUBMITTED_PER_S = 5000  # a cautious guess, so that the last is submitted before the first is due
_LEAD_S = 1.5
_SESSION_MS = "2000"  # the broker of the wheel gives a group its partitions only after about this time
_START_S = 30.0
_STALLED_S = 30.0
_SETTLE_S = 10.0
_POLL_S = 0.1
_REPORT_BYTES = 1 << 30


class Plan(NamedTuple):
    """What the demo does: half of `events` are due at one instant, the others spread over `spread_s`."""

    events: int
    spread_s: float
    dispatchers: int
    database_url: str | None


class Progress(NamedTuple):
    """The progress of the demo: its stage, counts so far, and when the herd is due in Unix seconds."""

    stage: str
    submitted: int = 0
    delivered: int = 0
    herd_at: float | None = None


def demonstrate(plan: Plan, environ: Mapping[str, str], show: Callable[[Progress], None]) -> Result:
    """Runs the demo and cleans up behind it. A signal ends it early, with asyncio.CancelledError.

    Raises OrchestratorError if a process does not start, ends early, or gives a wrong answer.
    """
    with ExitStack() as stack:
        show(Progress("starting PostgreSQL and a broker"))
        url = plan.database_url or stack.enter_context(EmbeddedPostgres.temporary()).ensure_database("demo")
        migrate(url)
        kafka = None if kafka_wheel.unavailable() else stack.enter_context(WheelBroker()).environ
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_Demo(plan, url, kafka, environ, show).run())


class _Demo:
    """Half of the events go through Kafka, if there is a broker: through an API with Kafka, and an ingester."""

    def __init__(
        self,
        plan: Plan,
        url: str,
        kafka: Mapping[str, str] | None,
        environ: Mapping[str, str],
        show: Callable[[Progress], None],
    ) -> None:
        self._plan = plan
        self._kafka = kafka
        self._show = show
        self._secret = new_webhook_secret()
        self._environ = without_settings(environ) | {
            "DATABASE_URL": url,
            "DEPLOYMENT_NAME": "demo",
            "SERVER_HOST": "127.0.0.1",
            "HTTP_ALLOW_NETWORKS": "127.0.0.1",
            "WEBHOOK_SECRETS": self._secret,
            "LOG_LEVEL": "WARNING",
            "LOG_FORMAT": "console",
        }
        self._children = ChildProcesses()
        self._scheduled: dict[str, float] = {}
        self._through_kafka = 0
        self._herd_at = 0.0

    async def run(self) -> Result:
        self._handle_signals()
        async with AsyncExitStack() as stack:
            self._show(Progress("starting the APIs, the dispatchers and the receiver"))
            receiver = await stack.enter_async_context(_Receiver(self._secret))
            stack.enter_context(self._children)
            api = await stack.enter_async_context(self._start_api({}))
            apis = [api]
            if self._kafka is not None:
                await create_topics(Settings.from_env({**self._environ, **self._kafka}))
                apis.append(await stack.enter_async_context(self._start_api(self._kafka)))
            for each in apis:
                await self._until_ready(each)
            await self._require_idle(api)
            await self._start_workers()
            await self._submit(apis, receiver.url)
            await self._until_delivered(receiver)
            await self._until_settled(api)
            report = await receiver.ask("report")
        if report["wrongly_signed"]:
            raise OrchestratorError(f"{report['wrongly_signed']:,} deliveries had no signature or a wrong one")
        result = result_of(self._scheduled, self._herd_at, report["ids"], report["arrived_at"])
        return dataclasses.replace(result, through_kafka=self._through_kafka)

    def _handle_signals(self) -> None:
        """The first signal cancels the demo; while it cleans up, more of them change nothing."""
        task = asyncio.current_task()
        assert task is not None
        pending = [task]

        def cancel() -> None:
            if pending:
                pending.pop().cancel()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, cancel)

    def _start_api(self, given: Mapping[str, str]) -> aiohttp.ClientSession:
        port = free_port()
        self._children.start(["api"], {**self._environ, **given, "SERVER_PORT": str(port)})
        return aiohttp.ClientSession(f"http://127.0.0.1:{port}/")

    async def _start_workers(self) -> None:
        """The dispatchers and, if there is Kafka, an ingester."""
        if self._kafka is not None:
            ingester = self._start_worker("ingest", {**self._kafka, "KAFKA_SESSION_TIMEOUT_MS": _SESSION_MS})
        dispatchers = [self._start_worker("dispatch", {}) for _ in range(self._plan.dispatchers)]
        for worker in dispatchers:
            async with worker:
                await self._until_ready(worker)
        if self._kafka is not None:
            async with ingester:
                topic = Settings.from_env(self._environ).topic_submission
                await self._until(ingester, "metrics", f'partition="0",topic="{topic}"')  # it has the partition

    def _start_worker(self, role: str, given: Mapping[str, str]) -> aiohttp.ClientSession:
        """Starts it, and returns a client of its management port."""
        port = free_port()
        self._children.start([role], {**self._environ, **given, "MANAGEMENT_SERVER_PORT": str(port)})
        return aiohttp.ClientSession(f"http://127.0.0.1:{port}/")

    async def _until_ready(self, server: aiohttp.ClientSession) -> None:
        await self._until(server, "ready", "")

    async def _until(self, server: aiohttp.ClientSession, path: str, text: str) -> None:
        """Waits until the server answers with 200 and a text that contains `text`."""
        deadline_s = time.monotonic() + _START_S
        while time.monotonic() < deadline_s:
            self._children.check()
            with suppress(aiohttp.ClientError):
                async with server.get(path) as answer:
                    if answer.status == 200 and text in await answer.text():
                        return
            await asyncio.sleep(_POLL_S / 2)
        raise OrchestratorError(f"the stack was not ready after {_START_S:g} s")

    async def _require_idle(self, api: aiohttp.ClientSession) -> None:
        """The demo's dispatchers would deliver all events that are due there, signed with the demo's secret."""
        live = await _live(api)
        if live:
            raise OrchestratorError(
                f"--database-url: the demo would deliver the events that wait there ({live:,}); "
                "give it a database of its own"
            )

    async def _submit(self, apis: Sequence[aiohttp.ClientSession], destination: str) -> None:
        """Submits all events in batches, alternately to each API, before the first is due."""
        count, spread_s = self._plan.events, self._plan.spread_s
        first_at = time.time() + _LEAD_S + count / _SUBMITTED_PER_S
        self._herd_at = float(math.ceil(first_at + spread_s / 2))
        others = count // 2
        due = [self._herd_at] * (count - others)
        due += [round(first_at + spread_s * n / max(1, others - 1), 6) for n in range(others)]
        run = secrets.token_hex(4)
        events = [
            {
                "source": "demo",
                "external_job_id": f"{run}-{number}",
                "scheduled_at": datetime.fromtimestamp(at, UTC).isoformat(),
                "destination": f"{destination}/demo",
                "payload": {"number": number, "of": count},
            }
            for number, at in enumerate(due)
        ]
        room = asyncio.Semaphore(_POSTING)
        async with asyncio.TaskGroup() as posting:
            size = min(_BATCH, math.ceil(count / len(apis)))
            for batch, api in zip(_batches(list(zip(events, due, strict=True)), size), itertools.cycle(apis)):
                await room.acquire()
                task = posting.create_task(self._post(api, batch))
                task.add_done_callback(lambda _: room.release())

    async def _post(self, api: aiohttp.ClientSession, batch: list[tuple[dict[str, Any], float]]) -> None:
        async with api.post("api/v1/events/batch", json={"events": [event for event, _ in batch]}) as response:
            answer = await response.json(content_type=None)
        if response.status not in (200, 202) or answer["accepted"] != len(batch):
            raise OrchestratorError(f"the API did not accept a batch: {response.status} {json.dumps(answer)[:500]}")
        for (_, at), result in zip(batch, answer["results"], strict=True):
            self._scheduled[result["id"]] = at
            self._through_kafka += response.status == 202
        self._show(Progress("submitting", len(self._scheduled), 0, self._herd_at))

    async def _until_delivered(self, receiver: _Receiver) -> None:
        """Waits until as many events have arrived as were submitted, or until no more arrive."""
        last_due = max(self._scheduled.values())
        arrived = 0
        patience_ends = last_due + _STALLED_S
        while time.time() < patience_ends:
            self._children.check()
            before, arrived = arrived, (await receiver.ask("count"))["count"]
            self._show(Progress("delivering", len(self._scheduled), arrived, self._herd_at))
            if arrived >= len(self._scheduled):
                return
            if arrived > before:
                patience_ends = max(last_due, time.time()) + _STALLED_S
            await asyncio.sleep(_POLL_S)

    async def _until_settled(self, api: aiohttp.ClientSession) -> None:
        """Waits until every result is recorded: an event without a result might be delivered once more."""
        deadline_s = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline_s:
            if not await _live(api):
                return
            await asyncio.sleep(_POLL_S)


async def _live(api: aiohttp.ClientSession) -> int:
    async with api.get("api/v1/events/statistics") as response:
        response.raise_for_status()
        found = await response.json()
    return int(found["scheduled"] + found["retrying"] + found["in_flight"])


def _batches(items: list[tuple[dict[str, Any], float]], size: int) -> list[list[tuple[dict[str, Any], float]]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


class _Receiver:
    """The receiver's process."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self.url = ""

    async def ask(self, command: str) -> dict[str, Any]:
        """Sends a line and reads the line of the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n".encode())
        await self._process.stdin.drain()
        line = await self._process.stdout.readline()
        if not line:
            raise OrchestratorError("the receiver ended unexpectedly")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "orchestrator.dev.receiver",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=_REPORT_BYTES,
        )
        try:
            port = (await self.ask(json.dumps({"secrets": [self._secret]})))["port"]
        except BaseException:
            self._process.kill()
            await self._process.wait()
            raise
        self.url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Its end; also when a cancelled `ask` has left half a line behind.
        self._process.kill()
        await self._process.wait()
