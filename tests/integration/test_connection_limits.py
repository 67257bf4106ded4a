"""What clients may not do to the API before, while and after they ask: every bound, on a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx
import pytest

from orchestrator.api.server import connection, connection_limits
from orchestrator.database import Database
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings
from tests.conftest import MakeSettings
from tests.integration.api_support import running_api, submission, until
from tests.support.waiting import eventually

GET = b"GET /health HTTP/1.1\r\nHost: a\r\n"
POST = b"POST /api/v1/events HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
QUICK = {"API_HEAD_TIMEOUT_SECONDS": "0.3", "API_BODY_TIMEOUT_SECONDS": "0.3", "API_WRITE_TIMEOUT_SECONDS": "0.3"}


@dataclass
class Served:
    client: httpx.AsyncClient
    port: int
    metrics: Metrics
    raws: list[Raw] = field(default_factory=list)

    async def connect(self, address: str = "127.0.0.1") -> Raw:
        """A connection that is closed at the end of the test."""
        raw = Raw(*await asyncio.open_connection("127.0.0.1", self.port, local_addr=(address, 0)))
        self.raws.append(raw)
        return raw

    def refused(self, reason: str) -> float:
        refused: float = self.metrics.http_refusals_total(reason)._value.get()
        return refused


class Raw(NamedTuple):
    """A client that sends what it likes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def answer(self) -> tuple[int, dict[str, object]]:
        """Status and body of the only answer, to which the connection is closed."""
        head, _, body = (await self.everything()).partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)

    async def everything(self) -> bytes:
        async with asyncio.timeout(10):
            return await self.reader.read()

    async def send(self, *parts: bytes) -> None:
        """Sends until the other end has had enough."""
        for part in parts:
            self.writer.write(part)
            try:
                await self.writer.drain()
            except ConnectionError:
                return


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Served]:
    metrics = Metrics(settings)
    async with Database(settings, role="api") as database, running_api(settings, database, metrics) as client:
        served = Served(client, settings.server_port, metrics)
        try:
            yield served
        finally:
            for raw in served.raws:
                raw.writer.transport.abort()


@pytest.fixture
async def served(settings: MakeSettings) -> AsyncIterator[Served]:
    async with serving(settings(**QUICK)) as running:
        yield running


MEBIBYTE = b"a" * 2**20


@pytest.mark.parametrize(
    ("reason", "status", "parts"),
    [
        ("target", 414, [b"GET /", *[MEBIBYTE] * 30]),
        ("target", 414, [b"GET /?", b"a" * 9000, b" HTTP/1.1\r\n\r\n"]),
        ("headers", 431, [GET, b"X: ", *[MEBIBYTE] * 30]),
        ("headers", 431, [GET, *[MEBIBYTE] * 30]),
        ("headers", 431, [GET, b"a: b\r\n" * 2_000_000]),
        ("headers", 431, [GET, b"a: b\r\n" * 101, b"\r\n"]),
        ("headers", 431, [GET, b"X: " + b"a" * 33_000 + b"\r\n\r\n"]),
        ("headers", 431, [POST, b"Transfer-Encoding: chunked\r\n\r\n1;", *[MEBIBYTE] * 4]),
        ("headers", 431, [POST, b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX: ", *[MEBIBYTE] * 4]),
        ("headers", 431, [POST, b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n", b"a: b\r\n" * 200]),
        ("chunks", 431, [POST, b"Transfer-Encoding: chunked\r\n\r\n", (b"1;" + b"e" * 9000 + b"\r\n{\r\n") * 100]),
        ("chunks", 431, [POST, b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n{\r\n" * 50_000]),
        ("headers", 431, [b"\r\n" * 50_000]),
        ("malformed", 400, [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"]),
        ("malformed", 400, [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]),
        ("malformed", 400, [b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n"]),
        ("malformed", 400, [b"GET /\x00 HTTP/1.1\r\n\r\n"]),
        ("head_timeout", 408, []),
        ("head_timeout", 408, [b"G"]),
        ("head_timeout", 408, [b"\r\n"]),
        ("head_timeout", 408, [GET, b"X: a"]),
        ("body_timeout", 408, [POST, b"Content-Length: 10\r\n\r\n{"]),
        ("body_timeout", 408, [POST, b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"]),
    ],
)
async def test_a_request_that_breaks_a_bound_is_answered_with_a_problem_and_closed(
    served: Served, reason: str, status: int, parts: list[bytes]
) -> None:
    raw = await served.connect()
    sending = asyncio.create_task(raw.send(*parts))
    found, problem = await raw.answer()
    await sending
    assert found == problem["status"] == status
    assert str(problem["type"]).startswith("urn:orchestrator:problem:")
    assert served.refused(reason) == 1
    assert (await served.client.post("/api/v1/events", json=submission())).status_code == 201


async def test_a_request_sent_byte_by_byte_does_not_put_its_deadline_off(served: Served) -> None:
    raw = await served.connect()

    async def drip() -> None:
        for byte in GET * 10:
            await raw.send(bytes([byte]))
            await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    assert (await raw.answer())[0] == 408
    dripping.cancel()


async def test_a_later_request_has_its_own_deadline_and_an_idle_connection_closes_without_a_word(
    settings: MakeSettings,
) -> None:
    quick = settings(**QUICK | {"API_KEEP_ALIVE_SECONDS": "0.8"})
    async with serving(quick) as served:
        for more, last in ((b"GET /he", b"408"), (b"", b"200")):
            raw = await served.connect()
            await raw.send(GET + b"\r\n")
            assert (await raw.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.5)  # longer than a head may take: idle it may be
            await raw.send(more)
            rest = (await raw.everything()).rpartition(b"HTTP/1.1 ")[2]
            assert rest.startswith(last) if more else b"HTTP" not in rest
    assert served.refused("head_timeout") == 1


async def test_a_client_that_reads_no_answer_is_cut_off(served: Served) -> None:
    raw = await served.connect()
    raw.writer.transport.pause_reading()  # type: ignore[attr-defined]

    async def ask() -> None:
        while True:
            await raw.send(b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n")
            if raw.writer.is_closing() or served.refused("unread_answer"):
                return

    asking = asyncio.create_task(ask())
    await eventually(lambda: served.refused("unread_answer") == 1)
    asking.cancel()


async def test_requests_sent_ahead_are_answered_in_order_and_refused_beyond_a_bound(served: Served) -> None:
    raw = await served.connect()
    await raw.send((GET + b"\r\n") * 50 + b"GET / HTTP/1.1\r\n" + b"Connection: close\r\n\r\n")
    answers = (await raw.everything()).split(b"HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == [b"200"] * 50 + [b"404"]
    raw = await served.connect()
    await raw.send((GET + b"\r\n") * 10_000)
    answers = (await raw.everything()).split(b"HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == [b"200"] * 64 + [b"429"]
    assert served.refused("pipelined") == 1


async def test_a_refusal_of_a_later_request_does_not_overtake_earlier_answers(served: Served) -> None:
    raw = await served.connect()
    body = json.dumps(submission()).encode()
    await raw.send(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body + b"nonsense\r\n\r\n")
    answers = (await raw.everything()).split(b"HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == [b"201", b"400"]


async def test_an_answer_arrives_though_its_body_was_not_wanted(served: Served) -> None:
    raw = await served.connect()
    sending = asyncio.create_task(raw.send(POST + b"Content-Length: 30000000\r\n\r\n", *[MEBIBYTE] * 20))
    head = await raw.reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413")
    await sending
    await raw.everything()  # which ends: the rest of the body does not come


async def test_bodies_beyond_the_bound_of_memory_are_refused_and_small_ones_are_not(
    settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_limits, "_BODIES_BYTES", 0)
    chosen = settings(MAX_BODY_BYTES="1000000", MAX_PAYLOAD_BYTES="1000")
    async with serving(chosen) as served:
        large = [await served.connect() for _ in range(5)]
        for raw in large:
            await raw.send(POST + b"Content-Length: 999999\r\n\r\n", b" " * 999_000)
        assert await _first(large) == 503
        assert (await served.client.post("/api/v1/events", json=submission())).status_code == 201
        assert served.refused("memory") >= 1
        for raw in large:
            raw.writer.close()

        async def empty() -> bool:
            again = await served.connect()
            await again.send(POST + b"Content-Length: 999999\r\n\r\n", b" " * 999_000, b" " * 999)
            return (await again.reader.readline()).startswith(b"HTTP/1.1 400")

        await until(empty)


async def _first(raws: list[Raw]) -> int:
    """The status of the first answer that one of them gets."""
    waiting = [asyncio.create_task(raw.reader.readline()) for raw in raws]
    done, others = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=10)
    for task in others:
        task.cancel()
    return int(done.pop().result().split()[1])


async def test_idle_connections_give_way_when_all_connections_are_taken(settings: MakeSettings) -> None:
    chosen = settings(API_MAX_CONNECTIONS="20")
    async with serving(chosen) as served:
        busy = await served.connect()
        await busy.send(POST + b"Content-Length: 10\r\nExpect: 100-continue\r\n\r\n")
        await busy.reader.readline()
        idle = [await served.connect() for _ in range(60)]
        assert (await served.client.get("/health")).status_code == 200
        assert (await idle[0].answer())[0] == 503
        assert served.metrics.http_connections._value.get() <= 23


async def test_a_new_connection_is_told_to_try_again_when_all_are_busy(
    settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection.Connection, "waits", property(lambda _: False))
    chosen = settings(API_MAX_CONNECTIONS="16")
    async with serving(chosen) as served:
        held = [await served.connect() for _ in range(40)]
        raw = held[16]
        assert b"retry-after: 1" in (await raw.everything()).lower()
        assert served.refused("connections") > 0


async def test_one_address_gets_at_most_its_share_of_connections(settings: MakeSettings) -> None:
    chosen = settings(API_MAX_CONNECTIONS_PER_ADDRESS="5")
    async with serving(chosen) as served:
        held = [await served.connect() for _ in range(10)]
        assert (await held[-1].answer())[0] == 429
        other = await served.connect("127.0.0.2")
        await other.send(GET + b"Connection: close\r\n\r\n")
        assert (await other.everything()).startswith(b"HTTP/1.1 200")


async def test_refusals_do_not_flood_the_log(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(50):
        raw = await served.connect()
        await raw.send(b"nonsense\r\n\r\n")
        await raw.everything()
        raw = await served.connect()
        await raw.send(GET + b"Connection: upgrade, close\r\nUpgrade: websocket\r\n\r\n")
    await eventually(lambda: any("refused" in record.message for record in caplog.records))
    assert len([record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]) <= 2


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
async def test_an_upgrade_that_is_not_taken_is_an_ordinary_request(served: Served, apart: bool, chunked: bool) -> None:
    body = json.dumps(submission()).encode()
    length = b"Content-Length: %d\r\n" % len(body)
    if chunked:
        length, body = b"Transfer-Encoding: chunked\r\n", b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    raw = await served.connect()
    head = POST + length + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"
    for part in (head, body) if apart else (head + body,):
        await raw.send(part)
    assert (await raw.reader.readline()).startswith(b"HTTP/1.1 201")
    again = await served.connect()
    await again.send(GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert (await again.reader.readline()).startswith(b"HTTP/1.1 200")


async def test_requests_that_follow_each_other_without_a_pause_each_have_their_own_deadline(
    settings: MakeSettings,
) -> None:
    quick = settings(**QUICK)
    async with serving(quick) as served:
        raw = await served.connect()
        await raw.send(GET[:10])
        for _ in range(12):  # longer than a head may take, and never between two requests
            await raw.send(GET[10:] + b"\r\n" + GET[:10])
            assert (await raw.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            await raw.reader.readuntil(b"}}}")
            await asyncio.sleep(0.05)
        assert served.refused("head_timeout") == 0
