"""The roles of a process, on one event loop: the API, the ingester, the dispatcher, maintenance, or all of them.

The first SIGTERM or SIGINT stops everything in order, within SHUTDOWN_TIMEOUT_SECONDS; a second one ends the
process at once, and what it held is delivered by others when its leases run out.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Literal, NoReturn

import psycopg
import uvloop

from orchestrator import database_url, migrate
from orchestrator.api.server import serve as serve_api
from orchestrator.api.server import serve_management
from orchestrator.config import Settings
from orchestrator.database import Database
from orchestrator.errors import DatabaseUnavailable, OrchestratorError, SettingsError, UnusableDatabase
from orchestrator.maintenance import maintain, prepare
from orchestrator.metrics import Metrics

Role = Literal["run", "api", "ingest", "dispatch", "maintain"]
Part = Callable[[asyncio.Event], Awaitable[None]]
"""Something that works until the event is set, and then ends by itself."""

_WITHOUT_API = ("ingest", "dispatch", "maintain")
_FIRST_BACKOFF_S = 0.2
_LAST_BACKOFF_S = 5.0
_AFTER_DEADLINE_S = 2.0  # the parts keep the deadline themselves; this is for one that does not

_log = logging.getLogger(__name__)


def serve(settings: Settings, role: Role, *, beside: Sequence[Part] = ()) -> None:
    """Serves until a signal; `beside` runs with it. Logging is the caller's to configure.

    Waits for a database that is away. Raises OrchestratorError when it lacks the schema, a port is taken, keys
    are needed and there are none, or not everything had ended in time.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_Process(settings, role).run(beside))


class _Process:
    def __init__(self, settings: Settings, role: Role) -> None:
        self._settings = settings
        self._role = role
        self._metrics = Metrics(settings)
        self._stop = asyncio.Event()
        self._failures: list[Exception] = []

    async def run(self, beside: Sequence[Part]) -> None:
        settings = self._settings
        self._handle_signals()
        for notice in settings.notices:
            _log.warning("%s", notice)
        _log.info("starting", extra={"database": database_url.masked(settings.database_url), "pid": os.getpid()})
        if self._role == "ingest" and settings.kafka_servers is None:
            raise SettingsError("KAFKA_BOOTSTRAP_SERVERS: required to ingest; set it to the brokers, host:port")
        # These have connections of their own; their pool only answers health checks.
        pool = replace(settings, pool_min_idle=0, pool_max_size=2) if self._role in _WITHOUT_API else settings
        try:
            async with asyncio.timeout(None) as deadline, Database(pool, role=self._role) as database:
                await self._run_parts(self._parts(database), beside, database, deadline)
        except TimeoutError:
            raise OrchestratorError(
                f"not all work had ended after SHUTDOWN_TIMEOUT_SECONDS ({settings.shutdown_timeout_s:g}); what was "
                "claimed is delivered when its leases run out"
            ) from None
        if self._failures:
            raise _cause(self._failures[0])
        _log.info("stopped")

    def _parts(self, database: Database) -> list[Part]:
        settings, metrics = self._settings, self._metrics
        parts: list[Part] = []
        if self._role in ("run", "api"):
            parts.append(lambda stop: serve_api(settings, database, metrics, stop=stop))
        if self._role in ("run", "dispatch"):
            parts.append(lambda stop: _dispatch(settings, metrics, stop))
            if settings.kafka_servers is not None:
                parts.append(lambda stop: _publish(settings, metrics, stop))
        if self._role == "ingest" or (self._role == "run" and settings.kafka_servers is not None):
            parts.append(lambda stop: _ingest(settings, metrics, stop))
        if self._role in ("run", "maintain"):
            parts.append(lambda stop: maintain(settings, metrics, stop))
        return parts

    async def _run_parts(
        self, parts: Iterable[Part], beside: Iterable[Part], database: Database, deadline: asyncio.Timeout
    ) -> None:
        settings = self._settings
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._limit(deadline))
            if self._role in _WITHOUT_API and settings.management_port is not None:
                # From the start, so that a probe sees a process that lives and waits for its database.
                management: Part = lambda stop: serve_management(  # noqa: E731
                    settings, database, self._metrics, stop=stop
                )
                tasks.create_task(self._watched(management))
            await self._watched(lambda stop: _until_usable(settings, database, self._role, stop), stops=False)
            if not self._stop.is_set():
                for part in (*parts, *beside):
                    tasks.create_task(self._watched(part))

    async def _watched(self, part: Part, *, stops: bool = True) -> None:
        """Runs a part. When it fails, or ends, the others stop in order, which a cancelled group would not do."""
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
        _log.info("stopping; a second signal ends it at once", extra={"signal": number.name})
        self._stop.set()


def _exit_at_once(status: int) -> NoReturn:
    logging.shutdown()
    os._exit(status)


# These import what they run: the clients of HTTP and Kafka cost every process that loads them 10 MiB each.


async def _dispatch(settings: Settings, metrics: Metrics, stop: asyncio.Event) -> None:
    from orchestrator.dispatch.dispatcher import Dispatcher
    from orchestrator.dispatch.http import HttpSender

    async with HttpSender(settings) as sender:
        await Dispatcher(settings, metrics, sender).run(stop)


async def _ingest(settings: Settings, metrics: Metrics, stop: asyncio.Event) -> None:
    from orchestrator.ingest import ingest

    await ingest(settings, metrics, stop)


async def _publish(settings: Settings, metrics: Metrics, stop: asyncio.Event) -> None:
    from orchestrator.outbox import publish

    await publish(settings, metrics, stop)


async def _until_usable(settings: Settings, database: Database, role: Role, stop: asyncio.Event) -> None:
    """Returns when the database can be used, or at `stop`. Raises OrchestratorError when it is not migrated."""
    backoff_s = _FIRST_BACKOFF_S
    while not stop.is_set():
        try:
            await asyncio.to_thread(_require_schema, settings.database_url)
            if role in ("run", "maintain"):
                await prepare(settings)
            await database.ready()
            if backoff_s > _FIRST_BACKOFF_S:
                _log.info("the database is there")
            return
        except DatabaseUnavailable as error:
            _log.warning(
                "waiting for the database", extra={"error": str(error).splitlines()[0], "retry_in_s": backoff_s}
            )
        with suppress(TimeoutError):
            async with asyncio.timeout(backoff_s * random.uniform(0.8, 1.2)):
                await stop.wait()
        backoff_s = min(_LAST_BACKOFF_S, 2 * backoff_s)


def _require_schema(url: str) -> None:
    """Raises OrchestratorError when tables are missing.

    During a rollout the database may be a newer program's already, which this one can work with.
    """
    try:
        pending = migrate.check(url)
    except psycopg.errors.InsufficientPrivilege:
        return  # a login that may not read the record of migrations finds out when it calls
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
            "functions in the database are not this program's; run: orchestrator migrate", extra={"files": pending}
        )


def _cause(error: Exception) -> Exception:
    """The one error for the user inside the groups that tasks wrap it in, or the error itself."""
    inner: BaseException = error
    while isinstance(inner, BaseExceptionGroup) and len(inner.exceptions) == 1:
        inner = inner.exceptions[0]
    return inner if isinstance(inner, OrchestratorError) else error
