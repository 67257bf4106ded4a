"""Listens to notifications of the database. They are hints: whoever misses one finds its work by polling."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from typing import LiteralString

from orchestrator.database.connection import connect, translated
from orchestrator.settings import Settings

_HEARING_S = 60.0
_ANSWER_S = 30.0
_BACKOFF_S = 5.0

_log = logging.getLogger(__name__)


async def listen(
    settings: Settings,
    channel: LiteralString,
    on_notified: Callable[[str], None],
    on_listening: Callable[[bool], None] = lambda _: None,
) -> None:
    """Calls `on_notified` with the payload of each notification, for ever, on a connection that it does not share.

    Calls `on_listening` whenever it begins to hear notifications, and with False when it may miss them from now on.

    Notifications are missed while that connection is lost. Through a pooler all of them are: a listening session would
    have to stay with its client.
    """
    heard = True
    while True:
        try:
            async with await connect(settings, "listen") as connection:
                if connection.pooled:
                    if heard:
                        _log.warning(
                            "not listening, only polling: DATABASE_URL leads through a pooler",
                            extra={"channel": channel},
                        )
                    heard = False
                    await connection.close()
                    await asyncio.Event().wait()
                with translated():
                    async with asyncio.timeout(_ANSWER_S):
                        await connection.execute(f"listen {channel}")
                    heard = True
                    on_listening(True)
                    while True:
                        async for notification in connection.notifies(timeout=_HEARING_S):
                            with suppress(ValueError):  # anybody may notify anything
                                on_notified(notification.payload)
                        async with asyncio.timeout(_ANSWER_S):
                            await connection.execute("select 1")  # to find out whether the server still answers
        except Exception as error:
            if heard:
                context = {"channel": channel, "error": str(error)}
                _log.warning("not listening; polling until the connection is back", extra=context)
            heard = False
            on_listening(False)
        await asyncio.sleep(_BACKOFF_S * random.uniform(0.2, 1.0))
