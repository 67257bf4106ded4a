"""Removes credentials from what a receiver says about a failure, which is kept and shown.

Many receivers answer an error with the request they got, headers and address included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from urllib.parse import parse_qsl, quote

_MASK = "***"
_CREDENTIAL = re.compile(r"auth|cookie|key|token|secret|passw|signature|session|credential", re.IGNORECASE)
_SHORTEST = 4


def without_credentials(text: str, headers: Mapping[str, str], secret_headers: Collection[str], query: str) -> str:
    """The text with ``***`` in place of the credentials of its request, in plain form and as JSON or a URL writes them.

    Credentials are the values of `secret_headers`, and of headers and query parameters called token, key and the like.
    """
    names = {name.lower() for name in secret_headers}
    secrets = {secret for secret in _credentials(headers, names, query) if len(secret) >= _SHORTEST}
    # The longest first, or a part of one would leave the rest of it.
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, _MASK)
    return text


def _credentials(headers: Mapping[str, str], secret_headers: Collection[str], query: str) -> Iterator[str]:
    for name, value in headers.items():
        if name.lower() in secret_headers or _CREDENTIAL.search(name):
            for part in (value, value.rpartition(" ")[2]):  # "Bearer …", too
                yield part
                yield json.dumps(part)[1:-1]
                yield json.dumps(part, ensure_ascii=False)[1:-1]
                yield quote(part, safe="")
    if query:
        for pair, (name, value) in zip(query.split("&"), parse_qsl(query, keep_blank_values=True), strict=False):
            if _CREDENTIAL.search(name):
                yield value
                yield pair.partition("=")[2]
