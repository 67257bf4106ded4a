"""What tests serve with leaves nothing behind, although connections are still being made when it ends."""

from __future__ import annotations

import asyncio
import gc
import socket
from contextlib import ExitStack

import pytest

from tests.support.serving import serving


async def reads(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("rounds", range(4))
def test_no_socket_is_left_of_connections_that_are_just_being_made(rounds: int) -> None:
    async def connects(port: int) -> None:
        while True:
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            await asyncio.sleep(0)

    async def ends() -> None:
        async with serving(reads) as port:
            connecting = asyncio.create_task(connects(port))
            for _ in range(rounds):
                await asyncio.sleep(0)
        connecting.cancel()

    with ExitStack() as clients:
        asyncio.run(ends())
        gc.collect()  # a socket that was never closed is an error
