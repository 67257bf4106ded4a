"""A webhook receiver on a real socket whose every byte the test decides."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from ssl import SSLContext
from types import TracebackType
from typing import Self

from tests.support.serving import serving


@dataclass
class Request:
    """A request as it came in; header names in lower case, a repeated header joined with commas."""

    line: str
    headers: dict[str, str]
    body: bytes
    connection: int


Answer = Callable[[Request, asyncio.StreamWriter], Awaitable[None]]


def reply(status: int, *headers: str, body: bytes = b"") -> Answer:
    """Answers every request with this status, these header lines and this body."""

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status} Whatever", f"content-length: {len(body)}", *headers]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    return answer


def raw(data: bytes, *, close: bool = False) -> Answer:
    """Answers every request with exactly these bytes, and closes the connection if told to."""

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        if close:
            writer.close()

    return answer


@dataclass
class Receiver:
    """Records requests and answers them as `answer` says; an async context manager."""

    answer: Answer = field(default_factory=lambda: reply(204))
    host: str = "127.0.0.1"
    port: int = 0
    tls: SSLContext | None = None
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    open_connections: int = 0

    async def __aenter__(self) -> Self:
        self._changed = asyncio.Condition()
        self._serving = AsyncExitStack()
        self.port = await self._serving.enter_async_context(serving(self._serve, self.host, self.port, self.tls))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._serving.aclose()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/hook"

    async def until(self, condition: Callable[[Receiver], bool]) -> None:
        """Waits, ten seconds at most, until the condition holds."""
        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(lambda: condition(self))

    async def _note(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open_connections += 1
        number = self.connections
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                while not writer.is_closing():
                    request = await _read_request(number, reader)
                    self.requests.append(request)
                    await self._note()
                    await self.answer(request, writer)
                    await writer.drain()
        finally:
            self.open_connections -= 1
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
            await self._note()


async def _read_request(connection: int, reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    line, *lines = head.split("\r\n")[:-2]
    headers: dict[str, str] = {}
    for name, _, value in (item.partition(":") for item in lines):
        known = headers.get(name.lower())
        headers[name.lower()] = value.strip() if known is None else f"{known},{value.strip()}"
    return Request(line, headers, await reader.readexactly(int(headers.get("content-length", "0"))), connection)
