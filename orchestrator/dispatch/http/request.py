"""The URL and extra headers of an event, as its client gave them, checked again for the delivery.

The API has checked both, but events also come in through SQL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from yarl import URL

from orchestrator.events.headers import is_field_value, is_header_name, is_reserved

_QUOTED_CHARS = 200

# The characters of a URL that needs no encoding (RFC 3986); such a URL is sent exactly as it was given.
_PLAIN_URL = re.compile(r"https?://[!$&-;=?-Z\[\]_a-z~%]+", re.IGNORECASE)


@lru_cache(maxsize=4096)
def destination_url(destination: str) -> URL:
    """The URL to post to, kept as written where that is possible. Raises ValueError if it is none."""
    try:
        url = URL(destination, encoded=_PLAIN_URL.fullmatch(destination) is not None)
        valid = url.scheme in ("http", "https") and url.raw_host and url.raw_user is None and url.port
    except ValueError:
        valid = False
    if valid and destination.endswith("?") and destination.count("?") == 1:
        # An empty query: yarl sends its ? only as a part of the path.
        url = URL.build(scheme=url.scheme, authority=url.raw_authority, path=f"{url.raw_path}?", encoded=True)
    if not valid:
        raise ValueError("destination: expected an http or https URL with a host and without credentials")
    return url


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
