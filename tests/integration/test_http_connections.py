"""The connections of deliveries: which are kept, for how long, and how many there are."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from ssl import PROTOCOL_TLS_SERVER, SSLContext
from typing import Any

import pytest

from orchestrator.dispatch.attempt import Attempted
from orchestrator.dispatch.http import connector, pool
from orchestrator.dispatch.http.sender import Delivery, HttpSender
from orchestrator.settings import Settings
from tests.support.certificates import Authority
from tests.support.scripted_receiver import Receiver, Request, raw, reply
from tests.support.waiting import eventually

SETTINGS = replace(Settings.from_env({"HTTP_ALLOW_NETWORKS": "127.0.0.0/8,::1"}), http_timeout_s=10.0)
DELIVERED = Attempted("delivered", 204)
NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"


def delivery(destination: str, timeout_s: float | None = None, payload: bytes = b"{}") -> Delivery:
    event_id = "019ab2c3-0000-7000-8000-000000000001"
    return Delivery(event_id, 1, "2026-11-21T09:00:00Z", destination, payload, timeout_s=timeout_s)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as running:
        yield running


@pytest.fixture
async def sender() -> AsyncIterator[HttpSender]:
    async with HttpSender(SETTINGS) as running:
        yield running


# Which are kept


@pytest.mark.parametrize(
    "answer",
    [
        NO_CONTENT + b"HTTP/1.1 5",
        NO_CONTENT + b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n",
        NO_CONTENT + b"garbage",
        b"HTTP/1.0 204 No Content\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n",
    ],
)
async def test_a_connection_is_not_kept_after_more_than_one_answer_or_one_that_ends_it(
    receiver: Receiver, sender: HttpSender, answer: bytes
) -> None:
    receiver.answer = raw(answer)
    assert await sender.send(delivery(receiver.url)) == DELIVERED
    await receiver.until(lambda r: r.open_connections == 0)
    assert await sender.send(delivery(receiver.url)) == DELIVERED
    assert receiver.connections == 2


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_a_body_without_a_length_ends_with_the_connection(
    receiver: Receiver, sender: HttpSender, version: bytes
) -> None:
    receiver.answer = raw(b"HTTP/%b 200 OK\r\n\r\nall of it" % version, close=True)
    assert await sender.send(delivery(receiver.url)) == Attempted("delivered", 200)
    receiver.answer = raw(b"HTTP/%b 500 Oops\r\n\r\nall of it" % version, close=True)
    attempted = await sender.send(delivery(receiver.url))
    assert attempted == Attempted("retry", 500, "HTTP 500 Internal Server Error", "all of it")


async def test_a_connection_is_not_kept_when_the_answer_came_before_the_end_of_the_request() -> None:
    async def hasty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(NO_CONTENT)
        await ended.wait()
        writer.close()

    ended = asyncio.Event()
    async with await asyncio.start_server(hasty, "127.0.0.1", 0, limit=1) as server, HttpSender(SETTINGS) as sender:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        for _ in range(2):
            assert await sender.send(delivery(url, payload=b"x" * 2**24)) == DELIVERED
        ended.set()


async def test_idle_connections_are_closed_in_time(
    receiver: Receiver, sender: HttpSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_KEEPALIVE_S", 0.1)
    monkeypatch.setattr(pool, "_SWEEP_S", 0.05)
    async with asyncio.TaskGroup() as group:
        for _ in range(5):
            group.create_task(sender.send(delivery(receiver.url)))
    await receiver.until(lambda r: r.open_connections == 0)
    assert await sender.send(delivery(receiver.url)) == DELIVERED
    await receiver.until(lambda r: r.open_connections == 0)


async def test_the_connection_that_was_used_last_is_used_next(receiver: Receiver, sender: HttpSender) -> None:
    gate = asyncio.Event()

    async def together(request: Request, writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        writer.write(NO_CONTENT)

    receiver.answer = together
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(sender.send(delivery(receiver.url)))
        await receiver.until(lambda r: len(r.requests) == 3)
        gate.set()
    for _ in range(4):
        await sender.send(delivery(receiver.url))
    assert len({request.connection for request in receiver.requests[3:]}) == 1
    assert receiver.connections == 3


async def test_connections_to_many_hosts_at_once_are_bounded() -> None:
    most_open = 0

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        nonlocal most_open
        most_open = max(most_open, listening.open_connections)
        writer.write(NO_CONTENT)

    async with (
        Receiver(answer, host="0.0.0.0") as listening,
        HttpSender(replace(SETTINGS, http_max_connections=4)) as sender,
        asyncio.TaskGroup() as group,
    ):
        tasks = [
            group.create_task(sender.send(delivery(f"http://127.0.{n % 5}.{n % 40 + 1}:{listening.port}/")))
            for n in range(400)
        ]
        assert {await task for task in tasks} == {DELIVERED}
    assert 4 <= most_open <= 2 * 4 + 1  # the receiver notices a moment later that one was closed


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (b"", Attempted("retry", error="connection closed by {} before it answered")),
        (b"SSH-2.0-OpenSSH_9.2\r\n", Attempted("retry", error="{} answered with something that is not HTTP")),
        (b"HTTP/1.1 503 Full\r\ncontent-length: 0\r\n\r\n", Attempted("retry", 503, "HTTP 503 Service Unavailable")),
        (b"HTTP/1.1 503 Full\r\n\r\nfull", Attempted("retry", 503, "HTTP 503 Service Unavailable", "full")),
    ],
)
@pytest.mark.parametrize("late_s", [0.0, 0.05])
async def test_a_receiver_may_turn_a_connection_away_before_it_reads(
    sender: HttpSender, monkeypatch: pytest.MonkeyPatch, first: bytes, expected: Attempted, late_s: float
) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        writer.close()

    connect = connector.GuardedConnector.connect

    async def connect_and_wait(*arguments: Any) -> Any:
        made = await connect(*arguments)
        await asyncio.sleep(late_s)  # the receiver is faster than the delivery
        return made

    monkeypatch.setattr(connector.GuardedConnector, "connect", connect_and_wait)
    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        place = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        attempted = await sender.send(delivery(f"http://{place}/"))
    assert attempted == expected._replace(error=str(expected.error).format(place))


# Time


async def test_each_delivery_on_a_kept_connection_has_its_own_time(receiver: Receiver, sender: HttpSender) -> None:
    async def slow(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)
        writer.write(NO_CONTENT)

    clock = asyncio.get_running_loop().time
    assert await sender.send(delivery(receiver.url, 0.2)) == DELIVERED
    receiver.answer = slow
    assert await sender.send(delivery(receiver.url)) == DELIVERED
    receiver.answer = raw(b"")
    began_s = clock()
    attempted = await sender.send(delivery(receiver.url, 0.2))
    assert attempted == Attempted("retry", error="timeout: no complete response within 0.2 s")
    assert 0.19 < clock() - began_s < 0.45
    assert [request.connection for request in receiver.requests] == [1, 1, 1]


async def test_waiting_for_a_connection_takes_no_longer_than_the_attempt_may(receiver: Receiver) -> None:
    receiver.answer = raw(b"")
    async with HttpSender(replace(SETTINGS, http_max_connections=1)) as sender, asyncio.TaskGroup() as group:
        first = group.create_task(sender.send(delivery(receiver.url)))
        await receiver.until(lambda r: len(r.requests) == 1)
        attempted = await sender.send(delivery(receiver.url, 0.1))
        assert attempted.error == f"timeout: no connection to 127.0.0.1:{receiver.port} within 0.1 s"
        waiting = group.create_task(sender.send(delivery(receiver.url)))
        await asyncio.sleep(0)
        waiting.cancel()
        first.cancel()
        receiver.answer = reply(204)
        assert await sender.send(delivery(receiver.url)) == DELIVERED


async def test_a_delivery_that_is_cancelled_while_it_connects_gives_its_place_back(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()
    real = connector.GuardedResolver.resolve

    async def never(*_: Any) -> Any:
        asked.set()
        await asyncio.Event().wait()

    async with HttpSender(replace(SETTINGS, http_max_connections=1)) as sender:
        monkeypatch.setattr(connector.GuardedResolver, "resolve", never)
        task = asyncio.create_task(sender.send(delivery(receiver.url)))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        monkeypatch.setattr(connector.GuardedResolver, "resolve", real)
        assert await sender.send(delivery(receiver.url)) == DELIVERED


# Names and addresses


class Names:
    """Answers look-ups of names under .test with `addresses`, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
        self.addresses = addresses
        self.asked = 0
        monkeypatch.setattr(socket, "getaddrinfo", self._look_up)
        self._real = socket.getaddrinfo

    def _look_up(self, host: Any, port: Any, *rest: Any, **options: Any) -> Any:
        self.asked += 1
        found = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(*found, (address, int(port))) for address in self.addresses]


async def test_deliveries_that_begin_together_share_one_look_up(
    receiver: Receiver, sender: HttpSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names(monkeypatch, "127.0.0.1")
    url = f"http://shop.test:{receiver.port}/"
    first = asyncio.create_task(sender.send(delivery(url)))
    await eventually(lambda: names.asked)
    first.cancel()
    attempted = await asyncio.gather(*(sender.send(delivery(url)) for _ in range(5)))
    assert attempted == [DELIVERED] * 5
    assert names.asked == 1


async def test_a_name_that_moves_is_followed(
    receiver: Receiver, sender: HttpSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector, "_RESOLVED_S", 0.0)
    receiver.answer = reply(204, "connection: close")
    names = Names(monkeypatch, "127.0.0.1")
    url = f"http://shop.test:{receiver.port}/"
    assert await sender.send(delivery(url)) == DELIVERED
    async with Receiver(host="127.0.0.2", port=receiver.port) as moved:
        names.addresses = ("127.0.0.2",)
        assert await sender.send(delivery(url)) == DELIVERED
        assert (len(receiver.requests), len(moved.requests)) == (1, 1)
    names.addresses = ("10.0.0.1",)
    monkeypatch.setattr(pool, "_KEEPALIVE_S", 0.0)
    attempted = await sender.send(delivery(url))
    assert attempted.error == "address refused: 10.0.0.1 is private; HTTP_ALLOW_NETWORKS does not include it"


async def test_the_addresses_of_a_name_take_turns(
    receiver: Receiver, sender: HttpSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    Names(monkeypatch, "127.0.0.1", "127.0.0.2")
    async with Receiver(host="127.0.0.2", port=receiver.port) as other:
        receiver.answer = other.answer = reply(204, "connection: close")
        for _ in range(4):
            assert await sender.send(delivery(f"http://shop.test:{receiver.port}/")) == DELIVERED
        assert (len(receiver.requests), len(other.requests)) == (2, 2)


async def test_an_ipv6_address_is_connected_to(sender: HttpSender) -> None:
    try:
        receiver = await Receiver(host="::1").__aenter__()
    except OSError:
        pytest.skip("needs IPv6")
    url = f"http://[::1]:{receiver.port}/"
    assert await sender.send(delivery(url)) == DELIVERED
    assert receiver.requests[0].headers["host"] == f"[::1]:{receiver.port}"
    await receiver.__aexit__(None, None, None)


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl program to make certificates")
    return Authority(openssl, tmp_path_factory.mktemp("tls"))


async def test_a_tls_connection_names_its_host_and_is_kept(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.trusted))
    certificate: Path = authority.certificate("named", subject_alt_name="DNS:shop.test")
    tls = SSLContext(PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    Names(monkeypatch, "127.0.0.1")
    named: list[str | None] = []
    tls.sni_callback = lambda _, name, __: named.append(name)
    async with Receiver(tls=tls) as receiver, HttpSender(SETTINGS) as sender:
        for _ in range(3):
            assert await sender.send(delivery(f"https://shop.test.:{receiver.port}/")) == DELIVERED
        assert named == ["shop.test"]
        assert receiver.connections == 1
        # Another connection, although it is the same address and port.
        assert (await sender.send(delivery(f"http://shop.test.:{receiver.port}/"))).verdict == "retry"
