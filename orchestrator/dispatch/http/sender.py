"""Delivers events over HTTP: each attempt is one signed POST, as Standard Webhooks describes it.

The status line decides an attempt: a receiver that has sent 2xx has the event, even if the rest of its answer is lost.
Bodies are read only to reuse the connection and to quote failures, both within bounds.

An attempt sends its request once. When a kept connection ends before the answer, the receiver may have read the
request; that is a failed attempt like any other, and the retry policy says when the next one is.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from types import TracebackType
from typing import TYPE_CHECKING, Self

import aiohttp
import msgspec

from orchestrator.dispatch.attempt import DELIVERED, FAIL, RETRY, Attempted
from orchestrator.dispatch.http.answer import InterimError, answering, head_of
from orchestrator.dispatch.http.connector import GuardedConnector
from orchestrator.dispatch.http.redaction import without_credentials
from orchestrator.dispatch.http.request import custom_headers, destination_url, quoted
from orchestrator.dispatch.http.retry_after import parse_retry_after
from orchestrator.dispatch.http.secrets import SECRET_WAIT_S, SecretError, Secrets
from orchestrator.dispatch.http.signing import Signer
from orchestrator.dispatch.http.ssrf_guard import AddressRefusedError, SsrfGuard
from orchestrator.dispatch.http.tls import tls_fault
from orchestrator.errors import OwnFaultError
from orchestrator.own_faults import own_fault

if TYPE_CHECKING:
    from yarl import URL

    from orchestrator.settings import Settings

EXCERPT_CHARS = 1024
_EXCERPT_BYTES = 4 * EXCERPT_CHARS  # holds the excerpt in any UTF-8
_USER_AGENT = "scheduled-event-orchestrator/1"
_BODY_WAIT_S = 1.0  # for the rest of a body, after its status has decided the attempt
_RETRIED_4XX = frozenset((408, 425, 429))
_QUOTES = re.compile(r":?\n.*|: b?['\"].*", re.DOTALL)  # what aiohttp quotes, cut anywhere, of an answer that is wrong

# A foreign text without the credentials of the request. It comes before `quoted`, which cuts and escapes them.
_Discreet = Callable[[str], str]

_log = logging.getLogger(__name__)


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """One attempt to deliver one event. `scheduled_at` is RFC 3339 text, `attempt` counts from 1.

    `timeout_s` and `signing_secret` stand in for HTTP_TIMEOUT_SECONDS and WEBHOOK_SECRETS. That, and the values of
    `secret_headers`, are names of secrets.
    """

    event_id: str
    attempt: int
    scheduled_at: str
    destination: str
    payload: bytes
    headers: dict[str, str] | None = None
    timeout_s: float | None = None
    signing_secret: str | None = None
    secret_headers: dict[str, str] | None = None


class HttpSender:
    """Sends deliveries over pooled keep-alive connections; use as an async context manager.

    At most ``HTTP_MAX_CONNECTIONS`` requests run at once; further ones wait within their own total timeout.
    Raises SettingsError for malformed secrets.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._signer = Signer(settings.webhook_secrets)
        self._secrets = Secrets(settings.secrets_directory)
        self._timeout_s = settings.http_timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        settings = self._settings
        self._session = aiohttp.ClientSession(
            connector=GuardedConnector(
                SsrfGuard(settings.http_allow_networks),
                limit=settings.http_max_connections,
                connect_timeout_s=settings.http_connect_timeout_s,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            skip_auto_headers=("accept", "accept-encoding"),
            timeout=_total(self._timeout_s),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def send(self, delivery: Delivery) -> Attempted:
        """Makes one attempt within the total timeout. Raises nothing but OwnFaultError and CancelledError."""
        try:
            url = destination_url(delivery.destination)
            headers = self._headers(delivery)
        except SecretError as error:
            return Attempted(RETRY, error=str(error), retry_after_s=SECRET_WAIT_S)
        except ValueError as error:
            return Attempted(FAIL, error=str(error))

        def discreet(text: str) -> str:
            return without_credentials(text, headers, delivery.secret_headers or (), url.raw_query_string)

        answering.set(None)
        timeout_s = delivery.timeout_s or self._timeout_s
        try:
            response = await self._post(url, headers, delivery.payload, timeout_s)
            # `closed` means that the whole answer is here and its connection is back in the pool.
            if response.closed and 200 <= response.status < 300:
                return Attempted(DELIVERED, response.status)
            return await self._judge(response, discreet)
        except OwnFaultError:
            raise
        except Exception as error:
            connection = answering.get()
            if connection is not None and (head := head_of(connection.received)) is not None:
                odd = _oddity(error, timeout_s, discreet)
                return _decided(head.status, head.values(b"location"), head.values(b"retry-after"), discreet, odd=odd)
            return self._unanswered(error, url, timeout_s, delivery.event_id)

    async def _post(
        self, url: URL, headers: dict[str, str], payload: bytes, timeout_s: float
    ) -> aiohttp.ClientResponse:
        session = self._session
        if session is None:
            raise RuntimeError("HttpSender is used outside its context")
        timeout = session.timeout if timeout_s == self._timeout_s else _total(timeout_s)
        return await session.post(url, data=payload, headers=headers, allow_redirects=False, timeout=timeout)

    def _unanswered(self, error: Exception, url: URL, timeout_s: float, event_id: str) -> Attempted:
        """The outcome of an attempt that got no status line. Raises OwnFaultError when this machine is at fault."""
        place = url.host_port_subcomponent
        match error:
            case aiohttp.ClientConnectorError():
                return _not_connected(error, f"{url.raw_host}:{url.port}")
            case aiohttp.ConnectionTimeoutError():
                waited_s = min(self._settings.http_connect_timeout_s, timeout_s)
                return Attempted(RETRY, error=f"timeout: no connection to {place} within {waited_s:g} s")
            case TimeoutError():
                return Attempted(RETRY, error=f"timeout: no complete response within {timeout_s:g} s")
            case aiohttp.ClientResponseError():
                return Attempted(RETRY, error=f"{place} answered with something that is not HTTP")
            case InterimError():
                return Attempted(RETRY, error=f"{place} sent {error}, and no final one")
            case aiohttp.InvalidURL():
                return Attempted(FAIL, error=f"destination: {quoted(place or '')} is not a plain host")
            case aiohttp.ClientConnectionError() | OSError() if own_fault(error) is None:
                if fault := tls_fault(error):
                    return Attempted(RETRY, error=f"no TLS connection with {url.raw_host}:{url.port}: {fault}")
                return Attempted(RETRY, error=f"connection closed by {place} before it answered")
        if own := own_fault(error):
            raise own from error
        _log.error("a delivery failed unexpectedly", extra={"event_id": event_id}, exc_info=error)
        return Attempted(RETRY, error=f"internal error: {type(error).__name__}")

    async def _judge(self, response: aiohttp.ClientResponse, discreet: _Discreet) -> Attempted:
        status = response.status
        body, error = (b"", None) if status == HTTPStatus.SWITCHING_PROTOCOLS else await self._read(response)
        response.close()  # changes nothing after a body read to its end
        excerpt = None
        if body and "content-encoding" not in response.headers:
            excerpt = discreet(body.decode("utf-8", "replace").replace("\0", "\ufffd"))[:EXCERPT_CHARS]
        odd = _oddity(error, _BODY_WAIT_S, discreet) if error else None
        headers = response.headers
        locations, waits = headers.getall("location", []), headers.getall("retry-after", [])
        return _decided(status, locations, waits, discreet, excerpt=excerpt, odd=odd)

    async def _read(self, response: aiohttp.ClientResponse) -> tuple[bytes, Exception | None]:
        """The start of the body, and what broke it. Reads on only while that may save the connection, within bounds."""
        start = b""
        received = 0
        try:
            async with asyncio.timeout(_BODY_WAIT_S):
                while chunk := await response.content.readany():
                    start += chunk[: _EXCERPT_BYTES - len(start)]
                    received += len(chunk)
                    if received > self._settings.http_max_response_bytes:
                        break
        except TimeoutError:
            pass  # too slow: the status has decided, and the connection is given up
        except (aiohttp.ClientError, OSError) as error:
            return start, error
        return start, None

    def _headers(self, delivery: Delivery) -> dict[str, str]:
        timestamp = int(time.time())
        headers = custom_headers(delivery.headers) if delivery.headers else {}
        if delivery.secret_headers:
            read = self._secrets.header
            headers |= custom_headers({name: read(secret) for name, secret in delivery.secret_headers.items()})
        signer = self._signer if delivery.signing_secret is None else self._secrets.signer(delivery.signing_secret)
        headers["content-type"] = "application/json"
        headers["user-agent"] = _USER_AGENT
        headers["webhook-id"] = delivery.event_id
        headers["webhook-timestamp"] = str(timestamp)
        signature = signer.signature(delivery.event_id, timestamp, delivery.payload)
        if signature:
            headers["webhook-signature"] = signature
        headers["orchestrator-attempt"] = str(delivery.attempt)
        headers["orchestrator-scheduled-at"] = delivery.scheduled_at
        return headers


def _place(url: str) -> str:
    """A foreign URL without the parts that may hold secrets: before an @, the query and the fragment."""
    return re.sub(r"(?<![^/\\])[^/\\]*@", "…@", re.sub(r"([?#]).*", r"\1…", url, flags=re.DOTALL))


def _total(seconds: float) -> aiohttp.ClientTimeout:
    # Above its threshold aiohttp rounds deadlines up, by as much as a second; leases rely on exact ones.
    return aiohttp.ClientTimeout(total=seconds, ceil_threshold=float("inf"))


def _described(status: int) -> str:
    """``HTTP 503 Service Unavailable``; the phrase is the standard's, not the receiver's."""
    try:
        return f"HTTP {status} {HTTPStatus(status).phrase}"
    except ValueError:
        return f"HTTP {status:03d}"


def _decided(
    status: int,
    locations: Sequence[str],
    waits: Sequence[str],
    discreet: _Discreet,
    *,
    excerpt: str | None = None,
    odd: str | None = None,
) -> Attempted:
    """The outcome that a status means. `odd`: what was wrong with the rest of the answer."""
    note = "" if odd is None else f"; {odd}"
    error = _described(status) + note
    if 200 <= status < 300:
        return Attempted(DELIVERED, status, error if odd else None)
    if 300 <= status < 400 and locations and locations[0]:
        location = quoted(discreet(_place(locations[0])))
        return Attempted(FAIL, status, f"{_described(status)}: redirect to {location} is not followed{note}", excerpt)
    if status not in _RETRIED_4XX and not 500 <= status < 600:
        return Attempted(FAIL, status, error, excerpt)
    now_s = time.time()
    asked_s = [wait_s for value in waits if (wait_s := parse_retry_after(value, now_s)) is not None]
    return Attempted(RETRY, status, error, excerpt, max(asked_s, default=None))


def _oddity(error: Exception, timeout_s: float, discreet: _Discreet) -> str:
    """What is wrong with an answer whose status line came."""
    match error:
        case TimeoutError():
            return f"its answer was not complete within {timeout_s:g} s"
        case aiohttp.ClientResponseError():
            reason = _QUOTES.sub("", error.message.strip())
            return f"its answer broke the rules of HTTP: {quoted(discreet(reason))}"
        case aiohttp.ClientPayloadError():
            return "its body was broken or cut short"
    return "the connection ended before its answer was complete"


def _not_connected(error: aiohttp.ClientConnectorError, place: str) -> Attempted:
    cause = error.os_error
    if isinstance(cause, AddressRefusedError):
        return Attempted(FAIL, error=f"address refused: {cause}")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return Attempted(RETRY, error=f"host does not resolve: {error.host}")
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return Attempted(RETRY, error=f"the certificate of {place} is not trusted: {tls_fault(error)}")
    if fault := tls_fault(error):
        return Attempted(RETRY, error=f"no TLS connection with {place}: {fault}")
    if isinstance(cause, ConnectionRefusedError):
        return Attempted(RETRY, error=f"connection refused by {place}")
    if isinstance(cause, ConnectionResetError):
        return Attempted(RETRY, error=f"no connection to {place}: the receiver closed it at once")
    return Attempted(RETRY, error=f"no connection to {place}: {cause.strerror or type(cause).__name__}")
