"""The SSRF guard: which addresses a delivery may connect to.

Clients choose destinations. Without a guard they could make the dispatcher send requests to whatever it can reach
(server-side request forgery): its own machine, the private network, a cloud's metadata service. The guard checks the
address that a socket is about to connect to, and neither the name nor the spelling in the URL: odd literals
(``0x7f.1``, ``2130706433``) and names that resolve differently on each look-up (DNS rebinding) are plain addresses by
then.

`GuardedConnector` (connector.py) asks it, once for the addresses of a name and once more for each socket.

The ranges are the IANA special-purpose registries for IPv4 and IPv6, transition prefixes that embed an IPv4
address, and the metadata services of the large clouds that sit on addresses of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Network = IPv4Network | IPv6Network

# The first range that holds an address names it, so the narrow ones come first.
_REFUSED: tuple[tuple[Network, str], ...] = tuple(
    (ip_network(network), kind)
    for network, kind in (
        ("169.254.169.254/32", "a cloud metadata address"),
        ("168.63.129.16/32", "a cloud metadata address"),
        ("100.100.100.200/32", "a cloud metadata address"),
        ("0.0.0.0/32", "the unspecified address"),
        ("255.255.255.255/32", "the broadcast address"),
        ("0.0.0.0/8", "reserved"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "carrier-grade NAT space"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "reserved"),
        ("192.0.2.0/24", "for documentation"),
        ("192.88.99.0/24", "a 6to4 relay address"),
        ("192.168.0.0/16", "private"),
        ("198.18.0.0/15", "for benchmarking"),
        ("198.51.100.0/24", "for documentation"),
        ("203.0.113.0/24", "for documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
        ("fd00:ec2::254/128", "a cloud metadata address"),
        ("fd20:ce::254/128", "a cloud metadata address"),
        ("::/128", "the unspecified address"),
        ("::1/128", "loopback"),
        ("::ffff:0:0/96", "an IPv4-mapped address"),
        ("::/96", "an IPv4-compatible address"),
        ("64:ff9b::/96", "a NAT64 address"),
        ("64:ff9b:1::/48", "a NAT64 address"),
        ("100::/64", "for discarding"),
        ("2001::/32", "a Teredo address"),
        ("2001:2::/48", "for benchmarking"),
        ("2001::/23", "reserved"),
        ("2001:db8::/32", "for documentation"),
        ("2002::/16", "a 6to4 address"),
        ("3fff::/20", "for documentation"),
        ("fc00::/7", "private (unique local)"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "site-local"),
        ("ff00::/8", "multicast"),
    )
)
_GLOBAL_UNICAST_6 = IPv6Network("2000::/3")  # the only part of IPv6 that is handed out


class AddressRefusedError(OSError):
    """The SSRF guard refuses the address of a destination; the text says which address and why."""


class SsrfGuard:
    """Refuses every address that is not public, unless `allowed` (``HTTP_ALLOW_NETWORKS``) includes it."""

    __slots__ = ("_allowed",)

    def __init__(self, allowed: Iterable[Network] = ()) -> None:
        self._allowed = tuple(allowed)

    def refusal(self, address: str) -> str | None:
        """Why the numeric `address` is refused, or None if it may be connected to.

        Text that is not an address in its plain form is refused too: the kernel might read it as another address.
        """
        try:
            ip = ip_address(address)
        except ValueError:
            return f"{address[:64]!r} is not an address in its usual form"
        if any(ip in network for network in self._allowed):
            return None
        kind = _kind(ip)
        return None if kind is None else f"{ip} is {kind}; HTTP_ALLOW_NETWORKS does not include it"

    def check(self, address: str) -> None:
        """Raises AddressRefusedError unless the numeric `address` may be connected to."""
        reason = self.refusal(address)
        if reason is not None:
            raise AddressRefusedError(reason)


def _kind(ip: IPv4Address | IPv6Address) -> str | None:
    for network, kind in _REFUSED:
        if ip in network:
            return kind
    return "reserved" if ip.version == 6 and ip not in _GLOBAL_UNICAST_6 else None
