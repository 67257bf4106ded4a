"""The settings of a destination in a request: one table for the check and for the OpenAPI document.

They set its rate limit (GCRA), its circuit breaker and the like. The database checks rules that concern two settings,
or that need its data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from orchestrator.api.requests.fields import Field, number, whole
from orchestrator.events.faults import MAX_FAULTS
from orchestrator.events.headers import HEADER_NAME_PATTERN, MAX_HEADERS, headers_fault
from orchestrator.events.quoting import kind_of, shown
from orchestrator.events.rules import RETRY_POLICY_PATTERN
from orchestrator.events.urls import HOST_PATTERN, PORT_PATTERN

MAX_DESTINATION_CHARS = 300
_HOST_AND_PORT = f"{HOST_PATTERN}(?::{PORT_PATTERN})?"
_STARRED = (
    rf"(?!\*+(?::|$))(?:[A-Za-z0-9_-]+\.)*[A-Za-z0-9_-]*\*[A-Za-z0-9_*-]*(?:\.[A-Za-z0-9_*-]+)*(?::{PORT_PATTERN})?"
)
# A host and port as in a URL, or kafka: and a topic; with * a pattern. SQL's as_destination() accepts all of these.
NAME_PATTERN = rf"^(?:kafka:(?!\.{{1,2}}$)[A-Za-z0-9._*-]{{0,249}}|{_HOST_AND_PORT}|{_STARRED})$"
EXACT_NAME_PATTERN = rf"^(?:kafka:(?!\.{{1,2}}$)[A-Za-z0-9._-]{{0,249}}|{_HOST_AND_PORT})$"
FILE_PATTERN = r"^(?!whsec_)[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"

_NAME = re.compile(NAME_PATTERN.removesuffix("$"))
_FILE = re.compile(FILE_PATTERN.removesuffix("$"))
_A_NAME = "the name of a secret, a file of SECRETS_DIRECTORY: 1 to 100 letters, digits, ., _ and -"


DESTINATION_SETTINGS: dict[str, Field] = {
    "rate_per_second": number(
        "rate_per_second",
        "Rate limit: attempts a second, by all dispatchers together. Without it there is none.",
        0.000001,
        100_000,
    ),
    "burst": whole(
        "burst", "Attempts that may start at once under the rate limit, after a quiet time. Default 1.", 1, 1_000_000
    ),
    "max_parallel": whole("max_parallel", "Attempts under way at once, by all dispatchers together.", 1, 100_000),
    "adaptive": Field(
        "adaptive",
        "true or false",
        {
            "type": "boolean",
            "description": "Whether 429, 503 and time-outs lower max_parallel.",
        },
        bool,
    ),
    "timeout_seconds": number("timeout", "Longest time that an attempt may take.", 0.1, 600),
    "retry_policy": Field(
        "retry_policy",
        "a name of 1 to 63 characters from a-z, 0-9, _ and -",
        {"type": "string", "pattern": RETRY_POLICY_PATTERN, "description": "For events that name none."},
        Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9_-]{1,63}\Z")],
    ),
    "signing_secret": Field(
        "signing_secret",
        _A_NAME,
        {
            "type": "string",
            "pattern": FILE_PATTERN,
            "description": "Name of the secret that signs deliveries to it.",
        },
        str,
    ),
    "secret_headers": Field(
        "secret_headers",
        f"an object of header names, and for each {_A_NAME}",
        {
            "type": "object",
            "maxProperties": MAX_HEADERS,
            "propertyNames": {"type": "string", "pattern": HEADER_NAME_PATTERN},
            "additionalProperties": {"type": "string", "pattern": FILE_PATTERN},
            "description": "Headers to send, and the names of the secrets that are their values. Those that are set "
            "on delivery are refused.",
        },
        dict[str, str],
    ),
    "spread_seconds": number("spread", "Window over which its events are spread.", 0.001, 604_800),
    "breaker_failures": whole(
        "breaker_failures",
        "Its circuit breaker opens after this many failures in a row; 0: never for that. Default 10.",
        0,
        1_000_000,
    ),
    "breaker_ratio": number(
        "breaker_ratio",
        "It opens when this share of the attempts in its window failed; 0: never for that. Default 0.5.",
        0,
        1,
    ),
    "breaker_minimum": whole(
        "breaker_minimum", "Attempts in the window before the ratio counts. Default 20.", 1, 1_000_000
    ),
    "breaker_window_seconds": number("breaker_window", "Length of the window of the ratio. Default 30.", 1, 3600),
    "breaker_cooldown_seconds": number(
        "breaker_cooldown", "How long it stays open at first; doubles with each failed probe. Default 5.", 0.1, 3600
    ),
    "breaker_max_cooldown_seconds": number(
        "breaker_max_cooldown",
        "Longest time that it stays open; at least breaker_cooldown_seconds. Default 300.",
        0.1,
        86_400,
    ),
}
"""The settings by their names in JSON. Null is the same as absent."""
SETTING_OF_COLUMN = {setting.column: name for name, setting in DESTINATION_SETTINGS.items()}


def name_fault(name: str) -> str | None:
    if len(name) <= MAX_DESTINATION_CHARS and _NAME.fullmatch(name):
        return None
    return (
        "expected a host such as example.com or example.com:8443, kafka: and a topic, or a pattern such as "
        f"*.example.com, of at most {MAX_DESTINATION_CHARS} characters; pause everything by POST /api/v1/pause"
    )


def settings_of(fields: Mapping[str, msgspec.Raw]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The settings given, by columns, and the rules they break as (field, reason)."""
    given: dict[str, Any] = {}
    faults: list[tuple[str, str]] = []
    for name, raw in fields.items():
        if len(faults) == MAX_FAULTS:
            break
        setting = DESTINATION_SETTINGS.get(name)
        if setting is None:
            faults.append((shown(name), f"unknown field; expected {', '.join(DESTINATION_SETTINGS)}"))
            continue
        try:
            value = msgspec.json.decode(raw, type=setting.wire | None)
        except msgspec.ValidationError:
            faults.append((name, f"expected {setting.expected}, got {_shown(name, raw)}"))
            continue
        fault = None if value is None else _secret_fault(name, value)
        if fault:
            faults.append((name, fault))
        elif value is not None:
            given[setting.column] = int(value) if setting.schema["type"] == "integer" else value
    return given, faults


def _shown(name: str, raw: msgspec.Raw) -> str:
    """The value for an error text, but only its type where somebody may have put a secret in place of its name."""
    return kind_of(raw) if "secret" in name else shown(raw)


def _secret_fault(name: str, value: Any) -> str | None:
    if name == "signing_secret":
        return None if _FILE.fullmatch(value) else f"expected {_A_NAME}"
    if name == "secret_headers":
        if fault := headers_fault(dict.fromkeys(value, "")):
            return fault
        if not all(map(_FILE.fullmatch, value.values())):
            return f"expected for each header {_A_NAME}"
    return None
