"""One connection of a client: uvicorn's, within bounds on all that it may send before, while and after it asks.

uvicorn and the parser below it take request lines and headers of any size, and time only idle connections. So
what arrives is counted on its way to the parser, in pieces, and each stage of a request has its deadline, which
one sweep a second looks at: no request pays for a timer.
"""

from __future__ import annotations

import asyncio
import math
from enum import Enum
from typing import TYPE_CHECKING, Any, NoReturn

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from orchestrator.api import refusals
from orchestrator.api.refusals import MAX_HEADERS, MAX_TARGET_BYTES, Refusal

if TYPE_CHECKING:
    from orchestrator.api.front import Front

_PIECE = 16_384
_MAX_PIPELINED = 64
_MAX_DISCARDED = 2**28  # of what was on its way when it was refused
_SMALL_BODY = 65_536  # is taken even when memory is short


class Stage(Enum):
    """What is waited for: the client, but for ANSWER."""

    NEW = "new"
    HEAD = "head"
    BODY = "body"
    ANSWER = "answer"
    IDLE = "idle"
    CLOSING = "closing"


class _StopError(Exception):
    """Stops the parser."""


class Connection(HttpToolsProtocol):
    """Made by `Front`, which looks at `stage`, `since` and `deadline`, in seconds of the event loop's clock."""

    def __init__(self, front: Front, **given: Any) -> None:
        super().__init__(**given)
        self._front = front
        self.stage = Stage.NEW
        self.since = 0.0
        self.deadline = 0.0
        self.address = ""
        self.body_bytes = 0  # that it holds in memory
        self.unread_since: float | None = None
        self._broken: Refusal | None = None
        self._refusal: Refusal | None = None
        self._unanswered = 0
        self._target = 0
        self._head = 0
        self._silent = 0  # bytes since the parser last told of anything
        self._around = 0  # bytes of a body that are not in it
        self._discarded = 0

    # The transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._enter(Stage.NEW)
        self._front.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._front.forget(self)

    def data_received(self, data: bytes) -> None:
        before = self.stage
        if before is Stage.CLOSING:
            self._discard(len(data))
            return
        self._unset_keepalive_if_required()
        if len(data) <= _PIECE:
            self._feed(data)
        else:
            view = memoryview(data)
            for start in range(0, len(data), _PIECE):
                self._feed(view[start : start + _PIECE])
                if self.stage is Stage.CLOSING:
                    break
        if self.stage is Stage.CLOSING:
            return
        if self.stage is before and before in (Stage.NEW, Stage.IDLE):
            self.stage = Stage.HEAD  # empty lines, or the start of a method
        if self.stage is not before:
            self._enter(self.stage, keep_deadline=before is Stage.NEW and self.stage is Stage.HEAD)

    def _feed(self, piece: bytes | memoryview) -> None:
        size = len(piece)
        self._silent += size
        if self.stage is Stage.BODY:
            self._around += size
            if self.cycle.response_complete:
                self._discard(size)  # of a body that nobody wants
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            pass  # it is answered as what it is besides, a request
        except httptools.HttpParserError:
            self._refuse(self._broken or refusals.MALFORMED)
        else:
            if self._silent > self._front.max_head_bytes:
                self._refuse(refusals.HEADERS)

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > _MAX_DISCARDED:
            self.transport.abort()

    # The parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.stage = Stage.HEAD
        self._target = self._head = self._silent = self._around = self._discarded = 0

    def on_url(self, url: bytes) -> None:
        self._silent = 0
        self._target += len(url)
        if self._target > MAX_TARGET_BYTES:
            self._break(refusals.TARGET)
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._silent = 0
        self._head += len(name) + len(value) + 4
        if self._head + self._target > self._front.max_head_bytes or len(self.headers) >= MAX_HEADERS:
            self._break(refusals.HEADERS)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._unanswered >= _MAX_PIPELINED:
            self._break(refusals.PIPELINED)
        super().on_headers_complete()
        self._unanswered += 1
        self.stage = Stage.BODY

    def on_body(self, body: bytes) -> None:
        size = len(body)
        self._silent = 0
        self._around -= size
        if self._around > self._front.max_head_bytes + 2 * self.body_bytes:
            self._break(refusals.CHUNKS)
        if not self.cycle.response_complete:
            self.body_bytes += size
            if not self._front.takes_body(size) and self.body_bytes > _SMALL_BODY:
                self._break(refusals.MEMORY)
            super().on_body(body)

    def _break(self, refusal: Refusal) -> NoReturn:
        self._broken = refusal
        raise _StopError

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._silent = 0
        self.stage = Stage.ANSWER if self._unanswered else Stage.IDLE

    # Answers

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()  # that is one of the deadlines
        self._unanswered -= 1
        if self._unanswered:
            return
        self._front.give_back(self)
        if self.stage is Stage.ANSWER:
            self._enter(Stage.IDLE)
        elif self._refusal is not None:
            self._send_refusal(self._refusal)

    def send_400_response(self, msg: str) -> None:
        self._refuse(refusals.MALFORMED)

    def _refuse(self, refusal: Refusal) -> None:
        """Takes no more from it, and says why once all before it is answered."""
        if self.stage is Stage.CLOSING:
            return
        self._front.note(refusal)
        self._unset_keepalive_if_required()
        self._refusal = refusal
        if self.stage is Stage.BODY and not self.cycle.response_complete and not self._give_up():
            self.transport.abort()
        self._enter(Stage.CLOSING)
        self.flow.resume_reading()
        if self._unanswered:
            self.deadline = math.inf
        else:
            self._send_refusal(refusal)

    def _give_up(self) -> bool:
        """Ends the request whose body is arriving, as if its client had gone; False if its answer has begun."""
        self._unanswered -= 1
        if self.pipeline and self.pipeline[0][0] is self.cycle:
            self.pipeline.popleft()
            return True
        self.cycle.disconnected = True
        self.cycle.message_event.set()
        return not self.cycle.response_started

    def _send_refusal(self, refusal: Refusal) -> None:
        """Sends it and half closes: closing at once would reset a client that is still sending, unread."""
        if not self.transport.is_closing():
            self._unset_keepalive_if_required()
            self._front.give_back(self)
            self._enter(Stage.CLOSING)
            self.transport.write(refusal.response)
            self.transport.write_eof()

    # The front

    @property
    def waits(self) -> bool:
        """Whether it waits for its client, and for nothing that the client waits for."""
        if self.stage is Stage.ANSWER or self.transport.is_closing():
            return False
        return self._unanswered == (self.stage is Stage.BODY)

    def refuse(self, refusal: Refusal, *, linger: bool = True) -> None:
        """Refuses what it is about to ask. Without `linger` its descriptor is free at once."""
        self._refuse(refusal)
        if not linger and not self._unanswered:
            self.transport.close()

    def overdue(self) -> None:
        """Its deadline is over."""
        match self.stage:
            case Stage.NEW | Stage.HEAD:
                self._refuse(refusals.NO_HEAD)
            case Stage.BODY if not self.cycle.response_complete:
                self._refuse(refusals.NO_BODY)
            case _:
                self.transport.abort()

    def _enter(self, stage: Stage, *, keep_deadline: bool = False) -> None:
        self.stage = stage
        self.since = self.loop.time()
        if not keep_deadline:
            self.deadline = self.since + self._front.timeouts_s[stage]
