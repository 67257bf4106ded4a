"""Keeps the connections of deliveries, within bounds on those in use and on those that are idle."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from orchestrator.dispatch.http.connection import Connection
from orchestrator.dispatch.http.connector import GuardedConnector

if TYPE_CHECKING:
    from orchestrator.dispatch.http.request import Origin

# Receivers close idle connections, many after five seconds; a request that crosses that on its way is lost.
_KEEPALIVE_S = 4.0
_SWEEP_S = 1.0


class NoConnectionInTimeError(Exception):
    """The time of an attempt, or that for connecting, was over before there was a connection."""


class Pool:
    """At most `limit` connections are in use, and as many idle; further attempts wait.

    Without a bound on idle ones, deliveries to very many hosts would use up the file descriptors.
    """

    def __init__(self, connector: GuardedConnector, limit: int) -> None:
        self._connector = connector
        self._limit = limit
        self._free = limit
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._idle: dict[Origin, list[Connection]] = {}  # of each origin, the one that rests longest comes first
        self._sweeper: asyncio.TimerHandle | None = None

    def take_idle(self, origin: Origin) -> Connection | None:
        """An idle connection, if there is one and fewer than `limit` are in use; to be given back as one by `take`."""
        if not self._free:
            return None
        connection = self._idle_one(origin)
        if connection is not None:
            self._free -= 1
        return connection

    async def take(self, origin: Origin, deadline_s: float) -> Connection:
        """A connection to post on, which is to be given back whatever comes of that.

        Raises as `GuardedConnector.connect`, and NoConnectionInTimeError, at the latest at `deadline_s` by the loop's
        clock.
        """
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._wait_for_place()
                try:
                    return self._idle_one(origin) or await self._new_one(origin)
                except BaseException:
                    self._pass_place_on()
                    raise
        except TimeoutError as error:
            if error.errno is not None:  # the system's own
                raise
            raise NoConnectionInTimeError from error

    def give_back(self, origin: Origin, connection: Connection) -> None:
        """Keeps the connection when it can be used again; closes it otherwise."""
        if connection.reusable:
            self._idle.setdefault(origin, []).append(connection)
            if self._sweeper is None:
                self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)
        else:
            connection.abort()
        self._pass_place_on()

    def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connections in self._idle.values():
            for connection in connections:
                connection.abort()
        self._idle.clear()
        self._connector.close()

    async def _wait_for_place(self) -> None:
        if self._free:
            self._free -= 1
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():  # it was just given a place
                self._pass_place_on()
            raise

    def _pass_place_on(self) -> None:
        """To the attempt that has waited longest, if one waits."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():  # else its attempt was cancelled
                waiter.set_result(None)
                return
        self._free += 1

    def _idle_one(self, origin: Origin) -> Connection | None:
        """The idle connection that was used last: receivers close the others first."""
        connections = self._idle.get(origin)
        while connections:
            connection = connections.pop()
            if connection.is_quiet():
                return connection
            connection.abort()
        return None

    async def _new_one(self, origin: Origin) -> Connection:
        while self._idle and sum(map(len, self._idle.values())) >= self._limit:
            self._close_oldest(min(self._idle, key=lambda origin: self._rested_s(origin)))
        return await self._connector.connect(origin)

    def _sweep(self) -> None:
        """Closes connections that have been idle for `_KEEPALIVE_S`."""
        loop = asyncio.get_running_loop()
        before_s = loop.time() - _KEEPALIVE_S
        for origin in list(self._idle):
            while origin in self._idle and self._rested_s(origin) < before_s:
                self._close_oldest(origin)
        self._sweeper = loop.call_later(_SWEEP_S, self._sweep) if self._idle else None

    def _rested_s(self, origin: Origin) -> float:
        """Since when the longest idle connection to an origin has been idle; those without any come first."""
        connections = self._idle[origin]
        return connections[0].rested_s if connections else 0.0

    def _close_oldest(self, origin: Origin) -> None:
        connections = self._idle[origin]
        if connections:
            connections.pop(0).abort()
        if not connections:
            del self._idle[origin]
