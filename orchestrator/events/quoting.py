"""How a message quotes what a client sent: short, and without what may be a secret."""

from __future__ import annotations

import re

import msgspec

SHOWN_CHARS = 80
_LOOKED_AT_CHARS = 1000
_LOGIN = re.compile(r"[^\s:/@]*:[^\s@]*@")
_KINDS = {b"{": "an object", b"[": "an array", b'"': "a string", b"t": "true", b"f": "false", b"n": "null"}


def shown(value: object) -> str:
    """A value as it is quoted in a message: never longer than a line, and nothing that may hold a secret.

    A text of bytes is JSON. Of URLs, and of arrays and objects with strings, it only says what they are.
    """
    if isinstance(value, (bytes, msgspec.Raw)):
        return _shown_json(bytes(value))
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "an array"
    text = str(value).encode(errors="backslashreplace").decode()  # a path that is not UTF-8 holds lone surrogates
    return _shortened(text, f"{len(text)} characters")


def kind_of(text: bytes | msgspec.Raw) -> str:
    """What kind of value a JSON text is, for messages that must not quote it."""
    first = bytes(memoryview(text)[:64]).lstrip(b" \t\r\n")[:1]
    return _KINDS.get(first, "a number")


def before_colon(name: str) -> str:
    """What is no header name may be a whole header, of which this is the name."""
    before, colon, _ = name.partition(":")
    return before + (colon and "…")


def _shown_json(text: bytes) -> str:
    if (kind := kind_of(text)) in ("an object", "an array") and b'"' in text:
        return kind
    if len(text) > 8 * SHOWN_CHARS:
        return _shortened(text[: 8 * SHOWN_CHARS].decode(errors="replace"), f"{len(text)} bytes")
    whole = text.decode(errors="replace")
    return _shortened(whole, f"{len(whole)} characters")


def _shortened(text: str, size: str) -> str:
    scheme, separator, rest = text.partition("://")
    if (separator and rest) or _LOGIN.search(text[:_LOOKED_AT_CHARS]):
        return f"{scheme[-SHOWN_CHARS:]}://… ({size})" if separator else f"… ({size})"
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}… ({size})"
