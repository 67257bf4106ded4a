"""aiokafka's clients, of which nothing is left when a test ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any


@asynccontextmanager
async def started(client: Any) -> AsyncIterator[Any]:
    """A producer, consumer or admin client for as long as the context lasts.

    aiokafka forgets the connection that it is making when its start or its stop is cancelled, and some later test
    then fails because a socket was never closed. So a cancellation waits here until these have ended.
    """
    try:
        await _whole(client.start())
        yield client
    finally:
        await _whole(client.stop() if hasattr(client, "stop") else client.close())


async def _whole(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    finally:
        await asyncio.wait([task])
