"""Delivers events over HTTP: one signed POST an attempt, as Standard Webhooks describes it.

The status line decides an attempt: a receiver that has sent 2xx has the event, whatever becomes of the rest
of its answer. Bodies are read only to reuse the connection and to quote failures, both within bounds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from http import HTTPStatus
from types import TracebackType
from typing import TYPE_CHECKING, Self

import aiohttp
import msgspec

from orchestrator.errors import OwnFaultError
from orchestrator.own_faults import own_fault

from .attempt import DELIVERED, FAIL, RETRY, Attempted
from .connector import GuardedConnector, opened_connection
from .echoes import without_credentials
from .guard import AddressGuard, AddressRefusedError
from .request import custom_headers, destination_url, quoted
from .retry_after import parse_retry_after
from .secrets import SECRET_WAIT_S, SecretError, Secrets
from .signing import Signer

if TYPE_CHECKING:
    from yarl import URL

    from orchestrator.config import Settings

EXCERPT_CHARS = 1024
_EXCERPT_BYTES = 4 * EXCERPT_CHARS  # holds the excerpt in any UTF-8
_USER_AGENT = "scheduled-event-orchestrator/1"
_BODY_WAIT_S = 1.0  # for the rest of a body whose status has decided already
_RETRIED_4XX = frozenset((408, 425, 429))
_RESENDS = 2  # at most so many idle connections are found closed by one delivery

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
                AddressGuard(settings.http_allow_networks),
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
        place = url.host_port_subcomponent
        timeout_s = delivery.timeout_s or self._timeout_s
        try:
            response = await self._post(url, headers, delivery.payload, timeout_s)
            # `closed` means that the whole answer is here and its connection is back in the pool.
            if response.closed and 200 <= response.status < 300:
                return Attempted(DELIVERED, response.status)
            attempted = await self._judge(response)
            return _discreet(attempted, headers, delivery.secret_headers or (), url)
        except aiohttp.ClientConnectorError as error:
            return _not_connected(error, f"{url.raw_host}:{url.port}")
        except aiohttp.ConnectionTimeoutError:
            waited_s = min(self._settings.http_connect_timeout_s, timeout_s)
            return Attempted(RETRY, error=f"timeout: no connection to {place} within {waited_s:g} s")
        except TimeoutError:
            return Attempted(RETRY, error=f"timeout: no complete response within {timeout_s:g} s")
        except aiohttp.ClientResponseError:
            return Attempted(RETRY, error=f"{place} answered with something that is not HTTP")
        except aiohttp.InvalidURL:
            return Attempted(FAIL, error=f"destination: {quoted(place or '')} is not a plain host")
        except OwnFaultError:
            raise
        except (aiohttp.ClientConnectionError, OSError) as error:
            if fault := own_fault(error):
                raise fault from error
            return Attempted(RETRY, error=f"connection closed by {place} before it answered")
        except Exception as error:
            if fault := own_fault(error):
                raise fault from error
            _log.exception("a delivery failed in a way not foreseen", extra={"event_id": delivery.event_id})
            return Attempted(RETRY, error=f"internal error: {type(error).__name__}")

    async def _post(
        self, url: URL, headers: dict[str, str], payload: bytes, timeout_s: float
    ) -> aiohttp.ClientResponse:
        """Posts once, and again at once if the request only met a connection that had gone stale.

        A receiver may close an idle connection just as we write to it. It has hardly seen that request then,
        though it may have; but deliveries are at least once and `webhook-id` tells a repeat, so sending again
        is better than spending an attempt and its backoff. A request that had opened its connection is never
        repeated: that receiver has seen it.
        """
        session = self._session
        if session is None:
            raise RuntimeError("HttpSender is used outside its context")
        opened_connection.set(False)
        started_s = time.monotonic()
        timeout = session.timeout if timeout_s == self._timeout_s else _total(timeout_s)
        for resends_left in range(_RESENDS, -1, -1):
            try:
                return await session.post(url, data=payload, headers=headers, allow_redirects=False, timeout=timeout)
            except aiohttp.ClientConnectorError:
                raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionResetError):
                left_s = timeout_s - (time.monotonic() - started_s)
                if opened_connection.get() or not resends_left or left_s <= 0:
                    raise
                timeout = _total(left_s)
        raise AssertionError("the last round returns or raises")

    async def _judge(self, response: aiohttp.ClientResponse) -> Attempted:
        status = response.status
        body = await self._read(response)
        if 200 <= status < 300:
            return Attempted(DELIVERED, status)
        excerpt = None
        if body and "content-encoding" not in response.headers:
            excerpt = body.decode("utf-8", "replace").replace("\0", "\ufffd")
        error = _described(status)
        if 300 <= status < 400:
            location = quoted(_without_query(response.headers.get("location", "")))
            return Attempted(FAIL, status, f"{error}: redirect to {location} is not followed", excerpt)
        if 400 <= status < 500 and status not in _RETRIED_4XX:
            return Attempted(FAIL, status, error, excerpt)
        retry_after_s = parse_retry_after(response.headers.get("retry-after"), time.time())
        return Attempted(RETRY, status, error, excerpt, retry_after_s)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        """The start of the body. Reads on only while that may save the connection, and within the bounds."""
        start = b""
        received = 0
        # Cut short or too slow: the status has decided, and the connection is given up.
        with suppress(TimeoutError, aiohttp.ClientError, OSError):
            try:
                async with asyncio.timeout(_BODY_WAIT_S):
                    while chunk := await response.content.readany():
                        start += chunk[: _EXCERPT_BYTES - len(start)]
                        received += len(chunk)
                        if received > self._settings.http_max_response_bytes:
                            break
            finally:
                response.close()  # changes nothing after a body read to its end
        return start

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


def _discreet(attempted: Attempted, headers: Mapping[str, str], secret_headers: Collection[str], url: URL) -> Attempted:
    """The same with a short excerpt that repeats no credential."""
    if attempted.response is None:
        return attempted
    said = without_credentials(attempted.response, headers, secret_headers, url.raw_query_string)
    return attempted._replace(response=said[:EXCERPT_CHARS])


def _without_query(location: str) -> str:
    path, mark, _ = location.partition("?")
    return path + (mark and "?…")


def _total(seconds: float) -> aiohttp.ClientTimeout:
    # Above its threshold aiohttp rounds deadlines up, by as much as a second; leases count on this one.
    return aiohttp.ClientTimeout(total=seconds, ceil_threshold=float("inf"))


def _described(status: int) -> str:
    """``HTTP 503 Service Unavailable``; the phrase is the standard's, not the receiver's."""
    try:
        return f"HTTP {status} {HTTPStatus(status).phrase}"
    except ValueError:
        return f"HTTP {status}"


def _not_connected(error: aiohttp.ClientConnectorError, place: str) -> Attempted:
    cause = error.os_error
    if isinstance(cause, AddressRefusedError):
        return Attempted(FAIL, error=f"address refused: {cause}")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return Attempted(RETRY, error=f"host does not resolve: {error.host}")
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return Attempted(RETRY, error=f"the certificate of {place} is not trusted")
    if isinstance(error, aiohttp.ClientSSLError):
        return Attempted(RETRY, error=f"no TLS connection with {place}")
    if isinstance(cause, ConnectionRefusedError):
        return Attempted(RETRY, error=f"connection refused by {place}")
    return Attempted(RETRY, error=f"no connection to {place}: {cause.strerror or type(cause).__name__}")
