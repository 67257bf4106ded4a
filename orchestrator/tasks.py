"""Ending tasks, and waiting before they try again."""

from __future__ import annotations

import asyncio
import random
from typing import Any

_ASKED_S = 0.1
_ENDING_S = 1.0
_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 5.0


def backoff_s(failures: int) -> float:
    """How long to wait after so many failures in turn: doubling from 0.1 s to 5 s, less up to half of it at random."""
    return min(_LAST_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 10)) * random.uniform(0.5, 1.0)


def retrieve(*futures: asyncio.Future[Any]) -> None:
    """Takes note of how these ended; the event loop reports what fails with nobody to ask as an error of ours."""
    for future in futures:
        if future.done() and not future.cancelled():
            future.exception()


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancels tasks and waits for their end, twice: psycopg asks the server to end a running query first, and waits
    seconds for one that does not answer; cancelled again, it closes the connection. How they end is of no interest."""
    for _ in range(2):
        for task in tasks:
            task.cancel()
        _, running = await asyncio.wait(tasks, timeout=_ASKED_S)
        if not running:
            break
    else:
        await asyncio.wait(tasks, timeout=_ENDING_S)
    retrieve(*tasks)
