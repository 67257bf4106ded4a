"""`orchestrator demo`: events through all of the product, counted at the far end."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, NamedTuple, Self

import aiohttp
import uvloop

from orchestrator.dev.children import Children
from orchestrator.dev.demo_result import Result, result_of
from orchestrator.dev.environment import new_webhook_secret, without_settings
from orchestrator.dev.postgres import EmbeddedPostgres
from orchestrator.dev.system import free_port
from orchestrator.errors import OrchestratorError
from orchestrator.migrate import migrate

_BATCH = 500
_POSTING = 2
_SUBMITTED_PER_S = 5000  # a cautious guess, so that the last is submitted before the first is due
_LEAD_S = 1.5
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
    """How far the demo is: what it does, counts so far, and when the herd is due in Unix seconds."""

    stage: str
    submitted: int = 0
    delivered: int = 0
    herd_at: float | None = None


def demonstrate(plan: Plan, environ: Mapping[str, str], show: Callable[[Progress], None]) -> Result:
    """Runs the demo and cleans up behind it. A signal ends it early, with asyncio.CancelledError.

    Raises OrchestratorError when something does not start, dies on the way, or answers what it must not.
    """
    with ExitStack() as stack:
        show(Progress("starting PostgreSQL"))
        url = plan.database_url or stack.enter_context(EmbeddedPostgres.temporary()).ensure_database("demo")
        migrate(url)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_Demo(plan, url, environ, show).run())


class _Demo:
    def __init__(self, plan: Plan, url: str, environ: Mapping[str, str], show: Callable[[Progress], None]) -> None:
        self._plan = plan
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
        self._children = Children()
        self._scheduled: dict[str, float] = {}
        self._herd_at = 0.0

    async def run(self) -> Result:
        self._handle_signals()
        async with AsyncExitStack() as stack:
            self._show(Progress("starting the API, the dispatchers and the receiver"))
            receiver = await stack.enter_async_context(_Receiver(self._secret))
            stack.enter_context(self._children)
            port = free_port()
            self._children.start(["api"], self._environ | {"SERVER_PORT": str(port)})
            api = await stack.enter_async_context(aiohttp.ClientSession(f"http://127.0.0.1:{port}/"))
            await self._until_ready(api)
            await self._require_idle(api)
            await self._start_dispatchers()
            await self._submit(api, receiver.url)
            await self._until_delivered(receiver)
            await self._until_settled(api)
            report = await receiver.ask("report")
        if report["wrongly_signed"]:
            raise OrchestratorError(f"{report['wrongly_signed']:,} deliveries had no signature or a wrong one")
        return result_of(self._scheduled, self._herd_at, report["ids"], report["arrived_at"])

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

    async def _start_dispatchers(self) -> None:
        ports = [free_port() for _ in range(self._plan.dispatchers)]
        for port in ports:
            self._children.start(["dispatch"], self._environ | {"MANAGEMENT_SERVER_PORT": str(port)})
        for port in ports:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}/") as management:
                await self._until_ready(management)

    async def _until_ready(self, server: aiohttp.ClientSession) -> None:
        deadline_s = time.monotonic() + _START_S
        while time.monotonic() < deadline_s:
            self._children.check()
            with suppress(aiohttp.ClientError):
                async with server.get("ready") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(_POLL_S / 2)
        raise OrchestratorError(f"the stack was not ready after {_START_S:g} s")

    async def _require_idle(self, api: aiohttp.ClientSession) -> None:
        """The demo's dispatchers would deliver whatever is due there, signed with the demo's secret."""
        live = await _live(api)
        if live:
            raise OrchestratorError(
                f"--database-url: the demo would deliver what waits for delivery there (events: {live:,}); "
                "give it a database of its own"
            )

    async def _submit(self, api: aiohttp.ClientSession, destination: str) -> None:
        """Submits everything in batches, before the first is due."""
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
            for batch in _batches(list(zip(events, due, strict=True))):
                await room.acquire()
                task = posting.create_task(self._post(api, batch))
                task.add_done_callback(lambda _: room.release())

    async def _post(self, api: aiohttp.ClientSession, batch: list[tuple[dict[str, Any], float]]) -> None:
        async with api.post("api/v1/events/batch", json={"events": [event for event, _ in batch]}) as response:
            answer = await response.json(content_type=None)
        if response.status != 200 or answer["accepted"] != len(batch):
            raise OrchestratorError(f"the API did not accept a batch: {response.status} {json.dumps(answer)[:500]}")
        for (_, at), result in zip(batch, answer["results"], strict=True):
            self._scheduled[result["id"]] = at
        self._show(Progress("submitting", len(self._scheduled), 0, self._herd_at))

    async def _until_delivered(self, receiver: _Receiver) -> None:
        """Waits until as many have arrived as were submitted, or until nothing comes any more."""
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
        """Waits until every result is recorded: an event that is not might be delivered once more."""
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


def _batches(items: list[tuple[dict[str, Any], float]]) -> list[list[tuple[dict[str, Any], float]]]:
    return [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]


class _Receiver:
    """The receiver's process."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self.url = ""

    async def ask(self, command: str) -> dict[str, Any]:
        """Sends a line and reads the one it answers with."""
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
