"""What the endpoints of queries share: answers, pages, and refusals of parameters."""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import Response

from orchestrator.api.problems import Problem
from orchestrator.event_rules import shown

DEFAULT_LIMIT = 100
MAX_LIMIT = 1000

_WHOLE = re.compile(r"[0-9]{1,9}", re.ASCII)


def as_json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def invalid(field: str, reason: str) -> Problem:
    return Problem("validation", f"{field}: {reason}", errors=[(field, reason)])


def whole_number(request: Request, name: str, default: int, least: int, most: int) -> int:
    """A parameter of the query. Raises a 422 problem."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if _WHOLE.fullmatch(text) is None or not least <= int(text) <= most:
        raise invalid(name, f"expected a whole number from {least} to {most}, got {shown(text)!r}")
    return int(text)


def page_limit(request: Request) -> int:
    return whole_number(request, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT)
