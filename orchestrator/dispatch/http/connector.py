"""Connections of deliveries: the SSRF guard checks each address, and there are bounds on time and idle ones."""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from aiohttp import ClientConnectorCertificateError, ClientTimeout, TCPConnector
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler

from orchestrator.dispatch.http.answer import AnswerProtocol
from orchestrator.dispatch.http.ssrf_guard import AddressRefusedError, SsrfGuard
from orchestrator.dispatch.http.tls import tls_context
from orchestrator.own_faults import no_authorities, own_fault, trusts_nobody

if TYPE_CHECKING:
    from aiohappyeyeballs import AddrInfoType
    from aiohttp import ClientRequest
    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.tracing import Trace

# Receivers close idle connections, many after five seconds; a request that crosses that on its way is lost.
_KEEPALIVE_S = 4.0
_RESOLVER_THREADS = 32


class GuardedResolver(AbstractResolver):
    """Resolves names to the addresses that the SSRF guard lets through; AddressRefusedError if it refuses them all.

    It has its own threads: a few names with dead name servers would block those that the event loop shares with others.
    """

    def __init__(self, guard: SsrfGuard) -> None:
        self._guard = guard
        self._threads = ThreadPoolExecutor(_RESOLVER_THREADS, thread_name_prefix="resolve")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._threads, _addresses, host, port, family)
        except UnicodeError as error:  # an empty or overlong label
            raise socket.gaierror(socket.EAI_NONAME, str(error)) from error
        allowed: list[ResolveResult] = []
        refusal = "it has no address"
        for address_family, _, protocol, _, (address, *_) in found:
            reason = self._guard.refusal(str(address))
            if reason is None:
                allowed.append(
                    ResolveResult(
                        hostname=host,
                        host=str(address),
                        port=port,
                        family=address_family,
                        proto=protocol,
                        flags=0,
                    )
                )
            else:
                refusal = reason
        if not allowed:
            raise AddressRefusedError(refusal)
        return allowed

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _addresses(host: str, port: int, family: socket.AddressFamily) -> list[tuple[Any, ...]]:
    try:
        return [*socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)]
    except socket.gaierror as error:
        if fault := own_fault(error):  # checked at once: descriptors come and go
            raise fault from error
        raise


class GuardedConnector(TCPConnector):
    """aiohttp's connector; the SSRF guard checks the address of every socket.

    Raises OwnFaultError when this machine cannot connect to anything.

    Resolving, connecting and the TLS handshake share one deadline, however many addresses a name has.
    aiohttp bounds the connections in use but not the idle ones. Here the same bound holds for both, so that deliveries
    to very many hosts do not run out of file descriptors.
    """

    def __init__(self, guard: SsrfGuard, *, limit: int, connect_timeout_s: float) -> None:
        def guarded_socket(address: AddrInfoType) -> socket.socket:
            family, kind, protocol, _, (host, *_) = address
            # The resolver has filtered already, but literal addresses never pass through it.
            guard.check(str(host))
            return socket.socket(family, kind, protocol)

        self._guarded_resolver = GuardedResolver(guard)
        super().__init__(
            limit=limit,
            resolver=self._guarded_resolver,
            socket_factory=guarded_socket,
            ssl=tls_context(),
            keepalive_timeout=_KEEPALIVE_S,
        )
        protocol: Callable[..., ResponseHandler] = AnswerProtocol
        self._factory = functools.partial(protocol, loop=self._loop)
        self._connect_timeout_s = connect_timeout_s
        self._trusts_nobody = trusts_nobody()

    def _release(self, key: ConnectionKey, protocol: ResponseHandler, *, should_close: bool = False) -> None:
        super()._release(key, protocol, should_close=should_close)
        if protocol.transport is not None and isinstance(protocol, AnswerProtocol):
            protocol.rest()

    async def _create_connection(
        self,
        req: ClientRequest,
        traces: list[Trace],
        timeout: ClientTimeout,  # noqa: ASYNC109 - the signature is aiohttp's
    ) -> ResponseHandler:
        self._close_oldest_idle()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                return await super()._create_connection(req, traces, timeout)
        except ClientConnectorCertificateError as error:
            if self._trusts_nobody:
                raise no_authorities() from error
            raise
        except Exception as error:
            fault = own_fault(error)
            # A machine without IPv6 has no address for it, either.
            if fault is None or (fault.kind == "EADDRNOTAVAIL" and ":" in (req.url.raw_host or "")):
                raise
            raise fault from error

    def _close_oldest_idle(self) -> None:
        # Hosts are kept in the order in which they last went from no idle connection to one.
        while self._conns and sum(map(len, self._conns.values())) >= self.limit:
            host = next(iter(self._conns))
            connection, _ = self._conns[host].popleft()
            connection.close()
            if not self._conns[host]:
                del self._conns[host]

    async def close(self, *, abort_ssl: bool = False) -> None:
        await super().close(abort_ssl=abort_ssl)
        await self._guarded_resolver.close()
