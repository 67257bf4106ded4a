"""Bounds what all clients of the API may use together: connections, time and memory."""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
from collections import Counter
from collections.abc import Iterable
from ipaddress import IPv6Network
from typing import Any

from orchestrator import file_descriptors
from orchestrator.api.server import refusals
from orchestrator.api.server.certificate import Certificate
from orchestrator.api.server.connection import CLOSING, IDLE, Connection
from orchestrator.api.server.handshake import Handshake
from orchestrator.api.server.refusals import Refusal
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings

_SWEEP_S = 1.0
_CLOSING_S = 5.0  # that a refused client has to stop sending and read why
_LOG_EVERY_S = 10.0
_BODIES_BYTES = 2**26  # of bodies in memory, besides a few of the largest size
_LOOK_S = 0.1  # before looking for connections to close again, when there were none
_LATE = 8  # up to an eighth more connections stay for a moment, to read why they are refused

_log = logging.getLogger(__name__)


class ConnectionLimits:
    """Makes the connections of one server, and bounds them; `sweep_for_ever` enforces their deadlines.

    When all are taken, connections that wait for their clients are closed: first the oldest of the address that has
    most, so that a flood from one address displaces itself. Behind a load balancer all come from one address, so the
    bound per address is off unless it is set. `most` bounds the connections of a server that takes fewer than the API.
    """

    def __init__(self, settings: Settings, metrics: Metrics, most: int | None = None) -> None:
        self.max_head_bytes = settings.max_head_bytes
        # By stage: NEW, HEAD, BODY, ANSWER, IDLE, CLOSING.
        head_s, body_s, idle_s = settings.api_head_timeout_s, settings.api_body_timeout_s, settings.api_keep_alive_s
        self.timeouts_s = head_s, head_s, body_s, math.inf, idle_s, _CLOSING_S
        self._write_timeout_s = settings.api_write_timeout_s
        fit = file_descriptors.clients(settings, file_descriptors.limit())
        self._max_connections = fit if most is None else min(fit, most)
        self._max_per_address = settings.api_max_connections_per_address or math.inf
        self._max_bodies_bytes = _BODIES_BYTES + 4 * settings.max_body_bytes
        self._metrics = metrics
        self._connections: dict[Connection | Handshake, None] = {}
        self._addresses: Counter[str] = Counter()
        self._bodies_bytes = 0
        self._full_until_s = -math.inf
        self._unsaid: Counter[str] = Counter()
        self.draining = False
        """Whether each connection is to end with its next answer."""

    def connection(self, **given: Any) -> Connection:
        """Makes the protocol of a connection, for uvicorn."""
        return Connection(self, **given)

    def handshake(self, certificate: Certificate, **given: Any) -> Handshake:
        """Makes the protocol of a connection that begins with TLS."""
        return Handshake(self, certificate, **given)

    def admit(self, connection: Connection | Handshake) -> None:
        """Takes a new connection in, or refuses it."""
        address = connection.address = _network(connection.client[0] if connection.client else "")
        self._connections[connection] = None
        self._metrics.http_connections.inc()
        self._addresses[address] += 1
        if self._addresses[address] > self._max_per_address:
            self._turn_away(connection, refusals.ADDRESS)
        elif len(self._connections) > self._max_connections and not self._make_room(connection):
            self._turn_away(connection, refusals.CONNECTIONS)

    def forget(self, connection: Connection | Handshake) -> None:
        """Forgets a closed connection."""
        self.give_back(connection)
        del self._connections[connection]
        self._metrics.http_connections.dec()
        self._addresses[connection.address] -= 1
        if not self._addresses[connection.address]:
            del self._addresses[connection.address]

    def takes_body(self, size: int) -> bool:
        """Counts bytes of a body as held in memory; whether they are within the bound."""
        self._bodies_bytes += size
        return self._bodies_bytes <= self._max_bodies_bytes

    def give_back(self, connection: Connection | Handshake) -> None:
        """Notes that the connection holds no body any more."""
        if connection.body_bytes:
            self._bodies_bytes -= connection.body_bytes
            connection.body_bytes = 0

    def note(self, refusal: Refusal) -> None:
        """Counts a refusal; every ten seconds one line of the log reports them all."""
        self._metrics.http_refusals_total(refusal.reason).inc()
        self._unsaid[refusal.reason] += 1

    def _turn_away(self, connection: Connection | Handshake, refusal: Refusal) -> None:
        late = len(self._connections) - self._max_connections
        connection.refuse(refusal, linger=late <= self._max_connections // _LATE)

    def _make_room(self, newest: Connection | Handshake) -> bool:
        """Closes some connections that wait for their clients; whether there were any."""
        if newest.since < self._full_until_s:
            return False
        waiting = [connection for connection in self._connections if connection.waits and connection is not newest]
        if not waiting:
            self._full_until_s = newest.since + _LOOK_S
            return False
        few = max(1, self._max_connections // 64)
        oldest = heapq.nsmallest(few, waiting, key=lambda c: (-self._addresses[c.address], c.since))
        for connection in oldest:
            if connection.stage in (IDLE, CLOSING):
                self._metrics.http_refusals_total("displaced").inc()
                connection.transport.close()
            else:
                connection.refuse(refusals.CONNECTIONS, linger=False)
        return True

    async def sweep_for_ever(self) -> None:
        """Ends connections whose deadline is over; never returns."""
        loop = asyncio.get_running_loop()
        every_s = min(_SWEEP_S, *(timeout_s / 4 for timeout_s in (*self.timeouts_s, self._write_timeout_s)))
        said_s = -math.inf
        while True:
            await asyncio.sleep(every_s)
            now_s = loop.time()
            self._sweep(list(self._connections), now_s)
            if self._unsaid and now_s - said_s >= _LOG_EVERY_S:
                said_s = now_s
                _log.warning("refused connections or requests", extra={"refused": dict(self._unsaid)})
                self._unsaid.clear()

    def _sweep(self, connections: Iterable[Connection | Handshake], now_s: float) -> None:
        for connection in connections:
            if now_s >= connection.deadline:
                connection.overdue()
            elif not connection.transport.get_write_buffer_size():
                connection.unread_since = None
            elif connection.unread_since is None:
                connection.unread_since = now_s
            elif now_s - connection.unread_since >= self._write_timeout_s:
                self.note(refusals.UNREAD)
                connection.transport.abort()


def _network(host: str) -> str:
    """The network of one client: an IPv4 address, or an IPv6 /64."""
    return str(IPv6Network((host.partition("%")[0], 64), strict=False)) if ":" in host else host
