"""Ending tasks, and waiting for them with a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")

_ASKED_S = 0.1
_ENDING_S = 1.0


def retrieve(*futures: asyncio.Future[Any]) -> None:
    """Reads how these ended: the event loop logs a failure that nobody has read as an error."""
    for future in futures:
        if future.done() and not future.cancelled():
            future.exception()


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancels tasks and waits for their end, twice; ignores how they end.

    When first cancelled, psycopg asks the server to end the running query, and waits seconds for a server that does not
    answer. When cancelled again, it closes the connection.
    """
    try:
        for timeout_s in (_ASKED_S, _ENDING_S):
            for task in tasks:
                task.cancel()
            _, running = await asyncio.wait(tasks, timeout=timeout_s)
            if not running:
                break
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        raise
    retrieve(*tasks)


async def within(seconds: float, work: Awaitable[T], stop: asyncio.Event | None = None) -> T:
    """The result of `work`. Raises TimeoutError when it takes longer, or at `stop`; `work` then ends soon after.

    asyncio.timeout() would wait for as long as the work takes to end.
    """
    task = asyncio.ensure_future(_awaited(work))
    stopping = asyncio.ensure_future(stop.wait()) if stop is not None else None
    tasks = [task] if stopping is None else [task, stopping]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await end(*tasks)
    if task.cancelled() or not task.done():
        raise TimeoutError
    return task.result()


async def _awaited(work: Awaitable[T]) -> T:
    return await work
