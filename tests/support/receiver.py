"""A webhook receiver on a real socket that records what arrives and answers as a test tells it to.

It speaks just enough HTTP/1.1 (keep-alive, Content-Length and chunked bodies) and is made of raw streams,
since most of what it is for is misbehaving: dripping, hanging, and closing connections at bad moments.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Literal, Self

from tests.support.serving import serving
from tests.support.waiting import eventually


@dataclass(frozen=True)
class Received:
    """One request. `headers` has lower-case names; `arrived_at`: Unix time of its first line."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    arrived_at: float
    connection: int  # numbers the TCP connections, from 1


@dataclass(frozen=True)
class Answer:
    """What to answer. The default is a prompt 204."""

    status: int = 204
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0  # before the status line; math.inf never answers
    drip_s: float | None = None  # a pause before each byte of the body
    endless: bool = False  # the body is sent again and again, without a Content-Length
    close: Literal["never", "before answer", "mid-body", "after answer"] = "never"


HANG = Answer(delay_s=math.inf)
CLOSE = Answer(close="before answer")


def redirect(location: str, status: int = 302) -> Answer:
    return Answer(status, headers={"Location": location})


class Receiver:
    """Listens on 127.0.0.1 while entered. All requests, in order of arrival, are in `requests`."""

    def __init__(self) -> None:
        self.requests: list[Received] = []
        self.connections = 0
        self.port = 0
        self._scripts: dict[str, list[Answer]] = {}
        self._serving = AsyncExitStack()

    def url(self, path: str = "/") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def script(self, path: str, *answers: Answer) -> str:
        """Answers requests to the path, whatever their query, with these in turn, the last one ever after.

        Returns the path's URL.
        """
        self._scripts[path] = list(answers)
        return self.url(path)

    def received(self, path: str) -> list[Received]:
        """The requests to one path, whatever their query, in order of arrival."""
        return [request for request in self.requests if request.path.partition("?")[0] == path]

    async def wait_for(self, count: int, path: str | None = None, timeout_s: float = 10.0) -> list[Received]:
        """Waits until at least so many requests have come, to one path or to all, and returns them."""

        def arrived() -> tuple[list[Received]]:
            found = self.requests if path is None else self.received(path)
            assert len(found) >= count, f"{len(found)} of {count} requests have arrived"
            return (list(found),)

        return (await eventually(arrived, timeout_s))[0]

    async def __aenter__(self) -> Self:
        self.port = await self._serving.enter_async_context(serving(self._accept, port=self.port))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._serving.aclose()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        try:
            # Ends with the client's connection, or when the receiver stops.
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._exchange(reader, writer, number):
                    pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> bool:
        """One request and its answer; False when the connection is to be closed."""
        line = await reader.readuntil(b"\r\n")
        arrived_at = time.time()
        method, path, _ = line.decode("latin-1").split(" ", 2)
        headers: dict[str, str] = {}
        while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        body = await _read_body(reader, headers)
        self.requests.append(Received(method, path, headers, body, arrived_at, number))
        answer = self._next_answer(path)
        if math.isinf(answer.delay_s):
            await reader.read()  # until the client gives up
            return False
        await asyncio.sleep(answer.delay_s)
        if answer.close == "before answer":
            return False
        await _send(writer, answer)
        keep = answer.close == "never" and not answer.endless
        return keep and headers.get("connection", "").lower() != "close"

    def _next_answer(self, path: str) -> Answer:
        answers = self._scripts.get(path.partition("?")[0], [])
        if len(answers) > 1:
            return answers.pop(0)
        return answers[0] if answers else Answer()


async def _read_body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.readexactly(int(headers.get("content-length", "0")))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readuntil(b"\r\n")
    return body


async def _send(writer: asyncio.StreamWriter, answer: Answer) -> None:
    headers = dict(answer.headers)
    if not answer.endless and answer.status not in (204, 304):
        headers.setdefault("Content-Length", str(len(answer.body)))
    lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
    body = answer.body[: len(answer.body) // 2] if answer.close == "mid-body" else answer.body
    while True:
        if answer.drip_s is None:
            writer.write(body)
            await writer.drain()
        else:
            for byte in body:
                await asyncio.sleep(answer.drip_s)
                writer.write(bytes([byte]))
                await writer.drain()
        if not answer.endless:
            return
        await asyncio.sleep(0)
