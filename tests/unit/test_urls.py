"""Which destinations are let in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from orchestrator.events.urls import URL_PATTERN, url_fault


@pytest.mark.parametrize(
    "url",
    [
        "http://a",
        "https://example.com/hook?x=1&y=%20",
        "http://127.0.0.1:9000/",
        "http://[::1]:80/x",
        "http://[2001:db8::1:2]/",
        "http://[::ffff:10.0.0.1]/",
        "http://my_service.internal.:8080/a/b;c=d",
        "https://xn--bcher-kva.example/",
        "http://example.com?q",
        "http://a/" + "x" * 2039,
        "http://1a.2b/",
    ],
)
def test_urls_that_can_be_delivered_to_are_accepted(url: str) -> None:
    assert url_fault(url) is None


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "http://"),
        ("example.com", "http://"),
        ("ftp://example.com", "http://"),
        ("HTTP://example.com", "http://"),
        ("http:/example.com", "http://"),
        ("http://", "a host"),
        ("http:///path", "a host"),
        ("http://:80/", "a host"),
        ("http://user:secret@example.com/", "user name"),
        ("http://user@example.com/", "user name"),
        ("http://example.com/#part", "fragment"),
        ("http://example.com:0/", "port"),
        ("http://example.com:65536/", "port"),
        ("http://example.com:/", "port"),
        ("http://example.com:http/", "port"),
        ("http://1.2.3.400/", "host name"),
        ("http://127.1/", "host name"),
        ("http://2130706433/", "host name"),
        ("http://0x7f000001/", "host name"),
        ("http://-a.example/", "host name"),
        ("http://a..example/", "host name"),
        ("http://[::1/", "host name"),
        ("http://[::g]/", "host name"),
        ("http://[fe80::1%25eth0]/", "host name"),
        ("http://" + "a" * 64 + ".example/", "host name"),
        ("http://" + "a." * 130 + "example/", "253"),
        ("http://xn--zzzzzz999999.example/", "internationalised"),
        ("http://bücher.example/", "ASCII"),
        ("http://example.com/a b", "percent-encode"),
        ("http://example.com/a\n", "percent-encode"),
        ("http://example.com\n", "host name"),
        ("http://example.com/%zz", "percent-encode"),
        ("http://example.com/<x>", "percent-encode"),
        ("http://example.com\\@evil.example/", "user name"),
        ("http://a/" + "x" * 2040, "2048"),
    ],
)
def test_other_urls_are_refused_with_the_reason(url: str, reason: str) -> None:
    fault = url_fault(url)
    assert fault is not None
    assert reason in fault
    assert "secret" not in fault


@given(url=st.from_regex(URL_PATTERN))
def test_every_accepted_url_has_a_host_to_the_http_client_too(url: str) -> None:
    if url_fault(url) is None:
        parsed = URL(url)
        assert parsed.host
        assert parsed.user is None
        assert 1 <= (parsed.port or 0) <= 65535
