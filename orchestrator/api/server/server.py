"""Runs the applications on uvicorn, in the caller's event loop and with the caller's signal handlers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, cast

import uvicorn

from orchestrator.api.app import Edge, api_app, management_app
from orchestrator.api.routes.health import Health
from orchestrator.api.server.certificate import Certificate, load
from orchestrator.api.server.connection_limits import ConnectionLimits
from orchestrator.api.server.listening import BACKLOG, Listeners, listen, listening
from orchestrator.api.server.process_link import Deliverer
from orchestrator.database import Database
from orchestrator.file_descriptors import MANAGEMENT
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings

_log = logging.getLogger(__name__)


_ON_THEIR_WAY_S = 0.1  # for requests that clients sent before they could know that the server stops


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, drain_s: float) -> None:
        super().__init__(config)
        self._drain_s = drain_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Goes on for a while, answers what was on its way, and then closes what is idle."""
        await asyncio.sleep(self._drain_s)
        for each in (*self.servers, *(sockets or ())):
            each.close()
        await asyncio.sleep(_ON_THEIR_WAY_S)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield  # the caller handles signals


async def serve(
    settings: Settings,
    database: Database,
    metrics: Metrics,
    *,
    stop: asyncio.Event,
    listeners: Listeners | None = None,
    deliverer: Deliverer | None = None,
    on_serving: Callable[[], None] = lambda: None,
) -> None:
    """Serves the API until `stop` is set, then finishes running requests, within `shutdown_timeout_s`.

    Health and metrics are on the same port, or on `management_port` if it is set; there they answer until the API has
    stopped, and are not ready from `stop` on. They include the `deliverer`, if that is another process.
    Raises OrchestratorError when a port is taken, and SettingsError when the certificate cannot be used.
    """
    pair = load(settings)
    certificate = None if pair is None else Certificate(settings, metrics, pair)
    health = Health(database, metrics, deliverer)
    with contextlib.ExitStack() as sockets:
        api, management = listeners or sockets.enter_context(listening(settings))
        on_serving()
        if management is None:
            await _serve_api(settings, database, metrics, health, api, certificate, stop)
            return
        async with asyncio.TaskGroup() as group:
            api_stopped = asyncio.Event()
            app = management_app(health, metrics)
            limits = ConnectionLimits(settings, metrics, MANAGEMENT)
            group.create_task(_run(settings, app, limits, management, stop=api_stopped))
            try:
                await _serve_api(settings, database, metrics, health, api, certificate, stop)
            finally:
                api_stopped.set()


async def serve_management(settings: Settings, database: Database, metrics: Metrics, *, stop: asyncio.Event) -> None:
    """Serves health and metrics alone until `stop` is set: for a process without an API.

    On `management_port`, or on `server_port` when that is not set.
    """
    health = Health(database, metrics)
    name = "SERVER_PORT" if settings.management_port is None else "MANAGEMENT_SERVER_PORT"
    port = settings.management_port or settings.server_port
    with listen(name, settings.server_host, port) as listener:
        limits = ConnectionLimits(settings, metrics, MANAGEMENT)
        await _run(settings, management_app(health, metrics), limits, listener, stop=stop, health=health)


async def _serve_api(
    settings: Settings,
    database: Database,
    metrics: Metrics,
    health: Health,
    listener: socket.socket,
    certificate: Certificate | None,
    stop: asyncio.Event,
) -> None:
    limits = ConnectionLimits(settings, metrics)
    async with api_app(settings, database, metrics, health) as app:
        await _run(
            settings,
            app,
            limits,
            listener,
            stop=stop,
            health=health,
            certificate=certificate,
            drain_s=settings.shutdown_drain_s,
        )


async def _run(
    settings: Settings,
    app: Edge,
    limits: ConnectionLimits,
    listener: socket.socket,
    *,
    stop: asyncio.Event,
    health: Health | None = None,
    certificate: Certificate | None = None,
    drain_s: float = 0.0,
) -> None:
    made = limits.connection if certificate is None else partial(limits.handshake, certificate)
    config = uvicorn.Config(
        app,
        http=cast(Any, made),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=_log.isEnabledFor(logging.DEBUG),
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=3600,  # `ConnectionLimits` closes idle connections sooner
        timeout_graceful_shutdown=max(1, int(settings.shutdown_timeout_s - drain_s)),
    )
    server = _Server(config, drain_s)

    async def stop_it() -> None:
        await stop.wait()
        if health is not None:
            health.stopping = True
        limits.draining = True
        server.should_exit = True

    besides = [asyncio.create_task(stop_it()), asyncio.create_task(limits.sweep_for_ever())]
    if certificate is not None:
        besides.append(asyncio.create_task(certificate.watch()))
    _log.info("listening", extra={"address": "{}:{}".format(*listener.getsockname()[:2])})
    try:
        await server.serve(sockets=[listener])
    finally:
        for task in besides:
            task.cancel()
        await asyncio.gather(*besides, return_exceptions=True)
