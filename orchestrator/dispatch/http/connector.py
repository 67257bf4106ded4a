"""Opens connections for deliveries; the SSRF guard checks the address of every socket."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor
from ssl import SSLCertVerificationError
from typing import TYPE_CHECKING

import aiohappyeyeballs

from orchestrator.dispatch.http.connection import Connection
from orchestrator.dispatch.http.ssrf_guard import AddressRefusedError, SsrfGuard
from orchestrator.dispatch.http.tls import tls_context
from orchestrator.own_faults import no_authorities, own_fault, trusts_nobody

if TYPE_CHECKING:
    from aiohappyeyeballs import AddrInfoType

    from orchestrator.dispatch.http.request import Origin

_RESOLVER_THREADS = 32
_RESOLVED_S = 10.0  # for which the addresses of a name are used again
_NEXT_ADDRESS_S = 0.25  # before the next address is tried beside one that does not answer (RFC 8305)


class GuardedResolver:
    """Resolves names to the addresses that the SSRF guard lets through.

    It has its own threads: a few names with dead name servers would block those that the event loop shares with others.
    """

    def __init__(self, guard: SsrfGuard) -> None:
        self._guard = guard
        self._threads = ThreadPoolExecutor(_RESOLVER_THREADS, thread_name_prefix="resolve")
        self._found: dict[tuple[str, int], asyncio.Future[list[AddrInfoType]]] = {}

    async def resolve(self, host: str, port: int) -> list[AddrInfoType]:
        """Addresses to connect to. Raises socket.gaierror, or AddressRefusedError when the guard refuses them all."""
        literal = _literal(host, port)
        found = [literal] if literal else await self._look_up(host, port)
        allowed: list[AddrInfoType] = []
        refusal = "it has no address"
        for address in found:
            reason = self._guard.refusal(str(address[4][0]))
            if reason is None:
                allowed.append(address)
            else:
                refusal = reason
        if not allowed:
            raise AddressRefusedError(refusal)
        return allowed

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _look_up(self, host: str, port: int) -> list[AddrInfoType]:
        """What all who ask for a name within `_RESOLVED_S` share; its addresses take turns at being the first."""
        loop = asyncio.get_running_loop()
        asked = self._found.get((host, port))
        if asked is None:
            asked = loop.run_in_executor(self._threads, _addresses, host, port)
            self._found[host, port] = asked

            def forget(ended: asyncio.Future[list[AddrInfoType]]) -> None:
                failed = ended.cancelled() or ended.exception() is not None
                loop.call_later(0 if failed else _RESOLVED_S, self._found.pop, (host, port), None)

            asked.add_done_callback(forget)
        addresses = await asyncio.shield(asked)
        found = addresses.copy()
        addresses.append(addresses.pop(0))
        return found


class GuardedConnector:
    """Opens connections; the SSRF guard checks the address of every socket.

    Resolving, connecting and the TLS handshake share one deadline, however many addresses a name has.
    """

    def __init__(self, guard: SsrfGuard, *, connect_timeout_s: float, most_body_bytes: int) -> None:
        self._guard = guard
        self._resolver = GuardedResolver(guard)
        self._connect_timeout_s = connect_timeout_s
        self._tls = tls_context()
        self._trusts_nobody = trusts_nobody()
        self._protocol = functools.partial(Connection, asyncio.get_running_loop(), most_body_bytes)

    async def connect(self, origin: Origin) -> Connection:
        """Raises OSError, or OwnFaultError when this machine cannot connect to anything."""
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                addresses = await self._resolver.resolve(origin.host, origin.port)
                while True:
                    try:
                        return await self._connect_to_one(addresses, origin)
                    except OSError:
                        aiohappyeyeballs.pop_addr_infos_interleave(addresses, 1)
                        if not addresses:
                            raise
        except SSLCertVerificationError as error:
            if self._trusts_nobody:
                raise no_authorities() from error
            raise
        except Exception as error:
            fault = own_fault(error)
            # A machine without IPv6 has no address for it, either.
            if fault is None or (fault.kind == "EADDRNOTAVAIL" and ":" in origin.host):
                raise
            raise fault from error

    async def _connect_to_one(self, addresses: list[AddrInfoType], origin: Origin) -> Connection:
        opened = await aiohappyeyeballs.start_connection(
            addresses, happy_eyeballs_delay=_NEXT_ADDRESS_S, socket_factory=self._guarded_socket
        )
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                self._protocol,
                sock=opened,
                ssl=self._tls if origin.tls else None,
                # Certificates name hosts without the dot that ends a full name.
                server_hostname=origin.host.rstrip(".") if origin.tls else None,
            )
        except BaseException:
            opened.close()
            raise
        return connection

    def _guarded_socket(self, address: AddrInfoType) -> socket.socket:
        family, kind, protocol, _, (host, *_) = address
        self._guard.check(str(host))
        return socket.socket(family, kind, protocol)

    def close(self) -> None:
        self._resolver.close()


def _literal(host: str, port: int) -> AddrInfoType | None:
    """What to connect to when the host is an address in its usual form already."""
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return None
    if version == 4:
        return socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port)
    return socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port, 0, 0)


def _addresses(host: str, port: int) -> list[AddrInfoType]:
    try:
        found = socket.getaddrinfo(host, port, socket.AF_UNSPEC, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    except socket.gaierror as error:
        if fault := own_fault(error):  # checked at once: descriptors come and go
            raise fault from error
        raise
    except UnicodeError as error:  # an empty or overlong label
        raise socket.gaierror(socket.EAI_NONAME, str(error)) from error
    if not found:
        raise socket.gaierror(socket.EAI_NONAME, "no address")
    return [*found]
