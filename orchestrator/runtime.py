"""The roles of a process: the API, the ingester, the dispatcher, maintenance, or all of them.

They share one event loop, except the API, which runs in a process of its own.

The first SIGTERM or SIGINT stops everything in order, within SHUTDOWN_TIMEOUT_SECONDS. A second one ends the process at
once; others deliver the events that it held when its leases run out.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, NoReturn

import psycopg
import uvloop

from orchestrator import file_descriptors
from orchestrator.database import Database, migrate, translated
from orchestrator.database.blocking import OnConnected, blocking
from orchestrator.database.customer import check_customer
from orchestrator.database.rights import NEEDED
from orchestrator.errors import DatabaseUnavailable, OrchestratorError, SettingsError, UnusableDatabase
from orchestrator.event_loop import watch_lag
from orchestrator.garbage import spare_what_stays
from orchestrator.maintenance.upkeep import maintain, prepare
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings, database_url
from orchestrator.startup import until_done
from orchestrator.tracing import Tracer, tracing

Role = Literal["run", "api", "ingest", "dispatch", "maintain"]
Part = Callable[[asyncio.Event], Awaitable[None]]
"""A coroutine function that works until the event is set, and then ends by itself."""

_PREPARED_S = 120.0  # after a long pause maintenance has days of work, which is bounded
_AFTER_DEADLINE_S = 2.0  # the parts keep the deadline themselves; this ends one that does not

_log = logging.getLogger(__name__)


def serve(settings: Settings, role: Role, *, beside: Sequence[Part] = ()) -> None:
    """Serves until a signal; `beside` runs with it. The caller configures logging.

    Waits for a database that is away. Raises OrchestratorError when the schema is missing, a port is taken, API keys
    are required and there are none, or some work had not ended in time.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_Process(settings, role).run(beside))


class _Process:
    def __init__(self, settings: Settings, role: Role) -> None:
        self._settings = settings
        self._role = role
        self._metrics = Metrics(settings, role)
        self._stop = asyncio.Event()
        self._failures: list[Exception] = []

    async def run(self, beside: Sequence[Part]) -> None:
        settings = self._settings
        self._handle_signals()
        self._metrics.count_log_lines()
        watch_lag(self._metrics.event_loop_lag_seconds.observe)
        for notice in settings.notices:
            _log.warning("%s", notice)
        limit = file_descriptors.raise_limit()
        for shortage in file_descriptors.shortages(settings, limit):
            _log.warning("%s", shortage)
        settings = replace(settings, http_max_connections=file_descriptors.deliveries(settings, limit))
        self._settings = settings
        _log.info("starting", extra={"database": database_url.masked(settings.database_url)})
        if self._role == "ingest" and settings.kafka_servers is None:
            raise SettingsError("KAFKA_BOOTSTRAP_SERVERS: required to ingest; set it to the brokers, host:port")
        # Other roles open their own connections; their pool only answers health checks.
        pool = settings if self._role == "api" else replace(settings, pool_min_idle=0, pool_max_size=2)
        opening = Database(pool, role=self._role, needs=NEEDED[self._role], serves_clients=self._role == "api")
        # An API has a tracer of its own, and maintenance makes no spans.
        traced = settings if self._role in ("run", "ingest", "dispatch") else replace(settings, otlp_endpoint=None)
        try:
            async with (
                tracing(traced, self._metrics, self._role) as tracer,
                asyncio.timeout(None) as deadline,
                opening as database,
            ):
                await self._run_parts(self._parts(tracer), beside, database, deadline)
        except TimeoutError:
            raise OrchestratorError(
                f"not all work had ended after SHUTDOWN_TIMEOUT_SECONDS ({settings.shutdown_timeout_s:g}); claimed "
                "events are delivered when their leases run out"
            ) from None
        if self._failures:
            raise _cause(self._failures[0])
        _log.info("stopped")

    def _parts(self, tracer: Tracer | None) -> list[Part]:
        settings, metrics = self._settings, self._metrics
        parts: list[Part] = []
        if self._role in ("run", "dispatch"):
            parts.append(lambda stop: _dispatch(settings, metrics, stop, tracer))
            if settings.kafka_servers is not None:
                parts.append(lambda stop: _publish(settings, metrics, stop))
        if self._role == "ingest" or (self._role == "run" and settings.kafka_servers is not None):
            parts.append(lambda stop: _ingest(settings, metrics, stop, tracer))
        if self._role in ("run", "maintain"):
            parts.append(lambda stop: maintain(settings, metrics, stop))
        return parts

    async def _run_parts(
        self, parts: Iterable[Part], beside: Iterable[Part], database: Database, deadline: asyncio.Timeout
    ) -> None:
        settings = self._settings
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._limit(deadline))
            # From the start, so that a probe finds a live process while it waits for its database.
            served: Part | None = None
            if self._role == "run":
                served = lambda stop: _serve_apart(settings, self._metrics, stop)  # noqa: E731
            elif self._role == "api":
                served = lambda stop: _serve_api(settings, database, self._metrics, stop)  # noqa: E731
            elif settings.management_port is not None:
                served = lambda stop: _serve_management(settings, database, self._metrics, stop)  # noqa: E731
            if served is not None:
                tasks.create_task(self._watched(served))
            await self._watched(lambda stop: _until_usable(settings, database, self._role, stop), stops=False)
            if not self._stop.is_set():
                spare_what_stays()
                _log.info("ready")
                for part in (*parts, *beside):
                    tasks.create_task(self._watched(part))

    async def _watched(self, part: Part, *, stops: bool = True) -> None:
        """Runs a part. When it fails or ends, the other parts stop in order, unlike in a cancelled group."""
        try:
            await part(self._stop)
        except Exception as error:
            self._failures.append(error)
            stops = True
        finally:
            if stops:
                self._stop.set()

    async def _limit(self, deadline: asyncio.Timeout) -> None:
        await self._stop.wait()
        left_s = self._settings.shutdown_timeout_s + _AFTER_DEADLINE_S
        deadline.reschedule(asyncio.get_running_loop().time() + left_s)

    def _handle_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            _exit_at_once(128 + number)
        _log.info("stopping; a second signal ends the process at once", extra={"signal": number.name})
        self._stop.set()


def _exit_at_once(status: int) -> NoReturn:
    logging.shutdown()
    os._exit(status)


# These import what they run: the HTTP and Kafka clients cost 10 MiB each in every process that loads them.


async def _serve_api(settings: Settings, database: Database, metrics: Metrics, stop: asyncio.Event) -> None:
    from orchestrator.api.server.server import serve

    await serve(settings, database, metrics, stop=stop)


async def _require_keys(settings: Settings, database: Database) -> None:
    from orchestrator.api.auth import require_keys

    await require_keys(settings, database)


async def _serve_apart(settings: Settings, metrics: Metrics, stop: asyncio.Event) -> None:
    from orchestrator.api.server.api_process import serve_api_process

    await serve_api_process(settings, "run", metrics, stop=stop)


async def _serve_management(settings: Settings, database: Database, metrics: Metrics, stop: asyncio.Event) -> None:
    from orchestrator.api.server.server import serve_management

    await serve_management(settings, database, metrics, stop=stop)


async def _dispatch(settings: Settings, metrics: Metrics, stop: asyncio.Event, tracer: Tracer | None) -> None:
    from orchestrator.dispatch.dispatcher import Dispatcher
    from orchestrator.dispatch.http.sender import HttpSender

    async with HttpSender(settings) as sender:
        await Dispatcher(settings, metrics, sender, tracer).run(stop)


async def _ingest(settings: Settings, metrics: Metrics, stop: asyncio.Event, tracer: Tracer | None) -> None:
    from orchestrator.ingest import ingest

    await ingest(settings, metrics, stop, tracer)


async def _publish(settings: Settings, metrics: Metrics, stop: asyncio.Event) -> None:
    from orchestrator.outbox import publish

    await publish(settings, metrics, stop)


async def _until_usable(settings: Settings, database: Database, role: Role, stop: asyncio.Event) -> None:
    """Returns when the database can be used, or at `stop`.

    Raises OrchestratorError when it is not migrated, or another customer's.
    """
    url = settings.database_url
    if not await until_done("schema", lambda: blocking(partial(_require_schema, url)), stop):
        return
    customer = settings.named_customer
    if customer is not None and not await until_done(
        "customer", lambda: blocking(partial(check_customer, url, customer)), stop
    ):
        return
    if role in ("run", "api") and not await until_done("API keys", lambda: _require_keys(settings, database), stop):
        return
    if role in ("run", "maintain"):
        prepared = await until_done("maintenance", lambda: prepare(settings), stop, answer_s=_PREPARED_S)
        if not prepared:
            return
    await until_done("readiness", database.ready, stop)


def _require_schema(url: str, on_connected: OnConnected) -> None:
    """Raises OrchestratorError when tables are missing.

    During a rollout a newer program may have migrated the database already; this one can work with it.
    """
    try:
        with translated():
            try:
                pending = migrate.check(url, on_connected)
            except psycopg.errors.InsufficientPrivilege:
                return  # this login may not read the migrations; its calls will show whether they fit
    except (DatabaseUnavailable, UnusableDatabase):
        raise
    except OrchestratorError as error:
        _log.warning("%s", error)
        return
    tables = [file for file in pending if file.startswith("schema/")]
    if tables:
        raise OrchestratorError(
            f"the database is not migrated: {', '.join(tables)} is missing; run: orchestrator migrate"
        )
    if pending:
        _log.warning(
            "the functions in the database are of another version; run: orchestrator migrate", extra={"files": pending}
        )


def _cause(error: Exception) -> Exception:
    """The single OrchestratorError inside nested exception groups, or else the error itself."""
    inner: BaseException = error
    while isinstance(inner, BaseExceptionGroup) and len(inner.exceptions) == 1:
        inner = inner.exceptions[0]
    return inner if isinstance(inner, OrchestratorError) else error
