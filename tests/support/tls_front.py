"""TLS in front of a database, as a server with ssl = on speaks it; the embedded server is built without."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote, urlsplit, urlunsplit

from tests.support.serving import serving

_NO, _YES = b"N", b"S"
_SSL_REQUEST = 80877103


class TlsFront:
    """Takes connections with TLS only, shows them `certificate`, and forwards what they say."""

    def __init__(self, database_url: str, certificate: Path) -> None:
        self._target = urlsplit(database_url)
        self._connections: set[asyncio.Task[None]] = set()
        self._serving = AsyncExitStack()
        self.certificate = certificate
        self.taken = 0

    def url(self, ca_file: Path, host: str = "127.0.0.1") -> str:
        """The database's URL by way of this front, checked in full."""
        login = self._target.netloc.rpartition("@")[0]
        query = f"sslmode=verify-full&sslrootcert={quote(str(ca_file), safe='')}"
        return urlunsplit(self._target._replace(netloc=f"{login}@{host}:{self._port}", query=query))

    def cut(self) -> None:
        """Ends all connections."""
        for connection in self._connections:
            connection.cancel()

    async def __aenter__(self) -> Self:
        self._port = await self._serving.enter_async_context(serving(self._accept))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._serving.aclose()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                if await self._agreed(reader, writer):
                    await self._forward(reader, writer)
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _agreed(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        while (code := int.from_bytes((await reader.readexactly(8))[4:], "big")) != _SSL_REQUEST:
            if code >> 16 != _SSL_REQUEST >> 16:
                return False  # it would go on without
            writer.write(_NO)  # to another kind of encryption
        writer.write(_YES)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate)
        await writer.start_tls(context)
        self.taken += 1
        return True

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._target.hostname, self._target.port)
        try:
            both = asyncio.create_task(_copy(reader, back)), asyncio.create_task(_copy(there, writer))
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in both:
                    each.cancel()
                await asyncio.gather(*both, return_exceptions=True)
        finally:
            back.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
