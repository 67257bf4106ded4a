"""Deliveries over real sockets to receivers that behave, misbehave, or must not be reached at all."""

from __future__ import annotations

import asyncio
import base64
import hmac
import shutil
import socket
import struct
import time
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from ssl import (
    ALERT_DESCRIPTION_UNRECOGNIZED_NAME,
    CERT_REQUIRED,
    PROTOCOL_TLS_SERVER,
    SSLContext,
    SSLError,
    TLSVersion,
)
from typing import Any

import pytest

from orchestrator.dispatch.attempt import Attempted
from orchestrator.dispatch.http.sender import Delivery, HttpSender
from orchestrator.errors import OwnFaultError
from orchestrator.events.destination_name import destination_name
from orchestrator.events.headers import RESERVED_HEADERS
from orchestrator.events.urls import url_fault
from orchestrator.settings import Settings
from tests.support.certificates import Authority
from tests.support.scripted_receiver import Receiver, Request, raw, reply

KEY = b"0123456789abcdef0123456789abcdef"
SETTINGS = replace(
    Settings.from_env(
        {
            "HTTP_ALLOW_NETWORKS": "127.0.0.1",
            "WEBHOOK_SECRETS": "whsec_" + base64.b64encode(KEY).decode(),
        }
    ),
    http_timeout_s=10.0,
)
HASTY = replace(SETTINGS, http_timeout_s=0.3)
ID = "019ab2c3-0000-7000-8000-000000000001"


def delivery(destination: str, headers: dict[str, str] | None = None, *, attempt: int = 1) -> Delivery:
    return Delivery(ID, attempt, "2026-11-21T09:00:00.000001Z", destination, b'{"secret":"payload"}', headers)


async def send(settings: Settings, destination: str, headers: dict[str, str] | None = None) -> Attempted:
    async with HttpSender(settings) as sender:
        return await sender.send(delivery(destination, headers))


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as running:
        yield running


@pytest.fixture
async def sender() -> AsyncIterator[HttpSender]:
    async with HttpSender(SETTINGS) as running:
        yield running


# What is sent


async def test_a_delivery_is_one_signed_post_of_the_payload_as_it_is(receiver: Receiver) -> None:
    before = int(time.time())
    assert await send(SETTINGS, receiver.url + "/%7Euser?a=%2B+b&c=/") == Attempted("delivered", 204)
    [request] = receiver.requests
    assert request.line == "POST /hook/%7Euser?a=%2B+b&c=/ HTTP/1.1"
    assert request.body == b'{"secret":"payload"}'
    headers = dict(request.headers)
    signed = f"{ID}.{headers['webhook-timestamp']}.".encode() + request.body
    digest = base64.b64encode(hmac.digest(KEY, signed, "sha256")).decode()
    assert before <= int(headers.pop("webhook-timestamp")) <= time.time()
    assert headers == {
        "host": f"127.0.0.1:{receiver.port}",
        "content-length": str(len(request.body)),
        "content-type": "application/json",
        "user-agent": "scheduled-event-orchestrator/1",
        "webhook-id": ID,
        "webhook-signature": f"v1,{digest}",
        "orchestrator-attempt": "1",
        "orchestrator-scheduled-at": "2026-11-21T09:00:00.000001Z",
    }


@pytest.mark.parametrize("end", ["?", "/a?", "/a%20b?", "?a=b?", "??", "?a", "/?=", "/../a//b/.?", "/a;b?", ""])
async def test_the_end_of_a_url_is_sent_as_it_was_given(receiver: Receiver, end: str) -> None:
    assert url_fault(receiver.url + end) is None
    assert await send(SETTINGS, receiver.url + end) == Attempted("delivered", 204)
    [request] = receiver.requests
    assert request.line == f"POST /hook{end} HTTP/1.1"
    assert destination_name("HTTP", receiver.url + end) == f"127.0.0.1:{receiver.port}"


async def test_a_query_of_a_host_alone_is_sent_as_it_was_given(receiver: Receiver) -> None:
    root = receiver.url.removesuffix("/hook")
    for end in ("?", "?a=b", "/?"):
        assert (await send(SETTINGS, root + end)).status_code is not None
    assert [request.line.split()[1] for request in receiver.requests] == ["/?", "/?a=b", "/?"]


async def test_a_delivery_without_secrets_has_no_signature(receiver: Receiver) -> None:
    await send(replace(SETTINGS, webhook_secrets=()), receiver.url)
    assert "webhook-signature" not in receiver.requests[0].headers
    assert receiver.requests[0].headers["webhook-id"] == ID


async def test_an_events_own_headers_are_added_but_override_no_reserved_header(receiver: Receiver) -> None:
    ours = [name.title() for name in RESERVED_HEADERS]
    ours += ["Webhook-Id", "WEBHOOK-SIGNATURE", "Webhook-Other", "Orchestrator-Attempt", "Proxy-Authorization"]
    await send(SETTINGS, receiver.url, {"X-Tenant": "ocean", "authorization": "Bearer ü"})
    await send(SETTINGS, receiver.url, dict.fromkeys(ours, "forged") | {"X-Tenant": "ocean"})
    first, second = (request.headers for request in receiver.requests)
    assert first.pop("authorization") == "Bearer ü".encode().decode("latin-1")
    assert first["x-tenant"] == "ocean"
    assert first.keys() == second.keys()
    assert "forged" not in " ".join(second.values())


@pytest.mark.parametrize(
    ("headers", "error"),
    [
        ({"x y": "1"}, "headers: 'x y' is not a header name"),
        ({"": "1"}, "headers: '' is not a header name"),
        ({"x\r\ny": "1"}, r"headers: 'x\r\ny' is not a header name"),
        ({"x": "token\r\ny: 1"}, "headers: the value of 'x' cannot be sent"),
        ({"x": "\0"}, "headers: the value of 'x' cannot be sent"),
        ({"x": "\ud800"}, "headers: the value of 'x' cannot be sent"),
        ({"x": 1}, "headers: the value of 'x' cannot be sent"),
    ],
)
async def test_a_header_that_cannot_be_sent_is_final_and_its_value_not_repeated(
    receiver: Receiver, headers: dict[str, Any], error: str
) -> None:
    assert await send(SETTINGS, receiver.url, headers) == Attempted("fail", error=error)
    assert receiver.connections == 0


@pytest.mark.parametrize(
    "destination",
    [
        "",
        "hook",
        "ftp://127.0.0.1/",
        "tcp://127.0.0.1/",
        "ws://127.0.0.1/",
        "http://",
        "http:///hook",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:x/",
        "http://[::1/",
        "http://user:secret@127.0.0.1/",
        "http://127.0.0.1:0/",
    ],
)
async def test_a_destination_that_is_no_web_address_is_final(sender: HttpSender, destination: str) -> None:
    attempted = await sender.send(delivery(destination))
    assert attempted.verdict == "fail"
    assert attempted.error is not None
    assert attempted.error.startswith("destination: expected an http or https URL")


async def test_a_destination_cannot_smuggle_lines_into_the_request(receiver: Receiver) -> None:
    await send(SETTINGS, receiver.url + "/a b\r\nx-evil: 1\r\n\r\nGET / HTTP/1.1")
    assert all("x-evil" not in request.headers for request in receiver.requests)
    assert len(receiver.requests) <= 1


# What the status means


@pytest.mark.parametrize("status", [200, 201, 202, 204, 206, 299])
async def test_every_2xx_answer_delivers(receiver: Receiver, sender: HttpSender, status: int) -> None:
    receiver.answer = reply(status)
    assert await sender.send(delivery(receiver.url)) == Attempted("delivered", status)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 413, 422, 451, 499])
async def test_a_4xx_answer_is_final(receiver: Receiver, sender: HttpSender, status: int) -> None:
    receiver.answer = reply(status, "retry-after: 1", body=b"no")
    attempted = await sender.send(delivery(receiver.url))
    assert attempted.verdict == "fail"
    assert attempted.status_code == status
    assert (attempted.error or "").startswith(f"HTTP {status}")
    assert (attempted.response, attempted.retry_after_s) == ("no", None)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (408, "HTTP 408 Request Timeout"),
        (425, "HTTP 425 Too Early"),
        (429, "HTTP 429 Too Many Requests"),
        (500, "HTTP 500 Internal Server Error"),
        (502, "HTTP 502 Bad Gateway"),
        (503, "HTTP 503 Service Unavailable"),
        (599, "HTTP 599"),
    ],
)
async def test_retryable_statuses_are_tried_again_when_the_receiver_says(
    receiver: Receiver, sender: HttpSender, status: int, error: str
) -> None:
    receiver.answer = reply(status, "Retry-After: 17", body=b"busy")
    attempted = await sender.send(delivery(receiver.url))
    assert attempted == Attempted("retry", status, error, "busy", 17.0)


@pytest.mark.parametrize("status", [b"101", b"600", b"999", b"000", b"099"])
async def test_an_answer_with_any_other_status_is_final(receiver: Receiver, sender: HttpSender, status: bytes) -> None:
    receiver.answer = raw(b"HTTP/1.1 %b Whatever\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n" % status)
    attempted = await sender.send(delivery(receiver.url))
    assert (attempted.verdict, attempted.status_code, attempted.retry_after_s) == ("fail", int(status), None)
    assert (attempted.error or "").startswith("HTTP " + status.decode())


async def test_the_longest_of_repeated_retry_after_headers_counts(receiver: Receiver, sender: HttpSender) -> None:
    receiver.answer = reply(503, "Retry-After: 5", "Retry-After: soon", "Retry-After: 20")
    assert (await sender.send(delivery(receiver.url))).retry_after_s == 20.0


async def test_retry_after_may_be_a_date(receiver: Receiver, sender: HttpSender) -> None:
    receiver.answer = reply(503, f"Retry-After: {formatdate(time.time() + 60, usegmt=True)}")
    attempted = await sender.send(delivery(receiver.url))
    assert attempted.retry_after_s is not None
    assert 55 < attempted.retry_after_s <= 60


@pytest.mark.parametrize("wish", ["-1", "soon", ""])
async def test_a_senseless_retry_after_leaves_the_retry_policy_alone(
    receiver: Receiver, sender: HttpSender, wish: str
) -> None:
    receiver.answer = reply(429, f"Retry-After: {wish}")
    assert await sender.send(delivery(receiver.url)) == Attempted("retry", 429, "HTTP 429 Too Many Requests")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed_and_named(receiver: Receiver, sender: HttpSender, status: int) -> None:
    receiver.answer = reply(status, f"location: {receiver.url}/{'x' * 500}")
    attempted = await sender.send(delivery(receiver.url))
    assert (attempted.verdict, attempted.status_code) == ("fail", status)
    assert f"redirect to '{receiver.url}/xxx" in str(attempted.error)
    assert "...' is not followed" in str(attempted.error)
    assert len(str(attempted.error)) < 300
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("rest", [b"\r\n", b"Location:\r\n\r\n", b"Location: \r\nbad header\r\n\r\n"])
@pytest.mark.parametrize("status", ["300 Multiple Choices", "304 Not Modified"])
async def test_a_redirect_status_without_a_location_is_no_redirect(
    receiver: Receiver, sender: HttpSender, status: str, rest: bytes
) -> None:
    receiver.answer = raw(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n".encode() + rest)
    attempted = await sender.send(delivery(receiver.url))
    assert attempted[:2] == ("fail", int(status[:3]))
    assert str(attempted.error).partition(";")[0] == f"HTTP {status}"


@pytest.mark.parametrize("end", [b"\r\n", b"bad header\r\n\r\n"])
@pytest.mark.parametrize(
    ("location", "named"),
    [
        ("http://user:CANARY@evil/x?token=CANARY", "http://…@evil/x?…"),
        ("//user:CANARY@evil/x?q=a@b", "//…@evil/x?…"),
        ("http:\\\\CANARY@evil", "http:\\\\…@evil"),
        ("CANARY:CANARY@evil/x", "…@evil/x"),
        ("/cb#access_token=CANARY", "/cb#…"),
        ("/cb#CANARY?x", "/cb#…"),
        ("/login/Bearer/CANARY/QCANARY", "/login/Bearer/***/***"),
        ("/login/Bearer%20CANARY", "/login/***"),
        ("/login/" + "x" * 190 + "CANARY", "/login/" + "x" * 190 + "***"),
        ("/login/Zu'CANARY", "/login/***"),
        ("/login/größe-CANARY", "/login/***"),
        ("/login/gr%C3%B6%C3%9Fe-CANARY", "/login/***"),
        ("/login?user=a@b", "/login?…"),
    ],
)
async def test_a_redirect_is_named_without_credentials(
    receiver: Receiver, sender: HttpSender, location: str, named: str, end: bytes
) -> None:
    receiver.answer = raw(b"HTTP/1.1 302 Found\r\nLocation: %b\r\n" % location.encode() + end)
    secrets = {"authorization": "Bearer CANARY", "x-key": "Zu'CANARY", "x-token": "größe-CANARY"}
    attempted = await sender.send(delivery(receiver.url + "?token=QCANARY", secrets))
    assert attempted[:2] == ("fail", 302)
    assert f"redirect to {named!a} is not followed" in str(attempted.error)
    assert "CANARY" not in str(attempted)


async def test_a_redirect_that_is_cut_short_does_not_show_the_start_of_a_credential(receiver: Receiver) -> None:
    receiver.answer = raw(b"HTTP/1.1 302 Found\r\nLocation: /login/CANA", close=True)
    attempted = await send(SETTINGS, receiver.url, {"authorization": "Bearer CANARY"})
    assert attempted[:2] == ("fail", 302)
    assert "CANA" not in str(attempted)


async def test_a_very_long_redirect_is_named_at_once(receiver: Receiver) -> None:
    receiver.answer = raw(b"HTTP/1.1 302 Found\r\nLocation: " + b":" * 200_000 + b"\r\n\r\n")
    attempted, took_s = await _timed(SETTINGS, receiver.url)
    assert attempted[:2] == ("fail", 302)
    assert took_s < 3.0


@pytest.mark.parametrize("status", [200, 404, 503])
@pytest.mark.parametrize(
    "rest",
    [
        b"bad CANARY\r\n\r\n",
        b"CANARY: " + b"CANARY" * 9000 + b"\r\n\r\n",
        b"x" * 95 + b"CANARY" * 9000 + b": 1\r\n\r\n",
        b"content-length: CANARY\r\n\r\n",
        b"transfer-encoding: chunked\r\n\r\nCANARY\r\n",
    ],
)
async def test_a_remark_about_an_odd_answer_repeats_no_credentials(
    receiver: Receiver, sender: HttpSender, status: int, rest: bytes
) -> None:
    receiver.answer = raw(b"HTTP/1.1 %d CANARY\r\n" % status + rest)
    attempted = await sender.send(delivery(receiver.url, {"authorization": "Bearer CANARY"}))
    assert attempted.status_code == status
    assert "; its " in str(attempted.error)
    assert "CANA" not in str(attempted)


async def test_interim_responses_are_passed_over(receiver: Receiver, sender: HttpSender) -> None:
    receiver.answer = raw(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n")
    assert await sender.send(delivery(receiver.url)) == Attempted("delivered", 204)


async def test_a_failures_body_is_quoted_within_bounds_and_as_valid_text(
    receiver: Receiver, sender: HttpSender
) -> None:
    receiver.answer = reply(500, body=b"\xff\x00" + "é€😀".encode() * 2000)
    attempted = await sender.send(delivery(receiver.url))
    assert attempted.response is not None
    assert attempted.response.startswith("\ufffd\ufffdé€😀é")
    assert len(attempted.response) == 1024
    assert "\0" not in attempted.response


async def test_a_compressed_body_is_neither_unpacked_nor_quoted(receiver: Receiver, sender: HttpSender) -> None:
    receiver.answer = reply(500, "content-encoding: gzip", body=b"\x1f\x8b not really")
    attempted = await sender.send(delivery(receiver.url))
    assert attempted == Attempted("retry", 500, "HTTP 500 Internal Server Error")


# Connections


async def test_connections_are_kept_and_used_again(receiver: Receiver, sender: HttpSender) -> None:
    for status in (204, 200, 500, 404):
        receiver.answer = reply(status, body=b"" if status == 204 else b"some text")
        await sender.send(delivery(receiver.url))
    assert [request.connection for request in receiver.requests] == [1, 1, 1, 1]


async def test_a_connection_the_receiver_wants_closed_is_not_used_again(receiver: Receiver, sender: HttpSender) -> None:
    receiver.answer = reply(204, "connection: close")
    for _ in range(2):
        assert (await sender.send(delivery(receiver.url))).verdict == "delivered"
    assert receiver.connections == 2


async def test_no_more_connections_than_allowed_are_open_at_once(receiver: Receiver) -> None:
    gate = asyncio.Event()

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    receiver.answer = answer
    async with HttpSender(replace(SETTINGS, http_max_connections=3)) as sender, asyncio.TaskGroup() as group:
        tasks = [group.create_task(sender.send(delivery(receiver.url))) for _ in range(10)]
        await receiver.until(lambda r: len(r.requests) == 3)
        gate.set()
        await asyncio.gather(*tasks)
    assert receiver.connections == 3
    assert {task.result().verdict for task in tasks} == {"delivered"}


async def test_idle_connections_to_many_hosts_are_bounded_too() -> None:
    settings = replace(
        Settings.from_env({"HTTP_ALLOW_NETWORKS": "127.0.0.0/8"}), http_max_connections=2, http_timeout_s=10.0
    )
    async with Receiver(host="0.0.0.0") as receiver, HttpSender(settings) as sender:
        for host in range(1, 9):
            await sender.send(delivery(f"http://127.0.0.{host}:{receiver.port}/"))
        await receiver.until(lambda r: r.open_connections <= 2)
    assert receiver.connections == 8


async def test_a_connection_that_went_stale_costs_no_attempt(receiver: Receiver, sender: HttpSender) -> None:
    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await writer.drain()
        writer.close()  # without a word, as after an idle timeout at the far end

    receiver.answer = answer
    for connection in (1, 2, 3):
        assert await sender.send(delivery(receiver.url)) == Attempted("delivered", 204)
        await receiver.until(lambda r: r.open_connections == 0)
        assert receiver.connections == connection
    assert len(receiver.requests) == 3


async def test_a_request_that_was_read_is_not_sent_again_in_the_same_attempt(
    receiver: Receiver, sender: HttpSender
) -> None:
    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        if len(receiver.requests) > 1:
            # Resets the kept connection after the request was read.
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        else:
            writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    receiver.answer = answer
    assert await sender.send(delivery(receiver.url)) == Attempted("delivered", 204)
    attempted = await sender.send(delivery(receiver.url))
    place = f"127.0.0.1:{receiver.port}"
    assert attempted == Attempted("retry", error=f"connection closed by {place} before it answered")
    assert [request.connection for request in receiver.requests] == [1, 1]


@pytest.mark.parametrize(
    "unasked",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 2",
        b"\r\n",
        b"garbage",
    ],
)
async def test_a_connection_that_spoke_unasked_is_not_used_again(
    receiver: Receiver, sender: HttpSender, unasked: bytes
) -> None:
    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)  # a segment of its own
        writer.write(unasked)

    receiver.answer = answer
    assert (await sender.send(delivery(receiver.url))).status_code == 204
    await asyncio.sleep(0.1)
    receiver.answer = reply(503)
    assert (await sender.send(delivery(receiver.url))).status_code == 503
    assert [request.connection for request in receiver.requests] == [1, 2]


async def test_a_receiver_that_hangs_up_on_a_new_connection_is_not_asked_twice(
    receiver: Receiver, sender: HttpSender
) -> None:
    receiver.answer = raw(b"", close=True)
    attempted = await sender.send(delivery(receiver.url))
    place = f"127.0.0.1:{receiver.port}"
    assert attempted == Attempted("retry", error=f"connection closed by {place} before it answered")
    assert len(receiver.requests) == 1


async def test_cookies_are_not_kept(receiver: Receiver, sender: HttpSender) -> None:
    receiver.answer = reply(204, "set-cookie: session=1")
    for _ in range(2):
        await sender.send(delivery(receiver.url))
    assert "cookie" not in receiver.requests[1].headers


async def test_proxies_from_the_environment_are_ignored(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert (await send(SETTINGS, receiver.url)).verdict == "delivered"


async def test_a_cancelled_delivery_ends_at_once_and_gives_its_place_back(receiver: Receiver) -> None:
    async def silence(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    receiver.answer = silence
    async with HttpSender(replace(SETTINGS, http_max_connections=1)) as sender:
        task = asyncio.create_task(sender.send(delivery(receiver.url)))
        await receiver.until(lambda r: len(r.requests) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        receiver.answer = reply(204)
        assert (await sender.send(delivery(receiver.url))).verdict == "delivered"


# Receivers that do not answer as they should


async def test_a_refused_connection_is_named_and_retried(sender: HttpSender) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        attempted = await sender.send(delivery(f"http://127.0.0.1:{port}/"))
    assert attempted == Attempted("retry", error=f"connection refused by 127.0.0.1:{port}")


async def test_a_host_that_does_not_resolve_is_retried(sender: HttpSender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _unknown_host)
    attempted = await sender.send(delivery("http://shop.invalid/hook"))
    assert attempted == Attempted("retry", error="host does not resolve: shop.invalid")


@pytest.mark.parametrize("host", ["a..b.invalid", "x" * 64 + ".invalid"])
async def test_a_host_that_cannot_even_be_asked_for_does_not_resolve(sender: HttpSender, host: str) -> None:
    attempted = await sender.send(delivery(f"http://{host}/"))
    assert attempted == Attempted("retry", error=f"host does not resolve: {host}")


async def test_a_connection_that_is_not_accepted_in_time_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    # A listener whose queue is full drops further handshakes, so that connecting hangs.
    settings = replace(SETTINGS, http_connect_timeout_s=0.2)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        attempted = await send(settings, f"http://127.0.0.1:{port}/")
        for filler in fillers:
            filler.close()
    assert attempted == Attempted("retry", error=f"timeout: no connection to 127.0.0.1:{port} within 0.2 s")


async def test_a_receiver_that_hangs_is_left_when_the_time_is_up(receiver: Receiver) -> None:
    receiver.answer = raw(b"")
    attempted, took_s = await _timed(HASTY, receiver.url)
    assert attempted == Attempted("retry", error="timeout: no complete response within 0.3 s")
    assert took_s < 1.0
    await receiver.until(lambda r: r.open_connections == 0)


async def test_a_receiver_that_does_not_read_is_left_when_the_time_is_up() -> None:
    async with HttpSender(HASTY) as sender:
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))
            deaf.listen()
            url = f"http://127.0.0.1:{deaf.getsockname()[1]}/"
            large = Delivery(ID, 1, "2026-11-21T09:00:00Z", url, b"x" * 2**20 * 16)
            attempted = await sender.send(large)
    assert attempted == Attempted("retry", error="timeout: no complete response within 0.3 s")


async def test_a_receiver_that_drips_its_header_is_left_when_the_time_is_up(receiver: Receiver) -> None:
    receiver.answer = _drip(b"HTTP/1.1 200 O")
    attempted, took_s = await _timed(HASTY, receiver.url)
    assert attempted == Attempted("retry", error="timeout: no complete response within 0.3 s")
    assert took_s < 1.0
    receiver.answer = _drip(b"HTTP/1.1 200 OK\r\nx: ")
    attempted, took_s = await _timed(HASTY, receiver.url)
    assert attempted == Attempted("delivered", 200, "HTTP 200 OK; its answer was not complete within 0.3 s")
    assert took_s < 1.0


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (b"200 OK", Attempted("delivered", 200)),
        (b"503 Busy", Attempted("retry", 503, "HTTP 503 Service Unavailable", "....")),
    ],
)
async def test_a_body_that_drips_is_not_waited_for_once_the_status_has_decided(
    receiver: Receiver, status: bytes, expected: Attempted
) -> None:
    receiver.answer = _drip(b"HTTP/1.1 " + status + b"\r\ncontent-length: 60000\r\n\r\n....")
    attempted, took_s = await _timed(SETTINGS, receiver.url)
    assert attempted._replace(response=attempted.response and attempted.response[:4]) == expected
    assert took_s < 3.0
    await receiver.until(lambda r: r.open_connections == 0)


async def test_an_endless_body_is_cut_off_and_a_2xx_still_delivers(receiver: Receiver) -> None:
    sent = 0

    async def endless(request: Request, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536

    receiver.answer = endless
    attempted, took_s = await _timed(SETTINGS, receiver.url)
    assert attempted == Attempted("delivered", 200)
    assert took_s < 3.0
    await receiver.until(lambda r: r.open_connections == 0)
    assert sent < 64 * 2**20


@pytest.mark.parametrize(
    "rest", [b"content-length: 100\r\n\r\nhalf", b"transfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n"]
)
async def test_the_status_decides_when_the_connection_breaks_inside_the_body(
    receiver: Receiver, sender: HttpSender, rest: bytes
) -> None:
    receiver.answer = raw(b"HTTP/1.1 200 OK\r\n" + rest, close=True)
    note = "; its body was broken or cut short"
    assert await sender.send(delivery(receiver.url)) == Attempted("delivered", 200, "HTTP 200 OK" + note)
    receiver.answer = raw(b"HTTP/1.1 500 Oops\r\n" + rest, close=True)
    attempted = await sender.send(delivery(receiver.url))
    assert attempted == Attempted("retry", 500, "HTTP 500 Internal Server Error" + note, "half")


ODD = {
    "a 204 with a body": b"204 No Content\r\ncontent-length: 5\r\n\r\nhello",
    "a content-length that is no number": b"200 OK\r\ncontent-length: x\r\n\r\n",
    "a negative content-length": b"200 OK\r\ncontent-length: -1\r\n\r\n",
    "two content-lengths": b"200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
    "content-length beside chunks": b"200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "a bad chunk": b"200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nhalf\r\n",
    "a body cut short": b"200 OK\r\ncontent-length: 100\r\n\r\nhalf",
    "a long header": b"200 OK\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",
    "many headers": b"200 OK\r\n" + b"x: y\r\n" * 5000 + b"\r\n",
    "a header without a name": b"200 OK\r\n: x\r\n\r\n",
    "a header without a colon": b"200 OK\r\nnonsense\r\n\r\n",
    "a folded header": b"200 OK\r\nx: a\r\n b\r\ncontent-length: 0\r\n\r\n",
    "a NUL in a header": b"200 OK\r\nx: \0\r\n\r\n",
    "a header in UTF-8": "200 OK\r\nx-größe: groß\r\ncontent-length: 0\r\n\r\n".encode(),
    "line feeds alone": b"200 OK\ncontent-length: 0\n\n",
    "no reason": b"200\r\ncontent-length: 0\r\n\r\n",
    "a reason in Latin-1": b"200 tr\xe8s bien\r\ncontent-length: 0\r\n\r\n",
    "nothing after the status line": b"200 OK\r\n",
    "garbage after the body": b"200 OK\r\ncontent-length: 2\r\n\r\nok and more",
    "a second answer": b"200 OK\r\ncontent-length: 0\r\n\r\nHTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n",
    "interim answers before": b"100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nx: y\r\n\r\nHTTP/1.1 200 OK\r\nbad\r\n\r\n",
    "a lie about its encoding": b"200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\nno",
}
WAITED_FOR = {"a body cut short", "nothing after the status line"}  # unless the connection ends


@pytest.mark.parametrize("version", [b"HTTP/1.1 ", b"HTTP/1.0 ", b"http/1.1 ", b"HTTP/2 "])
@pytest.mark.parametrize("close", [True, False])
async def test_a_complete_status_line_decides_whatever_follows(
    receiver: Receiver, sender: HttpSender, version: bytes, close: bool
) -> None:
    wrong = {}
    for name, answer in ODD.items():
        if not close and name in WAITED_FOR:
            continue
        receiver.answer = raw(version + answer, close=close)
        attempted = await sender.send(delivery(receiver.url))
        if attempted[:2] != ("delivered", 204 if "204" in name else 200):
            wrong[name] = attempted
        receiver.answer = raw(version + answer.replace(b"200", b"503").replace(b"204", b"503"), close=close)
        attempted = await sender.send(delivery(receiver.url))
        if attempted[:2] != ("retry", 503):
            wrong[f"503, {name}"] = attempted
    assert wrong == {}
    assert len({request.body for request in receiver.requests}) == 1


async def test_an_odd_answer_is_noted_with_its_oddity(receiver: Receiver, sender: HttpSender) -> None:
    receiver.answer = raw(b"HTTP/1.1 204 No Content\r\nbad header\r\n\r\n")
    attempted = await sender.send(delivery(receiver.url))
    assert attempted[:2] == ("delivered", 204)
    assert str(attempted.error).startswith("HTTP 204 No Content; its answer broke the rules of HTTP: ")
    receiver.answer = raw(b"HTTP/1.1 503 Busy\r\nRetry-After: 30\r\nbad header\r\n\r\n")
    attempted = await sender.send(delivery(receiver.url))
    assert (attempted.status_code, attempted.retry_after_s) == (503, 30.0)
    receiver.answer = raw(b"HTTP/1.1 302 Found\r\nLocation: /x\r\nbad header\r\n\r\n")
    attempted = await sender.send(delivery(receiver.url))
    assert attempted[:2] == ("fail", 302)
    assert "redirect to '/x' is not followed" in str(attempted.error)


HINTS = b"HTTP/1.1 103 Early Hints\r\n" + b"".join(b"Link: <%b>\r\n" % (b"x" * 6000) for _ in range(3)) + b"\r\n"


@pytest.mark.parametrize(
    "interim",
    [
        HINTS,
        HINTS * 20,
        b"HTTP/1.1 102 Processing\r\n\r\n" * 700,
        b"HTTP/1.1 100\n\n" * 2000,
        b"HTTP/1.1 103 A\r\nlink: " + b"x" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 103 A\r\n" + b"x: y\r\n" * 5000 + b"\r\n",
        b"HTTP/1.0 199 A\r\nnonsense\r\nConnection: close\r\n\r\n\r\n",
    ],
)
async def test_interim_answers_are_passed_over_however_long(
    receiver: Receiver, sender: HttpSender, interim: bytes
) -> None:
    for status in (204, 503, 101):

        async def answer(request: Request, writer: asyncio.StreamWriter, status: int = status) -> None:
            writer.write(interim)
            await writer.drain()
            await asyncio.sleep(0.02)  # a segment of its own
            writer.write(b"HTTP/1.1 %d A\r\ncontent-length: 0\r\n\r\n" % status)

        receiver.answer = answer
        attempted = await sender.send(delivery(receiver.url))
        assert attempted.status_code == status
        assert attempted.error is None or attempted.error.startswith(f"HTTP {status} ")
    assert receiver.connections == 1  # a connection is kept after interim answers


async def test_an_answer_may_arrive_in_pieces_of_any_size(receiver: Receiver, sender: HttpSender) -> None:
    answers = b"HTTP/1.1 100 A\r\n\r\nHTTP/1.1 103 A\r\nx: y\r\n\r\nHTTP/1.1 503 A\r\ncontent-length: 2\r\n\r\nno"

    for size in (1, 2, 3, 5):

        async def piecemeal(request: Request, writer: asyncio.StreamWriter, size: int = size) -> None:
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at in range(0, len(answers), size):
                writer.write(answers[at : at + size])
                await asyncio.sleep(0.001)

        receiver.answer = piecemeal
        attempted = await sender.send(delivery(receiver.url))
        assert attempted == Attempted("retry", 503, "HTTP 503 Service Unavailable", "no")


@pytest.mark.parametrize(
    "piece", [b"HTTP/1.1 100 Continue\r\n\r\n" * 100, b"HTTP/1.1 103 Hints\r\n" + b"x: y\r\n" * 999]
)
async def test_interim_answers_without_an_end_are_cut_off(receiver: Receiver, piece: bytes) -> None:
    async def flood(request: Request, writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            writer.write(piece)
            await writer.drain()

    receiver.answer = flood
    attempted, took_s = await _timed(SETTINGS, receiver.url)
    place = f"127.0.0.1:{receiver.port}"
    error = f"{place} sent more than 1048576 bytes of interim answers, and no final one"
    assert attempted == Attempted("retry", error=error)
    assert took_s < 3.0
    await receiver.until(lambda r: r.open_connections == 0)


async def test_slow_interim_answers_without_an_end_are_left_when_the_time_is_up(receiver: Receiver) -> None:
    async def slow(request: Request, writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
            await writer.drain()
            await asyncio.sleep(0.01)

    receiver.answer = slow
    attempted, took_s = await _timed(HASTY, receiver.url)
    assert attempted == Attempted("retry", error="timeout: no complete response within 0.3 s")
    assert took_s < 1.0
    await receiver.until(lambda r: r.open_connections == 0)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 99 Low\r\n\r\n",
        b"HTTP/1.1 1000 High\r\n\r\n",
        b"HTTP/1.1 2000\r\n\r\n",
        b"HTTP/1.1 -200 OK\r\n\r\n",
        b"HTTP 200 OK\r\n\r\n",
        b"200 OK\r\n\r\n",
        b"<html>200 OK</html>\r\n",
    ],
)
async def test_an_answer_that_is_not_http_is_retried(receiver: Receiver, sender: HttpSender, answer: bytes) -> None:
    receiver.answer = raw(answer, close=True)
    attempted = await sender.send(delivery(receiver.url))
    place = f"127.0.0.1:{receiver.port}"
    assert attempted == Attempted("retry", error=f"{place} answered with something that is not HTTP")


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl program to make certificates")
    return Authority(openssl, tmp_path_factory.mktemp("tls"))


def speaks(certificate: Path) -> SSLContext:
    tls = SSLContext(PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    return tls


async def answer_over(tls: SSLContext, host: str = "127.0.0.1") -> tuple[Attempted, str, int]:
    """What comes of a delivery to a receiver that speaks it, what the receiver is called, and its requests."""
    async with Receiver(tls=tls) as receiver:
        attempted = await send(SETTINGS, f"https://{host}:{receiver.port}/hook")
        return attempted, f"{host}:{receiver.port}", len(receiver.requests)


async def test_tls_is_spoken_to_a_trusted_receiver(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.trusted))
    attempted, _, requests = await answer_over(speaks(authority.certificate("good")))
    assert attempted == Attempted("delivered", 204)
    assert requests == 1


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ({"from_days": -3, "days": -1}, "it has expired"),
        ({"from_days": 1, "days": 3}, "it is not valid yet"),
        ({"subject_alt_name": "DNS:other.example"}, "it is for another address"),
        ({"subject_alt_name": "IP:127.0.0.2"}, "it is for another address"),
    ],
)
async def test_a_certificate_that_is_not_trusted_is_said_to_be_so_and_why(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, made: dict[str, Any], why: str
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.trusted))
    attempted, place, requests = await answer_over(speaks(authority.certificate("bad", **made)))
    assert attempted == Attempted("retry", error=f"the certificate of {place} is not trusted: {why}")
    assert requests == 0


async def test_an_unknown_issuer_is_named_as_the_cause(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    attempted, place, _ = await answer_over(speaks(authority.certificate("unknown")))
    assert str(attempted.error).startswith(f"the certificate of {place} is not trusted: its issuer is unknown")
    attempted, place, _ = await answer_over(speaks(authority.self_signed("alone")))
    assert attempted.error == f"the certificate of {place} is not trusted: it is self-signed"
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.trusted))
    wrong_host = speaks(authority.certificate("host", subject_alt_name="DNS:other.example"))
    attempted, place, _ = await answer_over(wrong_host, host="localhost")
    assert attempted.error == f"the certificate of {place} is not trusted: it is for another host name"


async def test_without_trusted_authorities_the_fault_is_this_machines(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_DIR", "/nowhere")
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/authorities.pem")
    with pytest.raises(OwnFaultError, match="no certificates of authorities"):
        await answer_over(speaks(authority.certificate("good")))


def refuse_one(listener: socket.socket, tls: SSLContext) -> None:
    """Answers one connection as OpenSSL does, which asyncio does not: with an alert that says why."""
    connection, _ = listener.accept()
    with tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False) as secure:
        with suppress(SSLError):
            secure.do_handshake()
            secure.recv(1)
        with suppress(OSError):
            secure.shutdown(socket.SHUT_WR)
            while secure.recv(4096):  # a reset, for what was not read, would overtake the alert
                pass


@pytest.mark.parametrize("version", [TLSVersion.TLSv1_2, TLSVersion.TLSv1_3])
@pytest.mark.parametrize("reason", ["client certificate", "no such host name", "version of TLS"])
async def test_the_reason_why_a_receiver_refuses_tls_is_named(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, version: TLSVersion, reason: str
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.trusted))
    tls = speaks(authority.certificate("picky", subject_alt_name="DNS:localhost"))
    tls.maximum_version = version
    if reason == "client certificate":
        tls.verify_mode = CERT_REQUIRED
        tls.load_verify_locations(authority.trusted)
    elif reason == "no such host name":
        tls.sni_callback = lambda *_: ALERT_DESCRIPTION_UNRECOGNIZED_NAME
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            tls.minimum_version, tls.maximum_version = TLSVersion.TLSv1, TLSVersion.TLSv1_1
        tls.set_ciphers("ALL:@SECLEVEL=0")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        refused = asyncio.get_running_loop().run_in_executor(None, refuse_one, listener, tls)
        attempted = await send(SETTINGS, f"https://localhost:{port}/")
        await refused
    assert attempted.verdict == "retry"
    assert str(attempted.error).startswith(f"no TLS connection with localhost:{port}: the receiver ")
    assert reason in str(attempted.error)


@pytest.mark.parametrize(
    ("hello", "why"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "the receiver does not speak TLS on this port"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "the receiver does not speak TLS on this port"),
        # An alert: protocol_version, handshake_failure, internal_error.
        (b"\x15\3\1\0\2\2\x46", "the receiver speaks no version of TLS that is used here (1.2 and 1.3)"),
        (b"\x15\3\3\0\2\2\x28", "the receiver accepts nothing that was offered; it may want a client certificate"),
        (b"\x15\3\3\0\2\2\x50", "tlsv1 alert internal error"),
    ],
)
async def test_a_receiver_that_answers_a_tls_hello_with_something_else_is_retried_and_says_why(
    hello: bytes, why: str
) -> None:
    left = asyncio.Event()

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(5)
        writer.write(hello)
        await reader.read()
        writer.close()
        left.set()

    async with await asyncio.start_server(plain, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        attempted = await send(SETTINGS, f"https://127.0.0.1:{port}/")
        await asyncio.wait_for(left.wait(), 10)
    assert attempted == Attempted("retry", error=f"no TLS connection with 127.0.0.1:{port}: {why}")


# Where deliveries may not go


async def test_a_private_address_is_refused_for_good_and_never_connected_to(receiver: Receiver) -> None:
    attempted = await send(replace(SETTINGS, http_allow_networks=()), receiver.url)
    assert attempted == Attempted(
        "fail", error="address refused: 127.0.0.1 is loopback; HTTP_ALLOW_NETWORKS does not include it"
    )
    assert receiver.connections == 0


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST",
        "localhost.",
        "127.0.0.1.",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "017700000001",
        "0177.0.0.1",
        "0",
        "0.0.0.0",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::127.0.0.1]",
        "[0:0:0:0:0:ffff:7f00:1]",
        "[64:ff9b::7f00:1]",
        "[::1%25lo]",
        "[::1%lo]",
        "127.0.0.1%2e",
        "①②⑦.0.0.1",
    ],
)
async def test_no_spelling_of_the_loopback_address_gets_by(host: str) -> None:
    async with Receiver(host="127.0.0.1") as receiver:
        attempted = await send(replace(SETTINGS, http_allow_networks=()), f"http://{host}:{receiver.port}/")
        assert receiver.connections == 0
    assert attempted.verdict == "fail" or str(attempted.error).startswith("host does not resolve")


async def test_only_the_allowed_of_mixed_addresses_are_connected_to(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Receiver(host="127.0.0.2", port=receiver.port) as forbidden:
        monkeypatch.setattr(socket, "getaddrinfo", _resolving_to("127.0.0.2", "127.0.0.1", "127.0.0.2"))
        attempted = await send(SETTINGS, f"http://mixed.test:{receiver.port}/")
        assert attempted == Attempted("delivered", 204)
        assert receiver.requests[0].headers["host"] == f"mixed.test:{receiver.port}"
        receiver.answer = raw(b"", close=True)
        assert (await send(SETTINGS, f"http://mixed.test:{receiver.port}/")).verdict == "retry"
        assert forbidden.connections == 0


async def test_a_host_with_refused_addresses_only_is_final(sender: HttpSender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _resolving_to("10.0.0.1", "192.168.0.1"))
    attempted = await sender.send(delivery("http://inside.test/"))
    assert attempted.verdict == "fail"
    assert (attempted.error or "").startswith("address refused: ")


async def test_a_host_that_changes_between_look_ups_is_connected_to_at_the_checked_address(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["127.0.0.1", *["127.0.0.2"] * 9])
    looked_up: list[str] = []

    def rebinding(host: str, *rest: Any, **options: Any) -> Any:
        looked_up.append(next(answers))
        return _resolving_to(looked_up[-1])(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    async with Receiver(host="127.0.0.2", port=receiver.port) as forbidden:
        url = f"http://rebinding.test:{receiver.port}/"
        assert await send(SETTINGS, url) == Attempted("delivered", 204)
        assert looked_up == ["127.0.0.1"]
        attempted = await send(SETTINGS, url)
        assert attempted.verdict == "fail"
        assert "127.0.0.2 is loopback" in str(attempted.error)
        assert forbidden.connections == 0


async def test_a_host_with_a_dead_first_address_is_reached_at_the_next(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _resolving_to("127.0.0.3", "127.0.0.1"))
    settings = replace(Settings.from_env({"HTTP_ALLOW_NETWORKS": "127.0.0.1,127.0.0.3"}), http_timeout_s=10.0)
    attempted = await send(settings, f"http://half-dead.test:{receiver.port}/")
    assert attempted == Attempted("delivered", 204)


def _drip(start: bytes) -> Callable[[Request, asyncio.StreamWriter], Any]:
    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        while True:
            writer.write(b".")
            await writer.drain()
            await asyncio.sleep(0.02)

    return answer


async def _timed(settings: Settings, url: str) -> tuple[Attempted, float]:
    async with HttpSender(settings) as sender:
        started_s = time.monotonic()
        attempted = await sender.send(delivery(url))
        return attempted, time.monotonic() - started_s


def _unknown_host(*_: Any, **__: Any) -> Any:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


_real_getaddrinfo = socket.getaddrinfo


def _resolving_to(*addresses: str) -> Callable[..., Any]:
    """A look-up that finds these addresses for names under .test, and the usual ones for everything else."""

    def look_up(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
        if not str(host).endswith(".test"):
            return _real_getaddrinfo(host, port, *rest, **options)
        return [
            (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, int(port))) for address in addresses
        ]

    return look_up
