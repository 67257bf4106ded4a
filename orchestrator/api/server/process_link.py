"""The link between the API's process and the delivering one: messages over a pair of sockets."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from contextlib import suppress

import msgspec

from orchestrator.metrics import Samples

_FRESH_S = 1.0
_ANSWER_S = 5.0
_MAX_BYTES = 2**26


class Message(msgspec.Struct, omit_defaults=True):
    """`kind` is ``serving``, ``failed`` with `text`, or ``ask`` from the API, and ``stop`` or ``samples`` to it.

    After a failure that is `passing`, another try may succeed.
    """

    kind: str
    text: str = ""
    passing: bool = False
    samples: Samples = msgspec.field(default_factory=dict)


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode


class Link:
    """One end of the link. Messages arrive whole and in order, until the other process ends."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, end: socket.socket) -> Link:
        return cls(*await asyncio.open_connection(sock=end, limit=_MAX_BYTES))

    def send(self, message: Message) -> None:
        self.send_raw(_encode(message))

    def send_raw(self, data: bytes) -> None:
        self._writer.write(len(data).to_bytes(4, "big") + data)

    async def receive(self) -> Message | None:
        """The next message; None: the other process has ended."""
        data = await self.receive_raw()
        return None if data is None else _decode(data)

    async def receive_raw(self) -> bytes | None:
        try:
            size = int.from_bytes(await self._reader.readexactly(4), "big")
            return await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, OSError):
            return None

    async def close(self) -> None:
        """Sends what is left, unless the other process has ended."""
        with suppress(OSError):
            await self._writer.drain()
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()


class Deliverer:
    """The delivering process, as the API's process sees it."""

    def __init__(self, link: Link, stop: asyncio.Event) -> None:
        self._link = link
        self._stop = stop
        self._answered_s = 0.0
        self._answered = asyncio.Event()
        self._asked = False
        self._samples: Samples = {}

    async def listen(self) -> None:
        """Sets `stop` when the delivering process says so; ends this process when that one has ended."""
        while (message := await self._link.receive()) is not None:
            if message.kind == "stop":
                self._stop.set()
            else:
                self._samples = message.samples
                self._answered_s = time.monotonic()
                self._asked = False
                self._answered.set()
        os._exit(1)  # otherwise nothing would ever end this process

    async def samples(self) -> Samples | None:
        """Its metrics, no older than a second; None when its event loop does not answer.

        Concurrent callers share one question.
        """
        if time.monotonic() - self._answered_s >= _FRESH_S:
            if not self._asked:
                self._asked = True
                self._answered.clear()
                self._link.send(Message("ask"))
            try:
                async with asyncio.timeout(_ANSWER_S):
                    await self._answered.wait()
            except TimeoutError:
                return None
        return self._samples
