"""What a receiver has said so far, read off the bytes themselves.

A complete status line decides an attempt, whatever follows: a receiver that has said 200 has the event. aiohttp answers
with an error when the rest of an answer breaks a rule, or stays away, and the status is lost with it; so connections
keep the start of what came.
"""

from __future__ import annotations

import re
import select
import time
from contextvars import ContextVar
from typing import Any, NamedTuple

from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import BadStatusLine

KEPT_BYTES = 16_384
# A connection that has been used again before, and answered just now, is not asked for: that is a system call each.
_JUST_NOW_S = 0.05
_STATUS_LINE = re.compile(rb"[\r\n]*HTTP/[0-9](?:\.[0-9])?[ \t]+([0-9]{3})(?:[ \t][^\n]*)?\r?\n", re.IGNORECASE)
_HEAD_END = re.compile(rb"\n\r?\n")
_FIELD = re.compile(rb"^([!-9;-~]+)[ \t]*:[ \t]*([^\r\n]*)\r?\n", re.MULTILINE)


class Head(NamedTuple):
    """The status of a final answer, and what there is of its header lines."""

    status: int
    lines: bytes

    def values(self, name: bytes) -> list[str]:
        """The values of each complete header line of that name, given in lower case."""
        return [
            value.decode("utf-8", "surrogateescape") for key, value in _FIELD.findall(self.lines) if key.lower() == name
        ]


def head_of(received: bytes) -> Head | None:
    """The head of the final answer in what a receiver has sent; None: no complete status line of one.

    Interim answers (1xx, but for 101) are passed over.
    """
    at = 0
    while line := _STATUS_LINE.match(received, at):
        status = int(line[1])
        end = _HEAD_END.search(received, line.end() - 1)
        if not 100 <= status < 200 or status == 101:
            return Head(status, received[line.end() : end.start() + 1 if end else None])
        if end is None:
            break
        at = end.end()
    return None


class AnswerProtocol(ResponseHandler):
    """aiohttp's protocol of a connection, which keeps the first `KEPT_BYTES` of each answer in `received`."""

    received = b""
    idle = False
    _uses = 0
    _rested_s = 0.0
    _poll: select.poll | None = None

    def set_response_params(self, **params: Any) -> None:
        self.idle = False
        self._uses += 1
        answering.set(self)
        super().set_response_params(**params)

    def data_received(self, data: bytes) -> None:
        if len(self.received) < KEPT_BYTES:
            self.received += data
            if len(self.received) >= KEPT_BYTES and head_of(self.received) is None:
                self.set_exception(BadStatusLine("no status line"))  # interim answers without an end
                if self.transport is not None:
                    self.transport.abort()
                return
        super().data_received(data)

    def rest(self) -> None:
        """The answer is complete, and the connection is kept: what comes now, nobody has asked for."""
        self.idle = True
        self.received = b""
        self._rested_s = time.monotonic()

    def is_connected(self) -> bool:
        """Whether it can be used: an idle one must not have ended, nor said anything."""
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
"""The connection that the delivery of this context has sent its request over; to be set to None before it begins."""
