"""API keys: how they look, what they allow, and the check that every request passes."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections import OrderedDict
from time import monotonic

from starlette.types import Scope

from orchestrator.api.http import header
from orchestrator.api.problems import Problem
from orchestrator.database import ApiKey, Database
from orchestrator.errors import OrchestratorError
from orchestrator.settings import Settings
from orchestrator.tasks import retrieve

SCOPES = ("read", "submit", "admin")
KEY_PATTERN = "^orch_[A-Za-z0-9_-]{43}$"
DELIVERY_HEADER = b"orchestrator-attempt"
"""Every delivery over HTTP has this header, and no event can set it."""
CACHE_S = 10.0
CACHE_SIZE = 1024

_KEY = re.compile(KEY_PATTERN.encode())


def new_key() -> str:
    """A key of 256 random bits. Show it once: only its hash is kept."""
    return f"orch_{secrets.token_urlsafe(32)}"


def key_hash(key: str) -> bytes:
    """What is stored of a key. A key is random, so one fast hash is as good as a slow one."""
    return hashlib.sha256(key.encode()).digest()


async def require_keys(settings: Settings, database: Database) -> None:
    """Refuse to start an API that nobody could use, or that production would leave open by mistake."""
    if not settings.allow_anonymous and await database.count_api_keys() == 0:
        raise OrchestratorError(
            "API keys: expected at least one, since anonymous requests are not allowed here; "
            "make one with `orchestrator keys create NAME --scope submit`, or set ALLOW_ANONYMOUS=true"
        )


class Guard:
    """Decides whether a request may do what needs `scope`. Keys are looked up once in CACHE_S seconds each."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._anonymous = settings.allow_anonymous
        self._database = database
        # Apart, so that a flood of wrong keys does not push out the right ones.
        self._known = _Recent()
        self._unknown = _Recent()
        self._lookups: dict[bytes, asyncio.Task[ApiKey | None]] = {}

    async def require(self, scope: Scope, needed: str) -> None:
        """Raises a 401 or 403 problem; does nothing when the request may go on."""
        key = _presented(scope)
        if key is None:
            if header(scope, DELIVERY_HEADER) is not None:
                # Else whoever may submit an event could have it call this API with the rights of this network.
                raise _unauthorized("A delivery may use this API with an API key in the headers of its event alone.")
            if self._anonymous:
                return
            raise _unauthorized("Send an API key as `Authorization: Bearer orch_…` or `X-API-Key: orch_…`.")
        found = await self._find(key) if _is_key(key) else None
        if found is None:
            raise _unauthorized("The API key is unknown or was revoked.", 'error="invalid_token"')
        if needed not in found.scopes and "admin" not in found.scopes:
            raise Problem(
                "forbidden",
                f"The key {found.name!r} has the scopes {', '.join(sorted(found.scopes))}; this needs {needed}.",
                headers={"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{needed}"'},
            )

    async def _find(self, key: bytes) -> ApiKey | None:
        digest = hashlib.sha256(key).digest()
        if (found := self._known.get(digest)) is not None:
            return found
        if digest in self._unknown:
            return None
        # Requests that arrive together with one key share one look-up, which outlives each of them.
        lookup = self._lookups.get(digest)
        if lookup is None:
            lookup = asyncio.create_task(self._look_up(digest))
            self._lookups[digest] = lookup
            lookup.add_done_callback(lambda _: self._lookups.pop(digest))
            lookup.add_done_callback(retrieve)  # the requests may have gone by then
        return await asyncio.shield(lookup)

    async def _look_up(self, digest: bytes) -> ApiKey | None:
        found = await self._database.api_key(digest)
        (self._unknown if found is None else self._known).put(digest, found)
        return found


class _Recent:
    """What was looked up in the last CACHE_S seconds, at most CACHE_SIZE of it."""

    def __init__(self) -> None:
        self._entries: OrderedDict[bytes, tuple[float, ApiKey | None]] = OrderedDict()

    def __contains__(self, digest: bytes) -> bool:
        entry = self._entries.get(digest)
        return entry is not None and entry[0] > monotonic()

    def get(self, digest: bytes) -> ApiKey | None:
        return self._entries[digest][1] if digest in self else None

    def put(self, digest: bytes, found: ApiKey | None) -> None:
        self._entries[digest] = (monotonic() + CACHE_S, found)
        self._entries.move_to_end(digest)
        while len(self._entries) > CACHE_SIZE:
            self._entries.popitem(last=False)


def _presented(scope: Scope) -> bytes | None:
    """The key that a request carries; an empty one when it carries credentials of another kind."""
    if header(scope, b"x-api-key") is None and header(scope, b"authorization") is None:
        return None
    # Blanks at its ends are no part of a value (RFC 9110, 5.5), and not every server takes them off.
    given = [value.strip() for name, value in scope["headers"] if name == b"x-api-key"]
    others = False
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, *credentials = value.split(None, 1) or [b""]
            if scheme.lower() == b"bearer":
                given.append(credentials[0].strip() if credentials else b"")
            others = True
    # One of them may be meant for a gateway before us.
    keys = {key for key in given if _is_key(key)} or set(given)
    if len(keys) > 1:
        raise _unauthorized("Expected one API key, got several that differ.", 'error="invalid_request"')
    return keys.pop() if keys else b"" if others else None


def _is_key(text: bytes) -> bool:
    return len(text) == 48 and _KEY.match(text) is not None


def _unauthorized(detail: str, *challenge: str) -> Problem:
    return Problem(
        "unauthorized",
        detail,
        headers={"WWW-Authenticate": ", ".join(('Bearer realm="orchestrator"', *challenge))},
    )
