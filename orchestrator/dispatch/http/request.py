"""The URL and extra headers of an event, as its client gave them, checked again for the delivery.

The API has checked both, but events also come in through SQL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import msgspec
from yarl import URL

from orchestrator.events.headers import is_field_value, is_header_name, is_reserved

_QUOTED_CHARS = 200

# The characters of a URL that needs no encoding (RFC 3986); such a URL is sent exactly as it was given.
_PLAIN_URL = re.compile(r"https?://[!$&-;=?-Z\[\]_a-z~%]+", re.IGNORECASE)
_VISIBLE = re.compile(r"[!-~]+")


class Origin(NamedTuple):
    """What a connection leads to."""

    host: str
    port: int
    tls: bool


class Destination(msgspec.Struct, frozen=True, gc=False):
    """A destination that can be posted to. `head` begins every request to it; `place` names it in errors."""

    origin: Origin
    place: str
    query: str
    head: bytes


@lru_cache(maxsize=4096)
def destination_of(destination: str) -> Destination:
    """Reads a URL, kept as written where that is possible. Raises ValueError if it is none to post to."""
    try:
        url = URL(destination, encoded=_PLAIN_URL.fullmatch(destination) is not None)
        host, port, place, target = url.raw_host, url.port, url.host_port_subcomponent, url.raw_path_qs
    except ValueError:
        url = URL()
        host = port = place = None
    if not (host and port and place) or url.scheme not in ("http", "https") or url.raw_user is not None:
        raise ValueError("destination: expected an http or https URL with a host and without credentials")
    if destination.endswith("?") and destination.count("?") == 1:
        target += "?"  # an empty query, which yarl leaves out
    if not _VISIBLE.fullmatch(f"{target}{place}"):
        raise ValueError("destination: its URL cannot be sent")
    head = f"POST {target} HTTP/1.1\r\nHost: {place}\r\n".encode("ascii")
    return Destination(Origin(host, port, url.scheme == "https"), place, url.raw_query_string, head)


def custom_headers(headers: Mapping[str, object]) -> dict[str, str]:
    """An event's own headers in lower case, without those that the sender sets itself.

    Raises ValueError naming a malformed one, but not its value, which may be a secret.
    """
    kept = {}
    for name, value in headers.items():
        if not is_header_name(name):
            raise ValueError(f"headers: {quoted(name.partition(':')[0])} is not a header name")
        if not isinstance(value, str) or not is_field_value(value):
            raise ValueError(f"headers: the value of {quoted(name)} cannot be sent")
        lower = name.lower()
        if not is_reserved(lower):
            kept[lower] = value
    return kept


def quoted(text: str) -> str:
    """A foreign text for an error message: cut, and escaped where it is not plain."""
    return ascii(text[:_QUOTED_CHARS] + "..." if len(text) > _QUOTED_CHARS else text)
