"""A TCP proxy before a database that cuts connections at bad moments, the worst: after the commit, before its reply."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

from tests.support.serving import serving

_READY_FOR_QUERY = b"Z\x00\x00\x00\x05I"  # what a server sends last, when the transaction has been committed


class CuttingProxy:
    """Forwards connections to a database. `cut_after` and others arm it for the next statement with some text in it."""

    def __init__(self, database_url: str) -> None:
        self._target = urlsplit(database_url)
        self._serving = AsyncExitStack()
        self._port = 0
        self._armed: bytes | None = None
        self._later: list[bytes] = []
        self._way = ""
        self._refusing = False
        self._hanging = False
        self._accepted = 0
        self._silent = 0
        self.cuts = 0
        self._sent = b""

    @property
    def url(self) -> str:
        """The database's URL by way of this proxy."""
        login = self._target.netloc.rpartition("@")[0]
        return urlunsplit(self._target._replace(netloc=f"{login}@127.0.0.1:{self._port}"))

    def cut_after(self, text: str, *later: str) -> None:
        """The next statement that contains the text is forwarded; its reply is not, and the connection ends.

        So it is then with the next one that contains each of the `later` texts, one after another.
        """
        self._armed, self._way = text.encode(), "after"
        self._later = [each.encode() for each in later]

    def cut_during(self, text: str) -> None:
        """The next statement that contains the text is forwarded, and the connection ends while it is carried out."""
        self._armed, self._way = text.encode(), "during"

    def cut_before(self, text: str) -> None:
        """The next statement that contains the text is not forwarded, and the connection ends."""
        self._armed, self._way = text.encode(), "before"

    def cut_at(self, text: str) -> None:
        """As `cut_before`, and no connection is accepted from then on until `mend`."""
        self._armed, self._way = text.encode(), "refuse"

    def hang_at(self, text: str) -> None:
        """From the next statement that contains the text on nothing is forwarded, nor by new connections: they are
        accepted, and never hear anything. Those that begin after `mend` do.
        """
        self._armed, self._way = text.encode(), "hang"

    def hang(self) -> None:
        """As `hang_at`, at once."""
        self._hanging = True
        self._silent = self._accepted  # for ever, whatever is mended
        self.cuts += 1

    def mend(self) -> None:
        self._refusing = self._hanging = False

    def forwarded(self, text: str) -> int:
        """How often statements with this text were forwarded."""
        return self._sent.count(text.encode())

    def refuse(self) -> None:
        """No connection is accepted any more; those there are go on."""
        self._refusing = True

    async def __aenter__(self) -> Self:
        self._port = await self._serving.enter_async_context(serving(self._accept))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._serving.aclose()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(ConnectionError, asyncio.CancelledError):
                if self._hanging:
                    await asyncio.Event().wait()
                if not self._refusing:
                    await self._forward(reader, writer)
        finally:
            writer.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(self._target.hostname, self._target.port)
        swallowing = asyncio.Event()
        self._accepted += 1
        number = self._accepted

        async def upstream() -> None:
            while data := await reader.read(65536):
                if self._armed is not None and self._armed in data:
                    self._armed = self._later.pop(0) if self._later else None
                    if self._way in ("before", "refuse"):
                        self._refusing = self._way == "refuse"
                        self.cuts += 1
                        return
                    if self._way == "hang":
                        self.hang()
                    else:
                        swallowing.set()
                if number <= self._silent:
                    await asyncio.Event().wait()
                self._sent += data
                server_writer.write(data)
                await server_writer.drain()
                if swallowing.is_set() and self._way == "during":
                    self.cuts += 1
                    return

        async def downstream() -> None:
            swallowed = b""
            while data := await server_reader.read(65536):
                if number <= self._silent:
                    await asyncio.Event().wait()
                if swallowing.is_set():
                    swallowed += data
                    if swallowed.endswith(_READY_FOR_QUERY):
                        self.cuts += 1
                        return
                else:
                    writer.write(data)
                    await writer.drain()

        directions = [asyncio.create_task(upstream()), asyncio.create_task(downstream())]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            server_writer.close()
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)
