"""Servers of tests, of whose connections nothing is left when a test ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from ssl import SSLContext
from typing import Any

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]

_ROUNDS = 5  # of the event loop, in which an accepted connection reaches its handler


@asynccontextmanager
async def serving(
    handler: Handler, host: str = "127.0.0.1", port: int = 0, tls: SSLContext | None = None
) -> AsyncIterator[int]:
    """Listens for as long as the context lasts, and gives its port; at the end handlers are cancelled.

    They close their connections. A server that is closed forgets those that it has just accepted, and a handler that is
    cancelled before it has begun closes nothing; some later test would fail because a socket was never closed. So
    it stops accepting first, and lets every handler begin.
    """
    handling: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(handler(reader, writer))
        handling.add(task)
        task.add_done_callback(handling.discard)

    server = await asyncio.start_server(accept, host, port, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        for listener in server.sockets:
            asyncio.get_running_loop().remove_reader(listener)
        for _ in range(_ROUNDS):
            await asyncio.sleep(0)
        server.close()
        for task in handling:
            task.cancel()
        await asyncio.gather(*handling, return_exceptions=True)
        await server.wait_closed()
