"""How this product connects to Kafka, and the errors it raises when it cannot."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.conn import AIOKafkaConnection, collect_hosts
from aiokafka.errors import (
    AuthenticationFailedError,
    AuthenticationMethodNotSupported,
    IllegalSaslStateError,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    NoBrokersAvailable,
    ProducerClosed,
    SaslAuthenticationFailed,
    UnknownError,
    UnknownTopicOrPartitionError,
    UnsupportedSaslMechanismError,
)
from aiokafka.protocol.metadata import MetadataRequest

from orchestrator.errors import KafkaUnavailable, OrchestratorError, SettingsError
from orchestrator.kafka.producer import Producer
from orchestrator.own_faults import own_fault
from orchestrator.settings import Settings
from orchestrator.tasks import end

_REQUEST_TIMEOUT_S = 15.0
_METADATA_AGE_S = 60.0  # how soon partitions that were added are noticed
_START_TIMEOUT_S = 8.0
_START_GRACE_S = 0.5
_STOP_TIMEOUT_S = 5.0
_EXPLAIN_TIMEOUT_S = 2.0

_BATCH_BYTES = 32 * 1024
_CONNECTION_OPTIONS = {
    "client_id",
    "request_timeout_ms",
    "security_protocol",
    "ssl_context",
    "sasl_mechanism",
    "sasl_plain_username",
    "sasl_plain_password",
}
_LOGIN_REFUSED = (AuthenticationFailedError, SaslAuthenticationFailed)
_LOGIN_IMPOSSIBLE = (AuthenticationMethodNotSupported, UnsupportedSaslMechanismError, IllegalSaslStateError)
_AWAY = (KafkaConnectionError, NoBrokersAvailable, KafkaTimeoutError, ProducerClosed, *_LOGIN_REFUSED)


def client_arguments(settings: Settings, role: str) -> dict[str, Any]:
    """Arguments for any client of aiokafka: the addresses of the brokers, the client id and the login.

    Raises SettingsError when there are no brokers, or a certificate cannot be read.
    """
    if settings.kafka_servers is None:
        raise SettingsError("KAFKA_BOOTSTRAP_SERVERS: is not set; name the brokers, such as localhost:9092")
    arguments: dict[str, Any] = {
        "bootstrap_servers": settings.kafka_servers,
        "client_id": f"orchestrator {role}",
        "security_protocol": settings.kafka_security_protocol,
        "request_timeout_ms": int(_REQUEST_TIMEOUT_S * 1000),
        "metadata_max_age_ms": int(_METADATA_AGE_S * 1000),
    }
    if settings.kafka_security_protocol.endswith("SSL"):
        arguments["ssl_context"] = _ssl_context(settings)
    if settings.kafka_security_protocol.startswith("SASL"):
        arguments |= {
            "sasl_mechanism": settings.kafka_sasl_mechanism,
            "sasl_plain_username": settings.kafka_sasl_username,
            "sasl_plain_password": settings.kafka_sasl_password,
        }
    return arguments


def _ssl_context(settings: Settings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.kafka_ssl_ca_file)
    except OSError as error:  # ssl.SSLError is one
        raise SettingsError(_unreadable("KAFKA_SSL_CA_FILE", settings.kafka_ssl_ca_file, error)) from None
    if settings.kafka_ssl_cert_file is not None:
        try:
            # An encrypted key would ask at the terminal; an empty password makes it fail.
            context.load_cert_chain(settings.kafka_ssl_cert_file, settings.kafka_ssl_key_file, password="")
        except OSError as error:
            files = [settings.kafka_ssl_cert_file, settings.kafka_ssl_key_file]
            shown = " and ".join(file for file in files if file is not None)
            name = "KAFKA_SSL_CERT_FILE, KAFKA_SSL_KEY_FILE"
            raise SettingsError(_unreadable(name, shown, error)) from None
    return context


def _unreadable(name: str, file: str | None, error: OSError) -> str:
    reason = getattr(error, "reason", None) or error.strerror or error
    return f"{name}: expected PEM without a password, got {file!r}: {reason}"


async def start(client: Any) -> None:
    """Starts a client of aiokafka; a start that is cancelled has half a second to end by itself.

    Cut off at once, aiokafka forgets the connection that it is making, and the event loop logs an error for it.
    """
    starting = asyncio.create_task(client.start())
    try:
        await asyncio.shield(starting)
    except asyncio.CancelledError:
        try:
            await asyncio.wait([starting], timeout=_START_GRACE_S)
        finally:
            await end(starting)
        raise


@asynccontextmanager
async def started_producer(settings: Settings, role: str, *, linger_ms: int = 10) -> AsyncIterator[AIOKafkaProducer]:
    """A producer for as long as the context lasts: every record acknowledged by all replicas in sync, in lz4.

    Raises KafkaUnavailable within about ten seconds when no broker can be used. At the end it has five seconds to
    deliver the records it holds; the others fail with ProducerClosed. (aiokafka's own producer would try to start or
    stop for as long as no broker answers.)
    """
    producer = Producer(
        **client_arguments(settings, role),
        acks="all",
        enable_idempotence=settings.kafka_idempotence,
        compression_type="lz4",
        max_batch_size=_BATCH_BYTES,
        linger_ms=linger_ms,
    )
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            await start(producer)
    except (KafkaError, OSError) as error:  # TimeoutError is one
        await producer.abandon()
        raise await start_failure(settings, role, error) from error
    except BaseException:
        await producer.abandon()
        raise
    try:
        yield producer
    finally:
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await producer.flush()
        finally:
            await producer.abandon()


@contextmanager
def kafka_errors() -> Iterator[None]:
    """Raises KafkaUnavailable for TimeoutError, and for errors that mean that the brokers are away."""
    try:
        yield
    except TimeoutError as error:
        raise KafkaUnavailable("KAFKA_BOOTSTRAP_SERVERS: the brokers do not answer in time") from error
    except KafkaError as error:
        # aiokafka marks errors that may pass by themselves, and counts a topic that does not exist among them.
        passing = isinstance(error, _AWAY) or error.retriable
        if not passing or isinstance(error, UnknownTopicOrPartitionError):
            raise
        raise KafkaUnavailable(f"KAFKA_BOOTSTRAP_SERVERS: the brokers cannot be used just now: {error}") from error


async def start_failure(settings: Settings, role: str, error: BaseException) -> OrchestratorError:
    """The error to raise for a client that failed to start with `error`; connects once more to find the cause.

    aiokafka only logs why it cannot connect; the error that it raises does not say.
    """
    arguments = client_arguments(settings, role)
    servers = [(host, port) for host, port, _ in collect_hosts(arguments["bootstrap_servers"], randomize=False)]
    failures = await asyncio.gather(*(_failure(host, port, arguments) for host, port in servers))
    for fault in map(own_fault, filter(None, (error, *failures))):
        if fault is not None:
            return KafkaUnavailable(f"KAFKA_BOOTSTRAP_SERVERS: {fault}", fault)
    reasons = [
        _explained(settings, f"{host}:{port}", failure)
        for (host, port), failure in zip(servers, failures, strict=True)
        if failure is not None
    ]
    if isinstance(error, UnknownError) and settings.kafka_idempotence:
        return KafkaUnavailable(
            f"KAFKA_IDEMPOTENCE: {settings.kafka_servers} does not number what producers send: {error}; set it to "
            "false for brokers that cannot"
        )
    if len(reasons) < len(servers):
        shown = str(error) or type(error).__name__
        return KafkaUnavailable(f"KAFKA_BOOTSTRAP_SERVERS: {settings.kafka_servers} cannot be used just now: {shown}")
    # A reason that names a wrong setting is worth more than a broker that is only away.
    return KafkaUnavailable(min(reasons, key=lambda reason: reason.startswith("KAFKA_BOOTSTRAP_SERVERS")))


async def _failure(host: str, port: int, arguments: Mapping[str, Any]) -> BaseException | None:
    """Why the broker there cannot be used; None when it can."""
    options = {name: value for name, value in arguments.items() if name in _CONNECTION_OPTIONS}
    connection = AIOKafkaConnection(host, port, **options)
    try:
        async with asyncio.timeout(_EXPLAIN_TIMEOUT_S):
            await connection.connect()
            # Requests that need no login succeed even with brokers that demand one.
            await connection.send(MetadataRequest([]))
    except (KafkaError, OSError) as failure:
        return failure
    finally:
        closed = connection.close()
        if connection._protocol is not None:
            await asyncio.wait([closed], timeout=_EXPLAIN_TIMEOUT_S)
    return None


def _explained(settings: Settings, server: str, error: BaseException) -> str:
    protocol = settings.kafka_security_protocol
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    for each in causes:
        if isinstance(each, _LOGIN_REFUSED):
            return (
                f"KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD: {server} refuses {settings.kafka_sasl_username!r} with "
                f"{settings.kafka_sasl_mechanism}: {_said(each)}"
            )
        if isinstance(each, _LOGIN_IMPOSSIBLE):
            return f"KAFKA_SASL_MECHANISM: {server} does not take {settings.kafka_sasl_mechanism}: {_said(each)}"
        if isinstance(each, ssl.SSLCertVerificationError):
            return f"KAFKA_SSL_CA_FILE: the certificate of {server} is not trusted: {each.verify_message}"
        if isinstance(each, ssl.SSLError) and any(word in str(each.reason) for word in ("CERTIFICATE", "UNKNOWN_CA")):
            shown = settings.kafka_ssl_cert_file or "to speak with us without one"
            return f"KAFKA_SSL_CERT_FILE: {server} refuses {shown}: {each.reason}"
        if isinstance(each, ssl.SSLError):
            return f"KAFKA_SECURITY_PROTOCOL: {server} does not speak {protocol} with us: {each.reason or each}"
    if isinstance(error, KafkaConnectionError | EOFError | ConnectionResetError | TimeoutError):
        return f"KAFKA_SECURITY_PROTOCOL: {server} does not answer; it hangs, or {protocol} is not what it speaks"
    return f"KAFKA_BOOTSTRAP_SERVERS: no broker answers at {server}: {_said(error)}"


def _said(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.removeprefix(f"{type(error).__name__}: ") or type(error).__name__
