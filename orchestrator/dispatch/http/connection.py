"""A connection to a receiver, with one request under way at most.

Interim answers (1xx, except 101) are removed before the parser sees them: some are long, or odd, or both.
"""

from __future__ import annotations

import asyncio
import re
import select
from typing import cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from orchestrator.dispatch.http.answer import (
    HEAD_END,
    STATUS_LINE,
    STATUS_LINE_BEGUN,
    Answer,
    BrokenAnswerError,
    BrokenBodyError,
    InterimError,
    head_of,
)

HEAD_BYTES = 32_768  # the longest head of an answer
EXCERPT_BYTES = 4096  # of a body are kept
BODY_WAIT_S = 1.0
"""How long an attempt waits for the rest of a body, after its status has decided it."""
_INTERIM_BYTES = 2**20  # of interim answers; reading them without end would delay other deliveries
_LINE_BYTES = 16_384  # no status line is longer
_FINAL = re.compile(rb"HTTP/1\.1 [02-9][0-9]{2}[ \r]")  # how most answers begin
_SWITCHING_PROTOCOLS = 101
# Checking an idle connection costs a system call; one that was reused before and has just answered is not checked.
_JUST_NOW_S = 0.05
_TICK_S = 0.001  # to which uvloop rounds its timers


class Connection(asyncio.Protocol):
    """Sends a request and reads its answer. Afterwards it is `reusable`, or closed.

    Its timer outlives a request, and is set again when it rings before the deadline of a later one: to set and cancel
    one for each request would add 40 % to what a request costs here.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, most_body_bytes: int) -> None:
        self._loop = loop
        self._most_body_bytes = most_body_bytes
        self._transport: asyncio.Transport | None = None
        self._parser = HttpResponseParser(self)
        # Old servers bend these rules; what follows one answer on a connection is never taken for another.
        self._parser.set_dangerous_leniencies(
            lenient_headers=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
        )
        self._answer: asyncio.Future[Answer] | None = None
        self._deadline_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._uses = 0
        self._early = b""  # what came before the first request
        self._lost = False
        self._lost_by: Exception | None = None
        self._poll: select.poll | None = None
        self.rested_s = 0.0
        self._expect()

    def _expect(self) -> None:
        self._received = b""
        self._body = b""
        self._body_bytes = 0
        self._status: int | None = None  # once its head is complete
        self._decided = False  # whether only the rest of a body is waited for
        self._complete = False
        self._keep = False
        self._final = False  # whether the final answer has begun
        self._in_interim = False
        self._interim_bytes = 0
        self._held = b""  # bytes that may or may not belong to it

    @property
    def reusable(self) -> bool:
        """Whether the last answer is complete, and another request may follow it."""
        return self._answer is None and self._transport is not None and not self._transport.is_closing()

    def post(self, request: bytes, deadline_s: float) -> asyncio.Future[Answer]:
        """Sends the request. The answer comes by the deadline, by the clock of the loop, or is an error by then."""
        if self._transport is None:
            raise RuntimeError("this connection is not open")
        self._uses += 1
        self._answer = answer = self._loop.create_future()
        self._set_deadline(deadline_s)
        if not self._transport.is_closing():
            self._transport.write(request)
        if self._uses == 1:
            self._catch_up()
        return answer

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def is_quiet(self) -> bool:
        """Whether nothing has come since its last answer, as it must be before another request is sent."""
        if not self.reusable or self._transport is None:
            return False
        if self._uses > 1 and self._loop.time() - self.rested_s < _JUST_NOW_S:
            return True
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not self._poll.poll(0)

    # Called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # no subclass, in uvloop

    def data_received(self, data: bytes) -> None:
        if self._answer is None:  # nobody has asked for anything
            self._early += data
            if self._uses or len(self._early) > HEAD_BYTES:
                self.abort()
            return
        if not self._final:
            if self._held or self._in_interim or not _FINAL.match(data):
                data = self._without_interim(data)
                if self._interim_bytes > _INTERIM_BYTES:
                    self._end(InterimError(f"more than {_INTERIM_BYTES} bytes of interim answers"))
                    return
                if not data:
                    return
            self._final = True
        if self._status is None:
            self._received += data[:HEAD_BYTES]
            if len(self._received) >= HEAD_BYTES and not HEAD_END.search(self._received.lstrip(b"\r\n")):
                self._end(BrokenAnswerError(f"its head has more than {HEAD_BYTES} bytes"))
                return
        fault = None
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:
            self._complete = True
        except HttpParserError as error:
            fault = error
        if self._complete:
            self._keep = self._keep and fault is None
            self._end(None)
        elif fault is not None:
            self._end(BrokenAnswerError(str(fault)) if self._status is None else BrokenBodyError())
        elif self._status == _SWITCHING_PROTOCOLS or self._body_bytes > self._most_body_bytes:
            self._end(None)
        elif self._status is not None and not self._decided:
            self._decided = True
            self._set_deadline(min(self._deadline_s, self._loop.time() + BODY_WAIT_S))

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost, self._lost_by = True, exc
        if self._timer is not None:
            self._timer.cancel()
        if self._answer is None:
            return
        if self._status is None:
            self._end(exc or ConnectionResetError())
        elif exc is None and not self._has_length():
            self._end(None)  # such a body ends with the connection
        else:
            self._end(BrokenBodyError())

    # Called by the parser

    def on_message_begin(self) -> None:
        if self._complete:
            self._keep = False  # a second answer

    def on_headers_complete(self) -> None:
        if not self._complete:
            self._status = self._parser.get_status_code()
            self._keep = self._parser.should_keep_alive() and self._status != _SWITCHING_PROTOCOLS

    def on_body(self, chunk: bytes) -> None:
        if not self._complete:
            self._body_bytes += len(chunk)
            self._body += chunk[: EXCERPT_BYTES - len(self._body)]

    def on_message_complete(self) -> None:
        self._complete = True

    def _catch_up(self) -> None:
        """Takes in what came before the first request: some receivers turn a connection away as soon as it is made."""
        if self._early:
            self.data_received(self._early)
        if self._lost and self._answer is not None:
            self.connection_lost(self._lost_by)

    def _has_length(self) -> bool:
        head = head_of(self._received)
        return head is not None and bool(head.values(b"content-length") or head.values(b"transfer-encoding"))

    def _without_interim(self, data: bytes) -> bytes:
        """The part of `data` that belongs to the final answer; b"": none that is known to."""
        data = self._held + data
        at = 0
        final = False
        while True:
            if self._in_interim:
                end = HEAD_END.search(data, at)
                past = end.end() if end else max(at, len(data) - 2)  # the start of such an end, perhaps
                self._interim_bytes += past - at
                at = past
                if end is None:
                    break
                self._in_interim = False
            line = STATUS_LINE.match(data, at)
            if line is None or line[1][:1] != b"1" or line[1] == b"101":
                final = line is not None or len(data) - at >= _LINE_BYTES or not STATUS_LINE_BEGUN.match(data, at)
                break
            self._in_interim = True
            self._interim_bytes += line.end() - 1 - at
            at = line.end() - 1
        self._held = b"" if final else data[at:]
        return data[at:] if final else b""

    def _end(self, error: Exception | None) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():  # else its task was cancelled
            answer.set_result(Answer(self._status or 0, self._received, self._body, error))
        if self._complete and self._keep and self._transport and not self._transport.get_write_buffer_size():
            self.rested_s = self._loop.time()
            self._expect()
        else:
            self.abort()

    def _set_deadline(self, at_s: float) -> None:
        self._deadline_s = at_s
        if self._timer is not None and self._timer.when() > at_s:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_at(at_s, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._answer is None:
            return
        if self._loop.time() < self._deadline_s - _TICK_S:
            self._set_deadline(self._deadline_s)
        else:
            self._end(TimeoutError() if self._status is None else None)
