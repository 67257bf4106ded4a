"""What a JSON text that is kept as it was sent needs checked, beyond what msgspec checks as it skips a value.

Skipping validates the grammar, control characters and the form of escapes. It does not look at UTF-8, lets
``\\u0000`` through, and refuses a lone surrogate as if the text were malformed. PostgreSQL's ``json`` stores
both escapes, but every ``->>`` on them fails, so neither is let in. The usual text costs a pass or two in C.
"""

from __future__ import annotations

import re

MAX_DEPTH = 64

# Looked for in texts without escaped backslashes, where every backslash begins an escape. No pattern here is possessive
# or atomic, which match wrongly before Python 3.11.5; none can match the same in two ways, so all are linear.
_SUSPECT = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
_FORBIDDEN = re.compile(
    rb"\\u(?:0000"
    rb"|[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"  # the first half of a pair without the second
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u)[dD][c-fC-F][0-9a-fA-F]{2})"  # the second without the first
)
# Looked for in texts without escapes. The closing quote is optional, or a string without one would be tried again from
# each bracket in it.
_STRING = re.compile(rb'"[^"]*"?')
_TOKEN = re.compile(_STRING.pattern + rb"|[][{}]")
_NO_UTF8 = b"\xff\xff"  # stands for an escaped backslash
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_TO_SQUARE = bytes.maketrans(b"{}", b"[]")


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
    if b"\\u" not in text or _SUSPECT.search(text) is None:
        return False
    return _FORBIDDEN.search(text.replace(rb"\\", _NO_UTF8)) is not None


def with_nul_for_surrogates(text: bytes) -> bytes:
    """The same text, as long, with each lone surrogate escape replaced by ``\\u0000``. The text must be UTF-8.

    So one item of a batch is refused for a lone surrogate, where the decoder would refuse the whole text.
    """
    return _FORBIDDEN.sub(rb"\\u0000", text.replace(rb"\\", _NO_UTF8)).replace(_NO_UTF8, rb"\\")


def deeper_than(text: bytes, depth: int = MAX_DEPTH) -> bool:
    """Whether arrays and objects are nested deeper than `depth`. The text must be well-formed."""
    if len(text) <= 2 * depth or text.count(b"[") + text.count(b"{") <= depth:
        return False
    plain = text.replace(rb"\\", b"").replace(rb"\"", b"")
    brackets = _STRING.sub(b"", plain).translate(_TO_SQUARE, _NOT_BRACKETS)
    for _ in range(depth):  # each pass removes the innermost level everywhere
        brackets = brackets.replace(b"[]", b"")
        if not brackets:
            return False
    return True


def pruned(text: bytes, depth: int = 4 * MAX_DEPTH) -> bytes:
    """The text with everything nested deeper than `depth` replaced by ``0``.

    For a text too deep for the decoder's recursion: what is cut is still too deep for `deeper_than`, and what
    stands beside it can be read.
    """
    kept: list[bytes] = []
    level = start = 0
    plain = text.replace(rb"\\", b"--").replace(rb"\"", b"--")  # as long, so that positions are the same
    for token in _TOKEN.finditer(plain):
        first = text[token.start()]
        if first in b"[{":
            level += 1
            if level == depth + 1:
                kept += text[start : token.start()], b"0"
        elif first in b"]}":
            level -= 1
            if level == depth:
                start = token.end()
    if level <= depth:
        kept.append(text[start:])
    return b"".join(kept)
