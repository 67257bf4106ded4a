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
import socket
import ssl
import time
from collections.abc import Callable
from http import HTTPStatus
from types import TracebackType
from typing import TYPE_CHECKING, Self

import msgspec

from orchestrator.dispatch.attempt import DELIVERED, FAIL, RETRY, Attempted
from orchestrator.dispatch.http.answer import (
    Answer,
    BrokenAnswerError,
    BrokenBodyError,
    Head,
    InterimError,
    head_of,
)
from orchestrator.dispatch.http.connector import GuardedConnector
from orchestrator.dispatch.http.pool import NoConnectionInTimeError, Pool
from orchestrator.dispatch.http.redaction import without_credentials
from orchestrator.dispatch.http.request import Destination, Origin, custom_headers, destination_of, quoted
from orchestrator.dispatch.http.retry_after import parse_retry_after
from orchestrator.dispatch.http.secrets import SECRET_WAIT_S, SecretError, Secrets
from orchestrator.dispatch.http.signing import Signer
from orchestrator.dispatch.http.ssrf_guard import AddressRefusedError, SsrfGuard
from orchestrator.dispatch.http.tls import tls_fault
from orchestrator.errors import OwnFaultError
from orchestrator.events.tracing import CORRELATION_ID_HEADER, TRACEPARENT_HEADER, followed
from orchestrator.own_faults import own_fault

if TYPE_CHECKING:
    from orchestrator.settings import Settings

EXCERPT_CHARS = 1024
_USER_AGENT = "scheduled-event-orchestrator/1"
_RETRIED_4XX = frozenset((408, 425, 429))

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
        self._pool: Pool | None = None

    async def __aenter__(self) -> Self:
        settings = self._settings
        self._loop = asyncio.get_running_loop()
        connector = GuardedConnector(
            SsrfGuard(settings.http_allow_networks),
            connect_timeout_s=settings.http_connect_timeout_s,
            most_body_bytes=settings.http_max_response_bytes,
        )
        self._pool = Pool(connector, settings.http_max_connections)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.close()

    async def send(self, delivery: Delivery) -> Attempted:
        """Makes one attempt within the total timeout. Raises nothing but OwnFaultError and CancelledError."""
        try:
            destination = destination_of(delivery.destination)
            headers = self._extra_headers(delivery)
            timestamp = int(time.time())
            signature = self._signer_of(delivery).signature(delivery.event_id, timestamp, delivery.payload)
        except SecretError as error:
            return Attempted(RETRY, error=str(error), retry_after_s=SECRET_WAIT_S)
        except ValueError as error:
            return Attempted(FAIL, error=str(error))
        request = _request(destination, delivery, headers, timestamp, signature)
        timeout_s = delivery.timeout_s or self._settings.http_timeout_s
        try:
            answer = await self._post(destination.origin, request, timeout_s)
        except OwnFaultError:
            raise
        except Exception as error:
            return self._not_connected(error, destination, timeout_s, delivery)
        if answer.error is None and 200 <= answer.status < 300:
            return Attempted(DELIVERED, answer.status)
        head = head_of(answer.received)
        if head is None:
            return self._unanswered(answer.error, destination, timeout_s, delivery)

        def discreet(text: str) -> str:
            signed = headers | {"webhook-signature": signature}
            return without_credentials(text, signed, delivery.secret_headers or (), destination.query)

        return _decided(head, answer, timeout_s, discreet)

    async def _post(self, origin: Origin, request: bytes, timeout_s: float) -> Answer:
        pool = self._pool
        if pool is None:
            raise RuntimeError("HttpSender is used outside its context")
        deadline_s = self._loop.time() + timeout_s
        connection = pool.take_idle(origin) or await pool.take(origin, deadline_s)
        try:
            return await connection.post(request, deadline_s)
        finally:
            pool.give_back(origin, connection)

    def _signer_of(self, delivery: Delivery) -> Signer:
        name = delivery.signing_secret
        return self._signer if name is None else self._secrets.signer(name)

    def _extra_headers(self, delivery: Delivery) -> dict[str, str]:
        """The event's own headers, and those of its destination."""
        headers = custom_headers(delivery.headers) if delivery.headers else {}
        if delivery.secret_headers:
            read = self._secrets.header
            headers |= custom_headers({name: read(secret) for name, secret in delivery.secret_headers.items()})
        return headers

    def _not_connected(
        self, error: Exception, destination: Destination, timeout_s: float, delivery: Delivery
    ) -> Attempted:
        """The outcome of an attempt that got no connection."""
        host, port, _ = destination.origin
        place = f"{host}:{port}"
        match error:
            case NoConnectionInTimeError():
                waited_s = min(self._settings.http_connect_timeout_s, timeout_s)
                reason = f"timeout: no connection to {destination.place} within {waited_s:g} s"
            case AddressRefusedError():
                return Attempted(FAIL, error=f"address refused: {error}")
            case socket.gaierror():
                reason = f"host does not resolve: {host}"
            case ssl.SSLCertVerificationError():
                reason = f"the certificate of {place} is not trusted: {tls_fault(error)}"
            case ssl.SSLError():
                reason = f"no TLS connection with {place}: {tls_fault(error)}"
            case ConnectionRefusedError():
                reason = f"connection refused by {place}"
            case ConnectionResetError():
                reason = f"no connection to {place}: the receiver closed it at once"
            case OSError():
                reason = f"no connection to {place}: {error.strerror or type(error).__name__}"
            case _:
                return _unexpected(error, delivery)
        return Attempted(RETRY, error=reason)

    def _unanswered(
        self, error: Exception | None, destination: Destination, timeout_s: float, delivery: Delivery
    ) -> Attempted:
        """The outcome of an attempt that got no status line. Raises OwnFaultError when this machine is at fault."""
        place = destination.place
        match error:
            case TimeoutError() if error.errno is None:
                reason = f"timeout: no complete response within {timeout_s:g} s"
            case BrokenAnswerError():
                reason = f"{place} answered with something that is not HTTP"
            case InterimError():
                reason = f"{place} sent {error}, and no final one"
            case OSError() if (own := own_fault(error)) is not None:
                raise own from error
            case OSError() if (fault := tls_fault(error)) is not None:
                reason = "no TLS connection with {}:{}: {}".format(*destination.origin[:2], fault)
            case OSError():
                reason = f"connection closed by {place} before it answered"
            case _:
                return _unexpected(error, delivery)
        return Attempted(RETRY, error=reason)


def _request(
    destination: Destination, delivery: Delivery, headers: dict[str, str], timestamp: int, signature: str
) -> bytes:
    """The bytes of the request. All that goes into them was checked for line ends, or is ours."""
    head = (
        f"Content-Length: {len(delivery.payload)}\r\n"
        "content-type: application/json\r\n"
        f"user-agent: {_USER_AGENT}\r\n"
        f"webhook-id: {delivery.event_id}\r\n"
        f"webhook-timestamp: {timestamp}\r\n"
        f"orchestrator-attempt: {delivery.attempt}\r\n"
        f"orchestrator-scheduled-at: {delivery.scheduled_at}\r\n"
    )
    if signature:
        head += f"webhook-signature: {signature}\r\n"
    for name, value in headers.items():
        head += f"{name}: {value}\r\n"
    return b"%b%b\r\n%b" % (destination.head, head.encode(), delivery.payload)


def _unexpected(error: Exception | None, delivery: Delivery) -> Attempted:
    sent = delivery.headers or {}
    about = followed(delivery.event_id, sent.get(CORRELATION_ID_HEADER), sent.get(TRACEPARENT_HEADER))
    _log.error("a delivery failed unexpectedly", extra=about, exc_info=error)
    return Attempted(RETRY, error=f"internal error: {type(error).__name__}")


def _place(url: str) -> str:
    """A foreign URL without the parts that may hold secrets: before an @, the query and the fragment."""
    return re.sub(r"(?<![^/\\])[^/\\]*@", "…@", re.sub(r"([?#]).*", r"\1…", url, flags=re.DOTALL))


def _described(status: int) -> str:
    """``HTTP 503 Service Unavailable``; the phrase is the standard's, not the receiver's."""
    try:
        return f"HTTP {status} {HTTPStatus(status).phrase}"
    except ValueError:
        return f"HTTP {status:03d}"


def _decided(head: Head, answer: Answer, timeout_s: float, discreet: _Discreet) -> Attempted:
    """The outcome that a status means, whatever is wrong with the rest of the answer."""
    status = head.status
    note = "" if answer.error is None else f"; {_oddity(answer.error, timeout_s)}"
    error = _described(status) + note
    if 200 <= status < 300:
        return Attempted(DELIVERED, status, error if note else None)
    excerpt = None
    if answer.body and not head.values(b"content-encoding"):
        excerpt = discreet(answer.body.decode("utf-8", "replace").replace("\0", "\ufffd"))[:EXCERPT_CHARS]
    locations = head.values(b"location")
    if 300 <= status < 400 and locations and locations[0]:
        location = quoted(discreet(_place(locations[0])))
        return Attempted(FAIL, status, f"{_described(status)}: redirect to {location} is not followed{note}", excerpt)
    if status not in _RETRIED_4XX and not 500 <= status < 600:
        return Attempted(FAIL, status, error, excerpt)
    now_s = time.time()
    waits = head.values(b"retry-after")
    asked_s = [wait_s for value in waits if (wait_s := parse_retry_after(value, now_s)) is not None]
    return Attempted(RETRY, status, error, excerpt, max(asked_s, default=None))


def _oddity(error: Exception, timeout_s: float) -> str:
    """What is wrong with an answer whose status line came."""
    match error:
        case TimeoutError() if error.errno is None:
            return f"its answer was not complete within {timeout_s:g} s"
        case BrokenAnswerError():
            return f"its answer broke the rules of HTTP: {error}"
        case BrokenBodyError():
            return "its body was broken or cut short"
    return "the connection ended before its answer was complete"
