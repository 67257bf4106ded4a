"""The answer of a receiver: its head, read from the bytes as they came, and what was wrong with it.

A complete status line decides an attempt: a receiver that has sent 200 has the event, even when the rest of its answer
breaks a rule or never comes.
"""

from __future__ import annotations

import re
from typing import NamedTuple

STATUS_LINE = re.compile(rb"[\r\n]*HTTP/[0-9](?:\.[0-9])?[ \t]+([0-9]{3})(?:[ \t][^\n]*)?\r?\n", re.IGNORECASE)
STATUS_LINE_BEGUN = re.compile(rb"[\r\n]*(?:H(?:T(?:T(?:P(?:/[^\n]*)?)?)?)?)?\Z", re.IGNORECASE)  # it may become one
HEAD_END = re.compile(rb"\n\r?\n")
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
    line = STATUS_LINE.match(received)
    if line is None:
        return None
    end = HEAD_END.search(received, line.end() - 1)
    return Head(int(line[1]), received[line.end() : end.start() + 1 if end else None])


class Answer(NamedTuple):
    """What came of a request.

    `status` is that of a complete head, or else 0. `received` begins with that head, as far as it came, and `body` is
    the start of the body. `error` is what was wrong; None if nothing was, or only the rest of a body is missing.
    """

    status: int
    received: bytes
    body: bytes = b""
    error: Exception | None = None


class BrokenAnswerError(Exception):
    """An answer, or the rest of one, that is not HTTP; the text says which rule it breaks."""


class BrokenBodyError(Exception):
    """A body that is not as its head says."""


class InterimError(Exception):
    """A receiver sent too much before its final answer."""
