"""What a JSON text that is kept as it was sent needs checked, beyond what msgspec checks as it skips a value.

Skipping validates the grammar, control characters and the form of escapes. It does not look at UTF-8, lets
``\\u0000`` through, and refuses a lone surrogate as if the text were malformed. PostgreSQL's ``json`` stores
both escapes, but every ``->>`` on them fails, so neither is let in.

Everything here takes time in proportion to the text, some ns a byte: passes in C, and no pattern that backtracks.
"""

from __future__ import annotations

import re
from array import array
from itertools import accumulate

MAX_DEPTH = 64
NUL_ESCAPE = rb"\u0000"
_MAX_TOKENS = 100_000
_MAX_ESCAPES = 100_000
_PASSES = 8

# Once escaped backslashes are out of the way, every \u begins an escape; half of a pair stands alone unless its
# other half is next to it.
_LONE = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD])[c-fC-F][0-9a-fA-F]{2})"
)
_FORBIDDEN = re.compile(rb"\\u0000|" + _LONE.pattern)
_TOKEN = re.compile(rb'"[^"]*"?|[\[{]+|[\]}]+')
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_TO_SQUARE = bytes.maketrans(b"{}", b"[]")
_STEPS = bytes.maketrans(b"[]", b"\x01\xff")  # 1 and -1 as signed bytes


def utf8_fault(text: bytes) -> int | None:
    """The position of the first byte that is not UTF-8, or None."""
    if text.isascii():
        return None
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None


def has_forbidden_escape(text: bytes) -> bool:
    """Whether a string in the text holds ``\\u0000`` or a lone surrogate. The text must be well-formed."""
    return b"\\u" in text and _FORBIDDEN.search(_without_backslashes(text)) is not None


def with_nul_for_surrogates(text: bytes) -> bytes:
    """The same text, as long, with each lone surrogate escape replaced by ``\\u0000``.

    So one item of a batch is refused for a lone surrogate, where the decoder would refuse the whole text. A text of
    more than 100,000 escapes stays as it is, and is refused as a whole.
    """
    if not 0 < text.count(b"\\u") <= _MAX_ESCAPES:
        return text
    plain = _without_backslashes(text)
    mended = bytearray(text)
    for found in _LONE.finditer(plain):
        mended[found.start() : found.end()] = NUL_ESCAPE
    return bytes(mended)


def _without_backslashes(text: bytes) -> bytes:
    """The same text, as long, with blanks for each escaped backslash."""
    return text.replace(rb"\\", b"  ")


def deeper_than(text: bytes, depth: int = MAX_DEPTH) -> bool:
    """Whether arrays and objects are nested deeper than `depth`. The text must be well-formed."""
    if len(text) <= 2 * depth or text.count(b"[") + text.count(b"{") <= depth:
        return False
    if b"\\" in text:
        text = text.replace(rb"\\", b"").replace(rb"\"", b"")
    brackets = b"".join(text.split(b'"')[::2]).translate(_TO_SQUARE, _NOT_BRACKETS)
    for removed in range(_PASSES):  # each pass removes the innermost level everywhere; few texts have more
        if len(brackets) <= 2 * (depth - removed):
            return False
        brackets = brackets.replace(b"[]", b"")
    return max(accumulate(array("b", brackets.translate(_STEPS))), default=0) > depth - _PASSES


def pruned(text: bytes, depth: int = 4 * MAX_DEPTH) -> bytes | None:
    """The text with everything nested deeper than `depth` replaced by ``0``; None when that would take long.

    For a text too deep for the decoder's recursion: what is cut is still too deep for `deeper_than`, and what
    stands beside it can be read.
    """
    kept: list[bytes] = []
    level = start = 0
    for n, token in enumerate(_TOKEN.finditer(_without_backslashes(text).replace(rb"\"", b"  "))):
        if n == _MAX_TOKENS:
            return None
        size = token.end() - token.start()
        first = text[token.start()]
        if first in b"[{":
            if level <= depth < level + size:
                kept += text[start : token.start() + depth - level], b"0"
            level += size
        elif first in b"]}":
            if level > depth >= level - size:
                start = token.start() + level - depth
            level -= size
    if level <= depth:
        kept.append(text[start:])
    return b"".join(kept)
