"""The kinds of value of OpenTelemetry's settings, as its specification writes them."""

from __future__ import annotations

import re
import ssl
from urllib.parse import unquote, urlsplit

from orchestrator.settings.kinds import BadItemError, Kind, one_of

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t -~]*")
_OWN = frozenset(("connection", "content-length", "content-type", "host", "transfer-encoding"))


def _endpoint(raw: str) -> str:
    url = raw.strip()
    parts = urlsplit(url)
    port = parts.port  # raises ValueError for one that is none
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or port == 0
        or parts.username is not None
        or parts.query
        or parts.fragment
        or not re.fullmatch(r"[!-~]{1,1000}", url)
    ):
        raise ValueError
    parts.hostname.encode("idna")  # a label that is too long is a ValueError
    return url.rstrip("/")


endpoint = Kind("an http or https URL without a user, a query and a fragment, such as http://collector:4318", _endpoint)


def _headers(raw: str) -> tuple[tuple[str, str], ...]:
    found = []
    for position, item in enumerate(raw.split(","), start=1):
        if not item.strip():
            continue
        name, separator, value = (part.strip() for part in item.partition("="))
        value = unquote(value)
        if not separator or not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value) or name.lower() in _OWN:
            raise BadItemError(position, item)
        found.append((name.lower(), value))
    return tuple(found)


headers = Kind(
    "a comma-separated list of name=value, with percent-encoded values",
    _headers,
    lambda value: ",".join(f"{name}=***" for name, _ in value),
)


def _certificate(raw: str) -> str:
    path = raw.strip()
    try:
        ssl.create_default_context(cafile=path)
    except OSError:  # what the file holds, too
        raise ValueError from None
    return path


certificate = Kind("a PEM file of certificates that can be read", _certificate, is_path=True)

SAMPLERS = {
    name: name
    for name in (
        "always_on",
        "always_off",
        "traceidratio",
        "parentbased_always_on",
        "parentbased_always_off",
        "parentbased_traceidratio",
    )
}
sampler = one_of(SAMPLERS, f"{', '.join([*SAMPLERS][:-1])} or {[*SAMPLERS][-1]}")


def _ratio(raw: str) -> float:
    if not re.fullmatch(r"0?\.[0-9]{1,12}|0|1(\.0{1,12})?", raw.strip()):
        raise ValueError
    return float(raw)


ratio = Kind("a number from 0 to 1", _ratio, lambda value: f"{value:g}")

protocol = one_of({"http/protobuf": "http/protobuf"}, "http/protobuf, the only one spoken here (port 4318)")
