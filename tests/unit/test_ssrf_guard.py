"""The SSRF guard: which addresses deliveries may connect to."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.dispatch.http.ssrf_guard import AddressRefusedError, SsrfGuard


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("169.254.169.254", "a cloud metadata address"),
        ("168.63.129.16", "a cloud metadata address"),
        ("100.100.100.200", "a cloud metadata address"),
        ("fd00:ec2::254", "a cloud metadata address"),
        ("0.0.0.0", "the unspecified address"),
        ("0.1.2.3", "reserved"),
        ("::", "the unspecified address"),
        ("127.0.0.1", "loopback"),
        ("127.255.255.254", "loopback"),
        ("::1", "loopback"),
        ("10.0.0.1", "private"),
        ("172.16.0.1", "private"),
        ("172.31.255.255", "private"),
        ("192.168.1.1", "private"),
        ("fc00::1", "private (unique local)"),
        ("fdff:ffff::1", "private (unique local)"),
        ("169.254.0.1", "link-local"),
        ("fe80::1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("::1%lo", "loopback"),
        ("fec0::1", "site-local"),
        ("100.64.0.1", "carrier-grade NAT space"),
        ("100.127.255.255", "carrier-grade NAT space"),
        ("224.0.0.1", "multicast"),
        ("239.255.255.255", "multicast"),
        ("ff02::1", "multicast"),
        ("240.0.0.1", "reserved"),
        ("255.255.255.255", "the broadcast address"),
        ("192.0.0.192", "reserved"),
        ("192.88.99.1", "a 6to4 relay address"),
        ("192.0.2.1", "for documentation"),
        ("198.51.100.1", "for documentation"),
        ("203.0.113.1", "for documentation"),
        ("2001:db8::1", "for documentation"),
        ("3fff::1", "for documentation"),
        ("198.18.0.1", "for benchmarking"),
        ("198.19.255.255", "for benchmarking"),
        ("2001:2::1", "for benchmarking"),
        ("2001:20::1", "reserved"),
        ("64:ff9b::a9fe:a9fe", "a NAT64 address"),
        ("64:ff9b:1::808:808", "a NAT64 address"),
        ("2002:7f00:1::1", "a 6to4 address"),
        ("2001:0:7f00:1::", "a Teredo address"),
        ("::ffff:127.0.0.1", "an IPv4-mapped address"),
        ("::ffff:8.8.8.8", "an IPv4-mapped address"),
        ("::ffff:0:127.0.0.1", "reserved"),
        ("::127.0.0.1", "an IPv4-compatible address"),
        ("::8.8.8.8", "an IPv4-compatible address"),
        ("100::1", "for discarding"),
        ("5f00::1", "reserved"),
        ("4000::1", "reserved"),
        ("fe00::1", "reserved"),
    ],
)
def test_an_address_that_is_not_public_is_refused_and_named(address: str, kind: str) -> None:
    with pytest.raises(AddressRefusedError) as caught:
        SsrfGuard().check(address)
    assert f"is {kind}; HTTP_ALLOW_NETWORKS does not include it" in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "1.1.1.1",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "126.255.255.255",
        "128.0.0.0",
        "169.253.255.255",
        "169.255.0.0",
        "172.15.255.255",
        "172.32.0.0",
        "192.167.255.255",
        "192.169.0.0",
        "198.17.255.255",
        "198.20.0.0",
        "223.255.255.255",
        "2606:4700::1111",
        "2a00:1450::1",
    ],
)
def test_a_public_address_is_let_through(address: str) -> None:
    SsrfGuard().check(address)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "localhost",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "127.0.0.1.",
        "[::1]",
        "1.2.3.4/32",
        "127.0.0.1 ",
        "١٢٧.0.0.1",
        "::1%25lo\n",
        "8.8.8.8\0",
    ],
)
def test_an_address_spelled_in_any_other_way_is_refused(address: str) -> None:
    # A numeric form that a resolver would expand must not slip past as an unknown one.
    assert SsrfGuard().refusal(address) is not None


def test_the_allow_list_opens_exactly_the_networks_it_names() -> None:
    guard = SsrfGuard([ip_network("10.1.0.0/16"), ip_network("fd12::/16")])
    guard.check("10.1.255.255")
    guard.check("fd12::1")
    for outside in ("10.2.0.1", "fd13::1", "127.0.0.1", "::ffff:10.1.0.1"):
        assert guard.refusal(outside) is not None


@given(st.ip_addresses())
def test_every_address_let_through_is_a_global_unicast_address(address: IPv4Address | IPv6Address) -> None:
    if SsrfGuard().refusal(str(address)) is None:
        assert address.is_global
        assert not address.is_multicast
        assert address.version == 4 or address in ip_network("2000::/3")
