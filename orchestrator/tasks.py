"""Ending tasks."""

from __future__ import annotations

import asyncio
from typing import Any

_ASKED_S = 0.1
_ENDING_S = 1.0


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancels tasks and waits for their end, twice: psycopg asks the server to end a running query first, and waits
    seconds for one that does not answer; cancelled again, it closes the connection."""
    for _ in range(2):
        for task in tasks:
            task.cancel()
        _, running = await asyncio.wait(tasks, timeout=_ASKED_S)
        if not running:
            return
    await asyncio.wait(tasks, timeout=_ENDING_S)
