"""One run of ``orchestrator smoke``, step by step."""

from __future__ import annotations

import asyncio
import json
import os
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestrator.errors import OrchestratorError, first_line

if TYPE_CHECKING:
    import aiohttp

    from orchestrator.dev.receiver import Webhook

KEY_VARIABLE = "ORCHESTRATOR_API_KEY"

_REQUEST_S = 10.0
_CLEAN_UP_S = 5.0
_PAUSE_S = 0.1
_PATH = "/orchestrator-smoke"
_UNDER_WAY = ("scheduled", "in_flight", "retrying")
_OVERDUE = (
    "deliveries are paused, no dispatcher runs, or it is far behind; orchestrator doctor, with the settings of the "
    "deployment, says which"
)


class _Failure(OrchestratorError):  # noqa: N818  # what smoke reports, not a fault of its own
    """A step that did not do what it should; the text is the reason."""


class Step(NamedTuple):
    step: str
    ok: bool
    ms: float
    detail: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to test, and how. Without `destination` this command receives the event itself, at `callback`."""

    url: str
    management_url: str
    listen: tuple[str, int]
    callback: str | None
    destination: str | None
    topic: str | None
    due_in_s: float
    timeout_s: float
    key: str | None = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)
    ca_file: Path | None


async def run_smoke(plan: Plan, tell: Callable[[Step], None]) -> str | None:
    """Why it failed; None when all is well. `tell` gets each step when it has ended."""
    try:
        async with _session(plan) as session, AsyncExitStack() as receiving:
            run = _Smoke(plan, tell, session)
            try:
                await run.work(receiving)
            finally:
                await run.clean_up()
    except _Failure as failure:
        return str(failure)
    return None


class _Smoke:
    """One run, step by step; each raises _Failure."""

    def __init__(self, plan: Plan, tell: Callable[[Step], None], session: aiohttp.ClientSession) -> None:
        self._plan = plan
        self._tell = tell
        self._session = session
        self._receives = plan.destination is None and plan.topic is None
        self._target: dict[str, Any] = {"destination": plan.destination}
        if plan.topic is not None:
            self._target = {"delivery_type": "KAFKA", "destination": plan.topic}
        self._name = f"smoke-{os.urandom(6).hex()}"
        self._open: list[str] = []  # ids of events that may still be delivered
        self._arrived: dict[str, Webhook] = {}
        self._due_at = datetime.now(UTC)
        self._why = "no reason is recorded"

    async def work(self, receiving: AsyncExitStack) -> None:
        """Takes every step. What it receives with ends with `receiving`."""
        await self._step("health", self._health)
        await self._step("ready", self._ready)
        if self._receives:
            self._target = {"destination": await receiving.enter_async_context(self._receiver())}
        await self._step("submit", self._submit)
        await self._step("deliver", self._deliver)
        await self._step("signature", self._signature)
        await self._step("status", self._status)
        await self._step("cancel", self._cancel)
        await self._step("metrics", self._metrics)

    async def _step(self, name: str, work: Callable[[], Awaitable[str]]) -> None:
        began = time.perf_counter()

        def told(ok: bool, detail: str) -> None:
            self._tell(Step(name, ok, round((time.perf_counter() - began) * 1000, 1), detail))

        try:
            detail = await work()
        except OrchestratorError as failure:
            told(False, str(failure))
            raise _Failure(f"{name}: {failure}") from None
        told(True, detail)

    async def _health(self) -> str:
        await self._answer("GET", f"{self._plan.management_url}/health", 200)
        return f"{self._plan.management_url}/health answers"

    async def _ready(self) -> str:
        await self._answer("GET", f"{self._plan.management_url}/ready", 200)
        return "the database takes writes"

    async def _submit(self) -> str:
        plan = self._plan
        self._due_at = datetime.now(UTC) + timedelta(seconds=plan.due_in_s)
        expires_at = self._due_at + timedelta(seconds=plan.timeout_s + _CLEAN_UP_S)
        self._delivered_id = await self._submitted(self._name, self._due_at, expires_at)
        return f"event {self._delivered_id} is due in {plan.due_in_s:g} s"

    async def _submitted(self, name: str, scheduled_at: datetime, expires_at: datetime) -> str:
        event = {
            "source": "smoke",
            "external_job_id": name,
            "payload": {"smoke": self._name},
            "max_retries": 0,
            "scheduled_at": scheduled_at.isoformat(),
            "expires_at": expires_at.isoformat(),
            **self._target,
        }
        answer = await self._answer("POST", f"{self._plan.url}/api/v1/events", (200, 201, 202), event)
        identity = answer.get("id")
        if not isinstance(identity, str):
            raise _Failure(f"{self._plan.url} is not this product's API: its answer has no id")
        self._open.append(identity)
        return identity

    async def _deliver(self) -> str:
        """Waits for the event at our own receiver, or until the API says that another has taken it."""
        deadline = self._due_at + timedelta(seconds=self._plan.timeout_s)
        while True:
            if (webhook := self._arrived.get(self._delivered_id)) is not None:
                late_ms = (webhook.arrived_at - self._due_at.timestamp()) * 1000
                return f"arrived {late_ms:.0f} ms after it was due"
            status = await self._state(self._delivered_id)
            if status == "delivered" and not self._receives:
                return f"{self._target['destination']} took it"
            if status == "delivered" and self._delivered_id not in self._arrived:
                raise _Failure(f"the API says delivered, but {self._target['destination']} led to another receiver")
            if status is not None and status not in (*_UNDER_WAY, "delivered"):
                raise _Failure(f"the event is {status}: {self._why}")
            if datetime.now(UTC) > deadline:
                waited = f"{self._plan.timeout_s:g} s after it was due"
                if status is None:
                    raise _Failure(f"the API does not know the event {waited}: no ingester reads it from Kafka")
                raise _Failure(f"the event is still {status.replace('_', ' ')} {waited}: {_OVERDUE}")
            await asyncio.sleep(_PAUSE_S)

    async def _signature(self) -> str:
        from orchestrator.dispatch.http.signing import Signer

        webhook = self._arrived.get(self._delivered_id)
        if webhook is None:
            return "not checked: another receiver took the event"
        if not self._plan.secrets:
            return "not checked: WEBHOOK_SECRETS is not set here"
        if "webhook-signature" not in webhook.headers:
            raise _Failure("the delivery was not signed; set WEBHOOK_SECRETS for the dispatchers")
        if not webhook.is_signed_by(Signer(self._plan.secrets)):
            raise _Failure("the delivery is signed by another secret than WEBHOOK_SECRETS here")
        return "one of WEBHOOK_SECRETS signed it"

    async def _status(self) -> str:
        await self._until(self._delivered_id, "delivered", "its outcome is not recorded")
        self._open.remove(self._delivered_id)
        return "the API says delivered"

    async def _cancel(self) -> str:
        later = datetime.now(UTC) + timedelta(hours=1)
        identity = await self._submitted(f"{self._name}-cancelled", later, later + timedelta(seconds=1))
        # Of an event that Kafka still has, the API knows nothing yet.
        await self._until(identity, "scheduled", "no ingester reads it from Kafka")
        await self._answer("DELETE", f"{self._plan.url}/api/v1/events/{identity}", 200)
        await self._until(identity, "cancelled", "its cancellation is not kept")
        self._open.remove(identity)
        return f"event {identity} was submitted and cancelled"

    async def _metrics(self) -> str:
        text = await self._text(f"{self._plan.management_url}/metrics")
        found = re.search(r'^orchestrator_\w+\{[^}]*customer="([^"]*)"[^}]*deployment="([^"]*)"', text, re.MULTILINE)
        if found is None:
            raise _Failure("no series of orchestrator_… with deployment and customer; is this its management port?")
        return f"of deployment {found[2]}, customer {found[1]}"

    async def clean_up(self) -> None:
        """Cancels what may still be delivered; what cannot be cancelled expires soon after it was due."""
        if not self._open:
            return
        began = time.perf_counter()
        cancelled = 0
        with suppress(OrchestratorError, TimeoutError):
            async with asyncio.timeout(_CLEAN_UP_S):
                for identity in self._open:
                    await self._answer("DELETE", f"{self._plan.url}/api/v1/events/{identity}", 200)
                    cancelled += 1
        all_of_them = cancelled == len(self._open)
        detail = f"{cancelled} of {len(self._open)} events cancelled" + ("" if all_of_them else "; the rest expires")
        self._tell(Step("clean up", all_of_them, round((time.perf_counter() - began) * 1000, 1), detail))

    async def _until(self, identity: str, wanted: str, otherwise: str) -> None:
        """Waits until the event is in a state."""
        ends = time.monotonic() + self._plan.timeout_s
        while (status := await self._state(identity)) != wanted:
            if time.monotonic() > ends:
                raise _Failure(
                    f"expected the event {wanted} within {self._plan.timeout_s:g} s, got {status}: {otherwise}"
                )
            await asyncio.sleep(_PAUSE_S)

    async def _state(self, identity: str) -> str | None:
        """The state of an event; None while the API does not know it."""
        event = await self._answer("GET", f"{self._plan.url}/api/v1/events/{identity}", (200, 404))
        outcomes = event.get("outcomes")
        if isinstance(outcomes, list) and outcomes and isinstance(outcomes[-1], dict):
            self._why = outcomes[-1].get("error") or f"the receiver answered {outcomes[-1].get('status_code')}"
        return event.get("status") if "id" in event else None

    async def _answer(
        self, method: str, url: str, expected: int | tuple[int, ...], body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The JSON object of an answer, {} if it holds none. Raises _Failure for any other status."""
        status, text = await self._request(method, url, body)
        wanted = (expected,) if isinstance(expected, int) else expected
        document: Any = None
        with suppress(ValueError, RecursionError):
            document = json.loads(text)
        found: dict[str, Any] = document if isinstance(document, dict) else {}
        if status not in wanted:
            said = found.get("detail") or found.get("title") or "no reason given"
            raise _Failure(f"{method} {url} answered {status}: {str(said)[:500]}{_remedy(status)}")
        return found

    async def _text(self, url: str) -> str:
        status, text = await self._request("GET", url, None)
        if status != 200:
            raise _Failure(f"GET {url} answered {status}{_remedy(status)}")
        return text

    async def _request(self, method: str, url: str, body: Mapping[str, Any] | None) -> tuple[int, str]:
        import aiohttp

        key = self._plan.key
        to_api = url.startswith(f"{self._plan.url}/api/")
        headers = {"Authorization": f"Bearer {key}"} if key is not None and to_api else {}
        try:
            async with self._session.request(
                method, url, json=body, headers=headers, allow_redirects=False
            ) as response:
                return response.status, await response.text(errors="replace")
        except TimeoutError:
            raise _Failure(f"{method} {url}: no answer within {_REQUEST_S:g} s") from None
        except aiohttp.ClientConnectorCertificateError as error:
            why = getattr(error.certificate_error, "verify_message", "") or first_line(error)
            raise _Failure(f"{url}: its certificate is not trusted: {why}; name its authority by --ca-file") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Failure(f"{method} {url}: {first_line(error)}; is it running, and is the address right?") from None

    @asynccontextmanager
    async def _receiver(self) -> AsyncIterator[str]:
        """Listens for the event; the address that dispatchers deliver to."""
        from orchestrator.dev.receiver import ReceiverProtocol

        protocols: list[ReceiverProtocol] = []

        def accepted() -> ReceiverProtocol:
            protocols.append(ReceiverProtocol(self._receive))
            return protocols[-1]

        host, port = self._plan.listen
        try:
            server = await asyncio.get_running_loop().create_server(accepted, host, port)
        except OSError as error:
            raise _Failure(f"--listen {host}:{port}: {error.strerror or error}; choose another address") from None
        async with server:
            own = f"http://{f'[{host}]' if ':' in host else host}:{server.sockets[0].getsockname()[1]}"
            try:
                yield (self._plan.callback or own) + _PATH
            finally:
                for protocol in protocols:
                    protocol.close()
                await asyncio.sleep(0)  # in which they are closed

    def _receive(self, webhook: Webhook) -> None:
        self._arrived.setdefault(webhook.id, webhook)


def _remedy(status: int) -> str:
    if status == 401:
        return f"; set {KEY_VARIABLE} or --api-key-file to a key of this deployment"
    if status == 403:
        return "; create one: orchestrator keys create smoke --scope read --scope submit"
    return ""


@asynccontextmanager
async def _session(plan: Plan) -> AsyncIterator[aiohttp.ClientSession]:
    import aiohttp

    try:
        trusted = ssl.create_default_context(cafile=None if plan.ca_file is None else str(plan.ca_file))
    except OSError as error:  # ssl.SSLError is one
        raise _Failure(f"--ca-file {plan.ca_file}: {error.strerror or error}; expected certificates in PEM") from None
    timeout = aiohttp.ClientTimeout(total=_REQUEST_S)
    connector = aiohttp.TCPConnector(ssl=trusted)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, trust_env=False) as session:
        yield session
