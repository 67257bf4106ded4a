"""A connection until TLS is agreed on: it counts among the connections of clients, and has the deadline of a head."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.utils import get_remote_addr

from orchestrator.api.server import refusals
from orchestrator.api.server.connection import NEW, Connection
from orchestrator.api.server.refusals import Refusal

if TYPE_CHECKING:
    from orchestrator.api.server.certificate import Certificate
    from orchestrator.api.server.connection_limits import ConnectionLimits

_SPARE_S = 5.0  # `ConnectionLimits` ends a handshake sooner
_GOODBYE_S = 5.0  # that a client has to say that it closes, too


class Handshake(asyncio.Protocol):
    """What `ConnectionLimits` asks of a connection, until a `Connection` takes its place."""

    stage = NEW
    waits = True
    body_bytes = 0
    unread_since: float | None = None
    transport: asyncio.Transport

    def __init__(self, limits: ConnectionLimits, certificate: Certificate, **given: Any) -> None:
        self._limits = limits
        self._certificate = certificate
        self._given = given
        self._loop = asyncio.get_running_loop()
        self._connections = given["server_state"].connections
        self._upgrade: Coroutine[Any, Any, asyncio.Transport | None]
        self._connection: Connection | None = None
        self._early: list[bytes] = []
        self._over = False
        self.since = self._loop.time()
        self.deadline = self.since + limits.timeouts_s[NEW]
        self.address = ""
        self.client: tuple[str, int] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.client = get_remote_addr(transport)
        self._connections.add(self)
        self._limits.admit(self)
        if self._over:
            return
        self._upgrade = self._loop.start_tls(
            transport,
            self,
            self._certificate.context,
            server_side=True,
            ssl_handshake_timeout=self._limits.timeouts_s[NEW] + _SPARE_S,
            ssl_shutdown_timeout=_GOODBYE_S,
        )
        # At once, up to where it waits for the client: a task would begin later, and might miss the first bytes.
        self._upgrade.send(None).add_done_callback(self._agreed)

    def _agreed(self, _: asyncio.Future[Any]) -> None:
        secure: asyncio.Transport | None = None
        try:
            self._upgrade.send(None)
        except StopIteration as upgraded:
            secure = upgraded.value
        except ConnectionError:
            pass  # the client has left
        except OSError:  # what it sent is no TLS, or not to our liking
            self._limits.note(refusals.HANDSHAKE)
        lost = self._over
        self._end()
        if lost or secure is None or self.transport.is_closing():
            self.transport.abort()
            return
        self._connection = connection = self._limits.connection(**self._given)
        secure.set_protocol(connection)
        connection.connection_made(secure)
        connection.deadline = min(connection.deadline, self.deadline)
        for data in self._early:
            connection.data_received(data)

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self._connections.discard(self)
            self._limits.forget(self)

    # The event loop may have decided to call these before the other protocol was set.

    def data_received(self, data: bytes) -> None:
        if self._connection is None:
            self._early.append(data)
        else:
            self._connection.data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._connection is None:
            self._end()
        else:
            self._connection.connection_lost(exc)

    # The limits, and the end of the server

    def refuse(self, refusal: Refusal, *, linger: bool = True) -> None:
        """Closes it: there is no way yet to tell the client why."""
        self._limits.note(refusal)
        self._end()
        self.transport.abort()

    def overdue(self) -> None:
        self.refuse(refusals.NO_HEAD)

    def shutdown(self) -> None:
        """Lets it go on: its first request will be its last."""
