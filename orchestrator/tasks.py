"""Ending tasks, and waiting for them with a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")

_ASKED_S = 0.1
_ENDING_S = 1.0


def retrieve(*futures: asyncio.Future[Any]) -> None:
    """Takes note of how these ended; the event loop reports what fails with nobody to ask as an error of ours."""
    for future in futures:
        if future.done() and not future.cancelled():
            future.exception()


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancels tasks and waits for their end, twice: psycopg asks the server to end a running query first, and waits
    seconds for one that does not answer; cancelled again, it closes the connection. How they end is of no interest."""
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
    """What `work` answers. Raises TimeoutError when it takes longer, or at `stop`; it has ended soon after in any case.

    asyncio.timeout() waits for as long as the work takes to end.
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
