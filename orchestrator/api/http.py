"""Reading requests and writing answers straight over ASGI, for the routes where every microsecond counts."""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

from orchestrator.api.problems import Problem

MAX_FIELDS_BYTES = 1 << 16
"""Longest body of a request that is no event."""

_FIRSTS = "orchestrator.headers"  # in a request's scope


class ClientGoneError(Exception):
    """The client closed the connection before its request was complete."""


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that lower-case name."""
    firsts: dict[bytes, bytes] | None = scope.get(_FIRSTS)
    if firsts is None:
        firsts = scope[_FIRSTS] = dict(reversed(scope["headers"]))
    return firsts.get(name)


async def read_json(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """The body, as it was sent. Refuses what is not declared as JSON, and stops reading at `max_bytes`.

    How long it may take is the connection's to decide, which then is gone.
    """
    _require_json(scope)
    declared = header(scope, b"content-length")
    if declared is not None and _is_more(declared, max_bytes):
        raise _too_large(max_bytes)
    return await _read(receive, max_bytes)


def _is_more(digits: bytes, most: int) -> bool:
    """Whether the number that digits write is more; int() refuses thousands of them."""
    significant = digits.lstrip(b"0") or b"0"
    return len(significant) > 18 or int(significant) > most


async def _read(receive: Receive, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return b"".join((*chunks, chunk)) if chunks else bytes(chunk)
        chunks.append(chunk)


def _require_json(scope: Scope) -> None:
    declared = header(scope, b"content-type")
    if declared != b"application/json":
        media_type, _, parameters = (declared or b"").decode("latin-1").lower().partition(";")
        charset = parameters.replace(" ", "").replace('"', "")
        if media_type.strip() != "application/json" or charset not in ("", "charset=utf-8"):
            shown = declared.decode("latin-1")[:80] if declared else "none"
            raise Problem("unsupported-media-type", f"Content-Type: expected application/json, got {shown}.")
    encoding = header(scope, b"content-encoding")
    if encoding is not None and encoding.lower() != b"identity":
        shown = encoding.decode("latin-1")[:80]
        raise Problem("unsupported-media-type", f"Content-Encoding: expected none, got {shown}.")


def _too_large(max_bytes: int) -> Problem:
    remedy = "." if max_bytes == MAX_FIELDS_BYTES else " (MAX_BODY_BYTES); send smaller batches."
    return Problem("too-large", f"Expected at most {max_bytes} bytes{remedy}")


async def send_json(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                *headers,
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})
