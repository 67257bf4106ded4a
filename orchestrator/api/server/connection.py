"""One connection of a client: uvicorn's, with bounds on all that the client may send.

uvicorn and its parser accept request lines and headers of any size, and time out only idle connections. So incoming
bytes are counted in pieces before the parser gets them, and each stage of a request has a deadline. One sweep a second
checks the deadlines, so that no request pays for a timer.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any, NoReturn

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from orchestrator.api.server import refusals
from orchestrator.api.server.exchange import Exchange
from orchestrator.api.server.refusals import MAX_HEADERS, MAX_TARGET_BYTES, Refusal

if TYPE_CHECKING:
    from orchestrator.api.server.connection_limits import ConnectionLimits

_PIECE = 16_384
_MAX_PIPELINED = 64
_MAX_DISCARDED = 2**28  # of bytes that were on their way when the request was refused
_SMALL_BODY = 65_536  # is accepted even when memory is short


NEW, HEAD, BODY, ANSWER, IDLE, CLOSING = range(6)
"""Stages of a connection. In ANSWER the client waits, in the others the server does. Plain numbers, for speed."""


_ABOUT_BODY = (b"content-length", b"transfer-encoding")


class _StopError(Exception):
    """Stops the parser."""


class _Body:
    """Passes on a parser's calls about the body, and no others."""

    def __init__(self, connection: Connection) -> None:
        self.on_body = connection.on_body
        self.on_message_complete = connection.complete


class Connection(HttpToolsProtocol):
    """Made by `ConnectionLimits`, which looks at `stage`, `since` and `deadline`, in the event loop's seconds."""

    def __init__(self, limits: ConnectionLimits, **given: Any) -> None:
        super().__init__(**given)
        self._limits = limits
        self.stage = NEW
        self.since = 0.0
        self.deadline = 0.0
        self.address = ""
        self.body_bytes = 0  # bytes of bodies that it holds in memory
        self.unread_since: float | None = None
        self._begun = False  # whether a request has begun since data last came
        self._broken: Refusal | None = None
        self._refusal: Refusal | None = None
        self._unanswered = 0
        self._head = 0  # bytes of the target, the headers and the trailers
        self._body = 0
        self._silent = 0  # bytes since the parser last called back
        self._around = 0  # bytes that frame the chunks of a body
        self._discarded = 0

    # The transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._enter(NEW)
        self._limits.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._limits.forget(self)

    def data_received(self, data: bytes) -> None:
        before = self.stage
        if before == CLOSING:
            self._discard(len(data))
            return
        if len(data) <= _PIECE:
            self._feed(data)
        else:
            view = memoryview(data)
            for start in range(0, len(data), _PIECE):
                self._feed(view[start : start + _PIECE])
                if self.stage == CLOSING:
                    break
        stage, begun, self._begun = self.stage, self._begun, False
        if stage == ANSWER:
            self.deadline = math.inf
        elif stage != CLOSING and (begun or stage != before or stage in (NEW, IDLE)):
            # Bytes without a call of the parser may be empty lines, or the start of a method.
            self._enter(HEAD if stage in (NEW, IDLE) else stage, keep_deadline=before == NEW and stage != BODY)

    def _feed(self, piece: bytes | memoryview) -> None:
        size = len(piece)
        told = self._head + self._body
        if self.stage == BODY:
            self._around += size
            if self.cycle.response_complete:
                self._discard(size)  # of a body that no handler reads
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline(piece[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(self._broken or refusals.MALFORMED)
        else:
            if self.stage == ANSWER:
                return
            self._silent = self._silent + size if told == self._head + self._body else 0
            if self._silent > self._limits.max_head_bytes:
                self._refuse(refusals.HEADERS)

    def _decline(self, rest: bytes | memoryview) -> None:
        """Treats a request that offers another protocol, as clients of HTTP/2 do, as a plain one.

        The parser does not read the body of such a request; a second parser, which sees no offer, does.
        """
        self.cycle.keep_alive = False
        self.parser = httptools.HttpRequestParser(_Body(self))
        about_body = [b"%s: %s\r\n" % field for field in self.headers if field[0] in _ABOUT_BODY]
        self.parser.feed_data(b"".join((b"POST / HTTP/1.1\r\n", *about_body, b"\r\n")))
        if rest:
            self._feed(rest)

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > _MAX_DISCARDED:
            self.transport.abort()

    # The parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.stage, self._begun = HEAD, True
        self._head = self._body = self._silent = self._around = self._discarded = 0

    def on_url(self, url: bytes) -> None:
        self.url += url
        self._head += len(url)
        if len(self.url) > MAX_TARGET_BYTES:
            self._break(refusals.TARGET)

    def on_header(self, name: bytes, value: bytes) -> None:
        headers = self.headers
        self._head += len(name) + len(value) + 4
        if self._head > self._limits.max_head_bytes or len(headers) >= MAX_HEADERS:
            self._break(refusals.HEADERS)
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._unanswered >= _MAX_PIPELINED:
            self._break(refusals.PIPELINED)
        self._start()
        self._unanswered += 1
        self.stage = BODY

    def _start(self) -> None:
        """As uvicorn's on_headers_complete() does it, with an `Exchange`, and without what is off here."""
        parser, scope = self.parser, self.scope
        version = parser.get_http_version()
        url = httptools.parse_url(self.url)
        scope["method"] = parser.get_method().decode("ascii")
        scope["http_version"] = version
        scope["raw_path"] = url.path
        scope["path"] = url.path.decode("ascii")
        scope["query_string"] = url.query or b""
        self.cycle = Exchange(
            scope,
            self.transport,
            self.flow,
            self.logger,
            self.access_logger,
            self.access_log,
            self.server_state.default_headers,
            asyncio.Event(),
            self.expect_100_continue,
            version != "1.0" and parser.should_keep_alive() and not self._limits.draining,
            self.on_response_complete,
        )
        if self._unanswered:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))
        else:
            self._start_asgi_task(self.cycle, self.app)

    def on_body(self, body: bytes) -> None:
        size = len(body)
        self._body += size
        self._around -= size
        if self._around > self._limits.max_head_bytes + 2 * self._body:
            self._break(refusals.CHUNKS)
        if not self.cycle.response_complete:
            self.body_bytes += size
            if not self._limits.takes_body(size) and self.body_bytes > _SMALL_BODY:
                self._break(refusals.MEMORY)
            super().on_body(body)

    def _break(self, refusal: Refusal) -> NoReturn:
        self._broken = refusal
        raise _StopError

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            self.complete()

    def complete(self) -> None:
        """Notes that the whole request has arrived."""
        super().on_message_complete()
        self.stage = ANSWER if self._unanswered else IDLE

    # Answers

    def on_response_complete(self) -> None:
        self._unanswered -= 1
        if self.pipeline:
            super().on_response_complete()
            return
        # As uvicorn does it, but without its timer: the deadline of IDLE replaces that.
        self.server_state.total_requests += 1
        self._limits.give_back(self)
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.stage == ANSWER:
            self._enter(IDLE)
        elif self._refusal is not None:
            self._send_refusal(self._refusal)

    def send_400_response(self, msg: str) -> None:
        self._refuse(refusals.MALFORMED)

    def _refuse(self, refusal: Refusal) -> None:
        """Stops reading requests, and sends the refusal once all earlier requests are answered."""
        if self.stage == CLOSING:
            return
        self._limits.note(refusal)
        self._refusal = refusal
        if self.stage == BODY and not self.cycle.response_complete and not self._give_up():
            self.transport.abort()
        self._enter(CLOSING)
        self.flow.resume_reading()
        if self._unanswered:
            self.deadline = math.inf
        else:
            self._send_refusal(refusal)

    def _give_up(self) -> bool:
        """Ends the request whose body is arriving, as if its client had left; False if its answer has begun."""
        self._unanswered -= 1
        if self.pipeline and self.pipeline[0][0] is self.cycle:
            self.pipeline.popleft()
            return True
        self.cycle.disconnected = True
        self.cycle.message_event.set()
        return not self.cycle.response_started

    def _send_refusal(self, refusal: Refusal) -> None:
        """Sends the refusal and half-closes: closing would reset a client that still sends and has not read it."""
        if not self.transport.is_closing():
            self._limits.give_back(self)
            self._enter(CLOSING)
            self.transport.write(refusal.response)
            if self.transport.can_write_eof():  # with TLS the client closes, or the deadline does
                self.transport.write_eof()

    def shutdown(self) -> None:
        if self.stage != HEAD:  # whose request is answered, as the last one
            super().shutdown()

    # Limits of all clients

    @property
    def waits(self) -> bool:
        """Whether it waits for its client, while the client waits for no answer."""
        if self.stage == ANSWER or self.transport.is_closing():
            return False
        return self._unanswered == (self.stage == BODY)

    def refuse(self, refusal: Refusal, *, linger: bool = True) -> None:
        """Refuses the next request. Without `linger` the descriptor is free at once."""
        self._refuse(refusal)
        if not linger and not self._unanswered:
            self.transport.close()

    def overdue(self) -> None:
        """Ends the connection, whose deadline is over."""
        if self.stage in (NEW, HEAD):
            self._refuse(refusals.NO_HEAD)
        elif self.stage == BODY and not self.cycle.response_complete:
            self._refuse(refusals.NO_BODY)
        else:
            self.transport.abort()

    def _enter(self, stage: int, *, keep_deadline: bool = False) -> None:
        self.stage = stage
        self.since = self.loop.time()
        if not keep_deadline:
            self.deadline = self.since + self._limits.timeouts_s[stage]
