"""Which headers an event may have. The one rule of the API and of the dispatcher, which checks once more since events
also come in through SQL; a test compares SQL's check_headers() with it.
"""

from __future__ import annotations

import re

from orchestrator.events.quoting import before_colon, shown

MAX_HEADERS = 20
MAX_HEADER_NAME_CHARS = 100
MAX_HEADER_CHARS = 4096
_NAME_CHARS = "[A-Za-z0-9!#$%&'*+.^_`|~-]"  # RFC 9110, 5.6.2
_NO_VALUE_CHARS = r"\x00-\x08\x0a-\x1f\x7f"
HEADER_NAME_PATTERN = f"^{_NAME_CHARS}{{1,{MAX_HEADER_NAME_CHARS}}}$"
HEADER_VALUE_PATTERN = f"^[^{_NO_VALUE_CHARS}]*$"
# What is set on delivery, or would change what HTTP itself does with the request: how it is framed, which way it goes.
# The one list: of the API, of the dispatcher, and of SQL's check_headers(), which a test compares with it.
RESERVED_HEADERS = frozenset(
    {"connection", "content-encoding", "content-length", "content-type", "expect", "host", "http2-settings"}
    | {"keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "user-agent"}
)
RESERVED_HEADER_PREFIXES = ("orchestrator-", "proxy-", "webhook-")
_NAME = re.compile(f"{_NAME_CHARS}+")
_VALUE = re.compile(rf"[^{_NO_VALUE_CHARS}\ud800-\udfff]*")


def is_reserved(name: str) -> bool:
    """Whether a header, given in lower case, is not the client's to set."""
    return name in RESERVED_HEADERS or name.startswith(RESERVED_HEADER_PREFIXES)


def is_header_name(text: str) -> bool:
    """Whether it can be the name of a header, of whatever length."""
    return _NAME.fullmatch(text) is not None


def is_field_value(text: str) -> bool:
    """Whether a header can have this value, of whatever length."""
    return _VALUE.fullmatch(text) is not None


def headers_fault(headers: dict[str, str]) -> str | None:
    if len(headers) > MAX_HEADERS:
        return f"expected at most {MAX_HEADERS} headers, got {len(headers)}"
    if len({name.lower() for name in headers}) < len(headers):
        return "expected each header once: names differ in more than case"
    for name, value in headers.items():
        if len(name) > MAX_HEADER_NAME_CHARS or _NAME.fullmatch(name) is None:
            got = shown(repr(before_colon(name)))
            return f"expected a header name of 1 to {MAX_HEADER_NAME_CHARS} token characters, got {got}"
        if is_reserved(lowered := name.lower()):
            return f"expected no {lowered} header: it is set on delivery"
        if len(value) > MAX_HEADER_CHARS or _VALUE.fullmatch(value) is None:
            return f"expected at most {MAX_HEADER_CHARS} characters, none of them control, in {name}"
    return None
