"""The configuration of nginx: it is valid, agrees with the settings, and repeats what may be repeated, no more."""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from orchestrator.settings import Settings
from tests.support.certificates import Authority
from tests.support.nginx import CONFIGURATION, Nginx, checked, configured, running
from tests.support.receiver import CLOSE, Answer, Receiver
from tests.support.tools import tool
from tests.support.waiting import eventually

EVENTS = "/api/v1/events"
MADE = Answer(201, b"{}", {"Content-Type": "application/json"})


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    (tmp_path / "tls").mkdir()
    return Authority(str(tool("openssl")), tmp_path / "tls")


@pytest.fixture
async def second() -> AsyncIterator[Receiver]:
    async with Receiver() as receiver:
        yield receiver


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "nginx").mkdir()
    return tmp_path / "nginx"


@pytest.fixture
async def nginx(receiver: Receiver, second: Receiver, authority: Authority, folder: Path) -> AsyncIterator[Nginx]:
    """Before two instances that a test scripts."""
    written = configured(folder, (receiver.port, second.port), authority.certificate("nginx"))
    with running(written):
        yield written


@pytest.fixture
async def client(nginx: Nginx, authority: Authority) -> AsyncIterator[httpx.AsyncClient]:
    context = ssl.create_default_context(cafile=authority.trusted)
    base_url = f"https://127.0.0.1:{nginx.tls}"
    async with httpx.AsyncClient(base_url=base_url, verify=context, trust_env=False, timeout=30) as client:
        yield client


def number(directive: str) -> int:
    (found,) = re.findall(rf"^\s*{directive} (\d+)s?;", CONFIGURATION.read_text(), re.MULTILINE)
    return int(found)


def test_nginx_finds_no_fault_in_it_also_with_instances_that_speak_tls(authority: Authority, folder: Path) -> None:
    certificate = authority.certificate("nginx")
    assert "syntax is ok" in checked(configured(folder, (1, 2), certificate))
    snippet = (CONFIGURATION.parent / "upstream-tls.conf").read_text()
    text = CONFIGURATION.read_text().replace("http://api", "https://api")
    text = text.replace("server_tokens off;", f"server_tokens off;\n{snippet}")
    assert "syntax is ok" in checked(configured(folder, (1, 2), certificate, text))


def test_its_bounds_are_those_of_the_settings() -> None:
    settings = Settings.from_env({})
    assert number("client_max_body_size") == settings.max_body_bytes
    assert f"at most {settings.max_body_bytes} bytes" in CONFIGURATION.read_text()
    upstream = re.search(r"upstream api \{(.*?)\n    \}", CONFIGURATION.read_text(), re.DOTALL)
    assert upstream is not None
    (idle_s,) = re.findall(r"keepalive_timeout (\d+)s;", upstream[1])
    assert int(idle_s) < settings.api_keep_alive_s


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", EVENTS),
        ("POST", f"{EVENTS}/batch"),
        ("POST", f"{EVENTS}/cancel"),
        ("POST", f"{EVENTS}/external/a%2Fb/reschedule"),
        ("GET", f"{EVENTS}/statistics"),
        ("DELETE", f"{EVENTS}/1"),
        ("PUT", "/api/v1/destinations/a"),
    ],
)
@pytest.mark.parametrize("fault", [CLOSE, Answer(503, b"{}")], ids=["closes", "503"])
async def test_what_is_done_once_however_often_is_repeated_on_another_instance(
    client: httpx.AsyncClient, receiver: Receiver, second: Receiver, method: str, path: str, fault: Answer
) -> None:
    for instance, answer in ((receiver, fault), (second, MADE)):
        instance.script(path, answer)
    for _ in range(3):
        assert (await client.request(method, path, content=b'{"a": 1}')).status_code == 201
    # The path arrives as it was sent, for an external id may hold a slash.
    assert {request.path for request in (*receiver.requests, *second.requests)} == {path}
    assert receiver.requests
    assert all(json.loads(request.body) == {"a": 1} for request in second.requests)


@pytest.mark.parametrize("path", ["/api/v1/dead-letters/redrive", "/api/v1/dead-letters/purge", "/api/v1/pause"])
async def test_what_may_be_done_twice_is_not_repeated_once_it_was_sent(
    client: httpx.AsyncClient, receiver: Receiver, second: Receiver, path: str
) -> None:
    for instance in (receiver, second):
        instance.script(path, CLOSE)
    answer = await client.post(path, content=b"{}")
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == 503
    assert len(receiver.requests) + len(second.requests) == 1


async def test_instances_that_all_failed_are_tried_again_at_once(
    client: httpx.AsyncClient, receiver: Receiver, second: Receiver
) -> None:
    for instance in (receiver, second):
        instance.script(EVENTS, CLOSE, CLOSE, MADE)
    assert [(await client.post(EVENTS, content=b"{}")).status_code for _ in range(3)][1:] == [201, 201]


async def test_ids_of_requests_reach_the_instance_the_client_and_the_log(
    client: httpx.AsyncClient, nginx: Nginx, receiver: Receiver, second: Receiver
) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    given = {"X-Correlation-ID": "checkout-4711", "traceparent": trace, "X-Forwarded-For": "6.6.6.6"}
    for instance in (receiver, second):
        instance.script(EVENTS, MADE)
    first = await client.post(EVENTS, content=b"{}", headers=given)
    other = await client.post(EVENTS, content=b"{}")
    arrived = {request.headers["x-correlation-id"]: request for request in (*receiver.requests, *second.requests)}
    named = arrived["checkout-4711"].headers
    assert (named["traceparent"], named["x-forwarded-for"], named["x-forwarded-proto"]) == (trace, "127.0.0.1", "https")
    assert first.headers["x-correlation-id"] == "checkout-4711"
    assert other.headers["x-correlation-id"] in arrived
    await eventually(lambda: len(nginx.requests()) == 2)
    told, _ = nginx.requests()
    assert (told["correlation_id"], told["traceparent"], told["status"]) == ("checkout-4711", trace, 201)
    assert told["path"] == EVENTS


async def test_what_is_too_large_or_not_for_clients_does_not_reach_an_instance(
    client: httpx.AsyncClient, receiver: Receiver, second: Receiver
) -> None:
    answer = await client.post(EVENTS, content=bytes(16_777_217))
    assert (answer.status_code, answer.json()["status"]) == (413, 413)
    for path in ("/metrics", "/health", "/ready", "/actuator/prometheus"):
        assert (await client.get(path)).status_code == 404
    assert not receiver.requests + second.requests
    assert (await client.get("/balancer/health")).status_code == 204
