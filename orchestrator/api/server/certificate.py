"""The API's certificate: read from its files, and read again when they change.

New connections get the newest pair of certificate and key; those that exist keep theirs. Files are replaced one after
the other, so a pair that does not match is tried again, and the pair in force stays meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NamedTuple

from orchestrator.errors import SettingsError
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings

LOOK_S = 5.0
SOON_S = 7 * 86_400.0
"""Before its end by less than this, a certificate should have been renewed."""
_SAY_AGAIN_S = 3600.0
_MAX_BYTES = 1 << 20

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_VERSION, _UTC_TIME = 0xA0, 0x17  # tags of DER

_log = logging.getLogger(__name__)


class Pair(NamedTuple):
    """A certificate with its key, ready for use; valid from `begins_at` to `ends_at`, in seconds of Unix time."""

    context: ssl.SSLContext
    begins_at: float
    ends_at: float
    files: tuple[bytes, ...]


def load(settings: Settings) -> Pair | None:
    """Reads the files; None: the API speaks no TLS. Raises SettingsError, which names the file that is wrong."""
    if settings.ssl_cert_file is None or settings.ssl_key_file is None:
        return None
    files = _contents(settings)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    begins_at, ends_at = _validity(settings.ssl_cert_file, files[0])
    _load_pair(context, settings.ssl_cert_file, settings.ssl_key_file)
    if settings.ssl_client_ca_file is not None:
        try:
            context.load_verify_locations(cadata=files[2].decode("ascii"))
        except (ValueError, ssl.SSLError):
            path = settings.ssl_client_ca_file
            raise SettingsError(f"SERVER_SSL_CLIENT_CA_FILE: expected certificates (PEM) in {path}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return Pair(context, begins_at, ends_at, files)


def _contents(settings: Settings) -> tuple[bytes, ...]:
    found = []
    for name, path in (
        ("SERVER_SSL_CERT_FILE", settings.ssl_cert_file),
        ("SERVER_SSL_KEY_FILE", settings.ssl_key_file),
        ("SERVER_SSL_CLIENT_CA_FILE", settings.ssl_client_ca_file),
    ):
        if path is not None:
            try:
                with open(path, "rb") as file:
                    found.append(file.read(_MAX_BYTES))
            except OSError as error:
                raise SettingsError(
                    f"{name}: cannot read {path}: {error.strerror or error}; mount it, or let this user read it"
                ) from None
    return tuple(found)


def _load_pair(context: ssl.SSLContext, cert_file: str, key_file: str) -> None:
    def passphrase() -> str:
        raise SettingsError(
            f"SERVER_SSL_KEY_FILE: the key in {key_file} has a passphrase; write it without: openssl pkey -in … -out …"
        )

    try:
        context.load_cert_chain(cert_file, key_file, passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            why = f"SERVER_SSL_KEY_FILE: the key in {key_file} is not that of the certificate in {cert_file}"
        else:
            why = f"SERVER_SSL_CERT_FILE and SERVER_SSL_KEY_FILE: cannot use {cert_file} with {key_file}"
        raise SettingsError(f"{why} ({error.reason or 'no PEM'}); write both files of one pair") from None
    except OSError as error:
        raise SettingsError(f"SERVER_SSL_KEY_FILE: cannot read {key_file}: {error.strerror or error}") from None


def _validity(path: str, pem: bytes) -> tuple[float, float]:
    """When all certificates of a PEM file are valid. The ssl module tells it only of certificates of peers."""
    try:
        spans = [_span(ssl.PEM_cert_to_DER_cert(each.decode("ascii"))) for each in _PEM.findall(pem)]
        return max(first for first, _ in spans), min(last for _, last in spans)
    except (ValueError, IndexError, StopIteration):
        raise SettingsError(f"SERVER_SSL_CERT_FILE: expected a certificate (PEM) in {path}") from None


def _span(der: bytes) -> tuple[float, float]:
    [(_, certificate)] = _elements(der)
    _, to_be_signed = next(_elements(certificate))
    # [version], serial number, algorithm, issuer, validity
    fields = [(tag, content) for tag, content in _elements(to_be_signed) if tag != _VERSION]
    first, last = (_time(tag, content) for tag, content in _elements(fields[3][1]))
    return first, last


def _elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """The tag and the content of each element of DER."""
    at = 0
    while at < len(der):
        tag, size, at = der[at], der[at + 1], at + 2
        if size & 0x80:
            digits = size & 0x7F
            size, at = int.from_bytes(der[at : at + digits], "big"), at + digits
        yield tag, der[at : at + size]
        at += size


def _time(tag: int, content: bytes) -> float:
    form = "%y%m%d%H%M%SZ" if tag == _UTC_TIME else "%Y%m%d%H%M%SZ"
    return datetime.strptime(content.decode("ascii"), form).replace(tzinfo=UTC).timestamp()


def doubt(pair: Pair) -> str | None:
    """What clients will say against a certificate now or within days, or None."""
    now = time.time()
    begins, ends = (f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC" for at in (pair.begins_at, pair.ends_at))
    if now >= pair.ends_at:
        return f"the API's certificate has expired, on {ends}; clients refuse it"
    if now < pair.begins_at:
        return f"the API's certificate is not valid before {begins}; clients refuse it"
    return f"the API's certificate expires on {ends}" if now >= pair.ends_at - SOON_S else None


class Certificate:
    """The pair in force."""

    def __init__(self, settings: Settings, metrics: Metrics, pair: Pair) -> None:
        self._settings = settings
        self._expires_at = metrics.tls_certificate_expiry_timestamp_seconds("api")
        self._said_at = -_SAY_AGAIN_S
        self._refused: tuple[str, int] = ("", 0)
        self._use(pair)

    @property
    def context(self) -> ssl.SSLContext:
        """For the next connection."""
        return self._pair.context

    async def watch(self) -> None:
        """Looks at the files again and again; never returns."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self._look()
            self._say_doubt()

    async def _look(self) -> None:
        try:
            if await asyncio.to_thread(_contents, self._settings) == self._pair.files:
                self._refused = ("", 0)
                return
            pair = await asyncio.to_thread(load, self._settings)
        except SettingsError as error:
            # The first time, the other file may be about to follow.
            text, times = self._refused
            self._refused = str(error), times + 1 if str(error) == text else 1
            if self._refused[1] == 2:
                _log.error("a new certificate is refused, the one before stays: %s", error)
            return
        if pair is not None:
            self._refused = ("", 0)
            self._use(pair)
            _log.info("the API uses a new certificate", extra={"expires_at": self._ends()})

    def _use(self, pair: Pair) -> None:
        self._pair = pair
        self._expires_at.set(pair.ends_at)
        self._said_at = -_SAY_AGAIN_S
        self._say_doubt()

    def _say_doubt(self) -> None:
        text = doubt(self._pair)
        if text is not None and time.monotonic() - self._said_at >= _SAY_AGAIN_S:
            self._said_at = time.monotonic()
            level = logging.WARNING if text.startswith("the API's certificate expires") else logging.ERROR
            _log.log(level, "%s; renew SERVER_SSL_CERT_FILE and SERVER_SSL_KEY_FILE", text)

    def _ends(self) -> str:
        return datetime.fromtimestamp(self._pair.ends_at, UTC).isoformat()
