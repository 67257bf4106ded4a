"""The answer of a receiver so far, read from the bytes of its connection.

A complete status line decides an attempt: a receiver that has sent 200 has the event. When the rest of an answer breaks
a rule or never comes, aiohttp raises an error without the status, so connections keep the start of each answer. Interim
answers (1xx, except 101) are removed before aiohttp or the kept start sees them.
"""

from __future__ import annotations

import re
import select
import time
from contextvars import ContextVar
from typing import Any, NamedTuple

from aiohttp import ClientError
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import BadStatusLine

KEPT_BYTES = 16_384
_INTERIM_BYTES = 2**20  # of interim answers; reading them without end would delay other deliveries
# Checking an idle connection costs a system call; one that was reused before and has just answered is not checked.
_JUST_NOW_S = 0.05
_STATUS_LINE = re.compile(rb"[\r\n]*HTTP/[0-9](?:\.[0-9])?[ \t]+([0-9]{3})(?:[ \t][^\n]*)?\r?\n", re.IGNORECASE)
_LINE_BEGUN = re.compile(rb"[\r\n]*(?:H(?:T(?:T(?:P(?:/[^\n]*)?)?)?)?)?\Z", re.IGNORECASE)  # it may become one
_HEAD_END = re.compile(rb"\n\r?\n")
_FIELD = re.compile(rb"^([!-9;-~]+)[ \t]*:[ \t]*([^\r\n]*)\r?\n", re.MULTILINE)


class Head(NamedTuple):
    """The status of a final answer, and the header lines received so far."""

    status: int
    lines: bytes

    def values(self, name: bytes) -> list[str]:
        """The values of each complete header line of that name, given in lower case."""
        return [
            value.decode("utf-8", "surrogateescape") for key, value in _FIELD.findall(self.lines) if key.lower() == name
        ]


def head_of(received: bytes) -> Head | None:
    """The head of the final answer, as far as it was received; None: no complete status line."""
    line = _STATUS_LINE.match(received)
    if line is None:
        return None
    end = _HEAD_END.search(received, line.end() - 1)
    return Head(int(line[1]), received[line.end() : end.start() + 1 if end else None])


class InterimError(ClientError):
    """A receiver sent too much before its final answer."""


class AnswerProtocol(ResponseHandler):
    """aiohttp's protocol of a connection, which keeps the first `KEPT_BYTES` of each final answer in `received`."""

    received = b""
    idle = False
    _final = False  # whether the final answer has begun
    _in_interim = False
    _held = b""  # bytes that may or may not belong to it
    _interim_bytes = 0
    _uses = 0
    _rested_s = 0.0
    _poll: select.poll | None = None

    def set_response_params(self, **params: Any) -> None:
        self.idle = False
        self._uses += 1
        answering.set(self)
        super().set_response_params(**params)

    def data_received(self, data: bytes) -> None:
        if not self._final and not self.idle:
            data = self._without_interim(data)
            if self._interim_bytes > _INTERIM_BYTES:
                self._give_up(InterimError(f"more than {_INTERIM_BYTES} bytes of interim answers"))
                return
            if not data:
                return
        if len(self.received) < KEPT_BYTES:
            self.received += data
            if len(self.received) >= KEPT_BYTES and head_of(self.received) is None:
                self._give_up(BadStatusLine("no status line"))
                return
        super().data_received(data)

    def _without_interim(self, data: bytes) -> bytes:
        """The part of `data` that belongs to the final answer; b"": none that is known to."""
        data = self._held + data
        at = 0
        while True:
            if self._in_interim:
                end = _HEAD_END.search(data, at)
                past = end.end() if end else max(at, len(data) - 2)  # the start of such an end, perhaps
                self._interim_bytes += past - at
                at = past
                if end is None:
                    break
                self._in_interim = False
            line = _STATUS_LINE.match(data, at)
            if line is None or line[1][:1] != b"1" or line[1] == b"101":
                self._final = line is not None or len(data) - at >= KEPT_BYTES or not _LINE_BEGUN.match(data, at)
                break
            self._in_interim = True
            self._interim_bytes += line.end() - 1 - at
            at = line.end() - 1
        self._held = b"" if self._final else data[at:]
        return data[at:] if self._final else b""

    def _give_up(self, error: Exception) -> None:
        self.set_exception(error)
        if self.transport is not None:
            self.transport.abort()

    def rest(self) -> None:
        """Notes that the answer is complete and the connection kept; no data is expected on it now."""
        self.idle = True
        self.received = b""
        self._final = self._in_interim = False
        self._interim_bytes = 0
        self._rested_s = time.monotonic()

    def is_connected(self) -> bool:
        """Whether it can be used: an idle one must be open, and must not have sent anything."""
        return super().is_connected() and (not self.idle or self._is_quiet())

    def _is_quiet(self) -> bool:
        if self.received or self.should_close or self.transport is None:
            return False
        if self._uses > 1 and time.monotonic() - self._rested_s < _JUST_NOW_S:
            return True
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not self._poll.poll(0)


answering: ContextVar[AnswerProtocol | None] = ContextVar("answering", default=None)
"""The connection over which the delivery of this context sent its request; set it to None before the delivery."""
