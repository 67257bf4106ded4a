"""Which URLs an event can be delivered to. One regular expression is the check and the OpenAPI pattern."""

from __future__ import annotations

import re
from functools import lru_cache

import idna

MAX_URL_CHARS = 2048

_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"(?:{_OCTET}\.){{3}}{_OCTET}"
_H16 = "[0-9A-Fa-f]{1,4}"
_LS32 = f"(?:{_H16}:{_H16}|{_IPV4})"
# RFC 3986, 3.2.2, without zone identifiers and future address forms.
_IPV6 = "|".join(
    (
        f"(?:{_H16}:){{6}}{_LS32}",
        f"::(?:{_H16}:){{5}}{_LS32}",
        f"(?:{_H16})?::(?:{_H16}:){{4}}{_LS32}",
        f"(?:(?:{_H16}:){{0,1}}{_H16})?::(?:{_H16}:){{3}}{_LS32}",
        f"(?:(?:{_H16}:){{0,2}}{_H16})?::(?:{_H16}:){{2}}{_LS32}",
        f"(?:(?:{_H16}:){{0,3}}{_H16})?::{_H16}:{_LS32}",
        f"(?:(?:{_H16}:){{0,4}}{_H16})?::{_LS32}",
        f"(?:(?:{_H16}:){{0,5}}{_H16})?::{_H16}",
        f"(?:(?:{_H16}:){{0,6}}{_H16})?::",
    )
)
_LABEL = "[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
# The last label is no number, not even 0x1f, so that a mistyped address is not taken for a name.
_LAST_LABEL = (
    "(?:[A-Za-z_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?|[0-9]{1,31}[A-WYZa-wyz_](?:[A-Za-z0-9_-]{0,30}[A-Za-z0-9_])?)"
)
_NAME = rf"(?:{_LABEL}\.)*{_LAST_LABEL}\.?"
PORT_PATTERN = "(?:6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3})"
_REST = r"(?:[/?](?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*)?"
HOST_PATTERN = rf"(?:{_NAME}|{_IPV4}|\[(?:{_IPV6})\])"
URL_PATTERN = rf"^https?://{HOST_PATTERN}(?::{PORT_PATTERN})?{_REST}$"

_URL = re.compile(URL_PATTERN)
_HOST = re.compile(r"^[^:]+://(\[[^\]]*\]|[^/?#:]*)")


@lru_cache(maxsize=8192)
def url_fault(url: str) -> str | None:
    """Why the dispatcher could not deliver to this URL, or None. Addresses are left to the delivery guard."""
    if len(url) > MAX_URL_CHARS:
        return f"expected at most {MAX_URL_CHARS} characters, got {len(url)}"
    if not url.isascii():
        return "expected ASCII: write the host in its xn-- form and percent-encode the rest"
    if _URL.match(url) is None or url[-1] == "\n":
        return _why_not(url)
    host = _HOST.match(url)
    return _name_fault(host[1]) if host else "expected a host"


def _name_fault(host: str) -> str | None:
    if len(host.rstrip(".")) > 253:
        return "expected a host name of at most 253 characters"
    for label in host.lower().split("."):
        if label.startswith("xn--"):
            try:
                idna.ulabel(label)
            except idna.IDNAError:
                return f"expected a valid internationalised name, got {label!r}"
    return None


def _why_not(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("http", "https"):
        return "expected a URL that starts with http:// or https://"
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        return "expected no user name or password in the URL: send credentials in headers"
    if not authority or authority.startswith(":"):
        return "expected a host after ://"
    if "#" in rest:
        return "expected no fragment: remove everything from # on"
    if re.fullmatch(r"(?:\[[^]]*\]|[^:\[]*):.*", authority) and not re.fullmatch(rf".*:{PORT_PATTERN}", authority):
        return "expected a port from 1 to 65535 after the host"
    if not re.fullmatch(rf"{HOST_PATTERN}(?::{PORT_PATTERN})?", authority):
        return "expected a host name, an IPv4 address or an IPv6 address in brackets"
    return "expected only URL characters: percent-encode spaces, quotes, brackets and the like"
