"""One request and its answer: uvicorn's, which sends head and body apart, but in one piece where both are known."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

_UNUSUAL = frozenset((b"connection", b"transfer-encoding"))


class Exchange(RequestResponseCycle):
    """Two writes are two system calls and wake the client twice: that is a tenth of what a small request costs."""

    _start: Any = None

    async def send(self, message: Any) -> None:
        start = self._start
        if start is None:
            if message["type"] == "http.response.start" and not self.response_started and not self.access_log:
                self._start = message
                self.response_started = True
                return
        else:
            self._start = None
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                body = message.get("body", b"")
                head = self._head(start["status"], start["headers"], len(body))
                if head is not None and not self.flow.write_paused and not self.disconnected:
                    self._answer(head + body if self.scope["method"] != "HEAD" else head)
                    return
            self.response_started = False
            await super().send(start)
        await super().send(message)

    def _head(self, status: int, headers: Any, body_bytes: int) -> bytes | None:
        """The head of an answer that says its length; None: uvicorn is to make it, or to refuse it."""
        declared = None
        for name, value in headers:
            if name == b"content-length":
                declared = value
            elif name in _UNUSUAL:
                return None
        if declared != b"%d" % body_bytes:
            return None
        fields = [*self.default_headers, *headers]
        if not self.keep_alive:
            fields.append((b"connection", b"close"))
        lines = b"".join([b"%b: %b\r\n" % field for field in fields])
        if lines.count(b"\n") != len(fields) or lines.count(b"\r") != len(fields) or b"\0" in lines:
            return None
        return b"%b%b\r\n" % (STATUS_LINE[status], lines)

    def _answer(self, piece: bytes) -> None:
        self.waiting_for_100_continue = False
        self.transport.write(piece)
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
