"""Answers of the API: in one piece where that is possible, and else as uvicorn sends them."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.api.server.exchange import Exchange

LENGTH_2 = (b"content-length", b"2")


class Transport:
    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.closed = False

    def write(self, piece: bytes) -> None:
        self.pieces.append(bytes(piece))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


def exchange(method: str = "GET", *, keep_alive: bool = True, access_log: bool = False) -> tuple[Exchange, Transport]:
    transport = Transport()
    made = Exchange(
        {"method": method, "http_version": "1.1", "path": "/", "query_string": b"", "client": None},  # type: ignore[typeddict-item]
        transport,  # type: ignore[arg-type]
        SimpleNamespace(write_paused=False),  # type: ignore[arg-type]
        logging.getLogger("test"),
        logging.getLogger("test"),
        access_log,
        [(b"date", b"today")],
        asyncio.Event(),
        False,
        keep_alive,
        lambda: None,
    )
    return made, transport


def start(*headers: tuple[bytes, bytes], status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(text: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text, "more_body": more}


async def test_head_and_body_are_one_piece() -> None:
    answering, transport = exchange()
    await answering.send(start(LENGTH_2, status=201))
    assert answering.response_started
    assert not transport.pieces
    await answering.send(body(b"ok"))
    assert transport.pieces == [b"HTTP/1.1 201 Created\r\ndate: today\r\ncontent-length: 2\r\n\r\nok"]
    assert answering.response_complete
    assert not transport.closed


async def test_an_answer_to_head_has_no_body() -> None:
    answering, transport = exchange("HEAD")
    await answering.send(start(LENGTH_2))
    await answering.send(body(b"ok"))
    assert transport.pieces == [b"HTTP/1.1 200 OK\r\ndate: today\r\ncontent-length: 2\r\n\r\n"]


@pytest.mark.parametrize("access_log", [False, True])
async def test_the_last_answer_of_a_connection_says_so_and_closes_it(*, access_log: bool) -> None:
    answering, transport = exchange(keep_alive=False, access_log=access_log)
    await answering.send(start(LENGTH_2))
    await answering.send(body(b"ok"))
    assert b"".join(transport.pieces).endswith(b"\r\nconnection: close\r\n\r\nok")
    assert transport.closed


async def test_an_answer_of_unknown_length_is_sent_in_chunks() -> None:
    answering, transport = exchange()
    await answering.send(start())
    await answering.send(body(b"ok", more=True))
    await answering.send(body(b"", more=False))
    assert b"".join(transport.pieces).endswith(b"\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
    assert answering.response_complete


@pytest.mark.parametrize("value", [b"a\r\nb: c", b"a\nb", b"a\rb", b"a\0b"])
async def test_a_header_cannot_begin_another_line(value: bytes) -> None:
    answering, transport = exchange()
    await answering.send(start(LENGTH_2, (b"location", value)))
    with pytest.raises(RuntimeError, match="Invalid HTTP header"):
        await answering.send(body(b"ok"))
    assert not transport.pieces


@pytest.mark.parametrize("declared", [b"1", b"3"])
async def test_a_body_of_another_length_than_declared_is_an_error(declared: bytes) -> None:
    answering, _ = exchange()
    await answering.send(start((b"content-length", declared)))
    with pytest.raises(RuntimeError, match="than Content-Length"):
        await answering.send(body(b"ok"))
    assert not answering.response_complete
