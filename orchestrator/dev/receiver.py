"""A small fast receiver of webhooks, for the demo and for `orchestrator dev`.

Run as a program it is a process of its own that the demo talks to over pipes: ``python -m
orchestrator.dev.receiver`` reads one line, ``{"secrets": [...]}``, and answers ``{"port": ...}``. Each further
line, ``count`` or ``report``, is answered with a line of JSON. It ends with its standard input, so it never
outlives who started it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import httptools
import uvloop

from orchestrator.dispatch.http.signing import Signer

_NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"
_BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Webhook(NamedTuple):
    """A request as it came; `headers` by lower-case name, `arrived_at` the Unix time of its first bytes."""

    path: str
    headers: dict[str, str]
    body: bytes
    arrived_at: float

    @property
    def id(self) -> str:
        return self.headers.get("webhook-id", "")

    def is_signed_by(self, signer: Signer) -> bool:
        """Whether one of its signatures is one that `signer` makes; its age does not matter here."""
        timestamp = self.headers.get("webhook-timestamp", "")
        if not timestamp.isdecimal():
            return False
        expected = signer.signature(self.id, int(timestamp), self.body)
        return not set(expected.split()).isdisjoint(self.headers.get("webhook-signature", "").split())


class ReceiverProtocol(asyncio.Protocol):
    """HTTP/1.1 with keep-alive: answers every request with 204 and hands it to `on_webhook`."""

    def __init__(self, on_webhook: Callable[[Webhook], None]) -> None:
        self._on_webhook = on_webhook
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._arrived_at = 0.0
        self._path = ""
        self._headers: dict[str, str] = {}
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but ancestry

    def close(self) -> None:
        """Closes its connection, which the end of the server does not."""
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if self._transport is not None:
                self._transport.write(_BAD_REQUEST)
                self._transport.close()

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._arrived_at = time.time()
        self._headers = {}
        self._path = ""
        self._body = b""

    def on_url(self, url: bytes) -> None:
        self._path += url.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._transport is not None:
            self._transport.write(_NO_CONTENT)
        self._on_webhook(Webhook(self._path, self._headers, self._body, self._arrived_at))


async def listen(on_webhook: Callable[[Webhook], None], port: int = 0) -> asyncio.Server:
    """A receiver on 127.0.0.1; port 0 takes any that is free."""
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: ReceiverProtocol(on_webhook), "127.0.0.1", port, backlog=2048)


class Record:
    """What arrived: ids and times of arrival, in order, and how many signatures were wrong."""

    def __init__(self, secrets: Sequence[str]) -> None:
        self._signer = Signer(secrets)
        self.ids: list[str] = []
        self.arrived_at: list[float] = []
        self.wrongly_signed = 0

    def add(self, webhook: Webhook) -> None:
        self.ids.append(webhook.id)
        self.arrived_at.append(webhook.arrived_at)
        self.wrongly_signed += not webhook.is_signed_by(self._signer)


async def _serve() -> None:
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    record = Record(json.loads(await commands.readline())["secrets"])
    async with await listen(record.add) as server:
        _answer({"port": server.sockets[0].getsockname()[1]})
        while command := await commands.readline():
            if command == b"count\n":
                _answer({"count": len(record.ids)})
            else:
                _answer({"ids": record.ids, "arrived_at": record.arrived_at, "wrongly_signed": record.wrongly_signed})


def _answer(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve())
