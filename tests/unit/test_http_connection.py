"""Reading answers, whatever they are and however they arrive."""

from __future__ import annotations

import asyncio
from typing import cast

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.dispatch.http.answer import Answer, head_of
from orchestrator.dispatch.http.connection import Connection

PIECES = [
    b"HTTP/1.1 204 No Content\r\n", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 503 Busy\r\n", b"http/1.1 404 \n",
    b"HTTP/1.1 103 Hints\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 101 Switch\r\nUpgrade: x\r\n",
    b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", b"HTTP/2 200\r\n",
    b"Content-Length: 2\r\n", b"content-length: 0\r\n", b"Content-Length: x\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Connection: close\r\n", b"Retry-After: 5\r\n", b"nonsense\r\n", b" folded\r\n", b"x: \0\r\n", b"\r\n", b"\n",
    b"\r", b"ok", b"2\r\nok\r\n", b"0\r\n\r\n", b"zz\r\n", b"H", b"HTTP/", b"\xff", b"",
]  # fmt: skip


class Wire:
    """A transport that sends nothing."""

    closed = False

    def write(self, data: bytes) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True


def answered(pieces: list[bytes]) -> tuple[Answer, bool]:
    """What a connection makes of an answer in these pieces and then an end, and whether it was kept before the end."""
    loop = asyncio.new_event_loop()
    try:
        connection, wire = Connection(loop, 100), Wire()
        connection.connection_made(cast(asyncio.Transport, wire))
        answer = connection.post(b"", loop.time() + 60)
        for piece in pieces:
            if answer.done():
                break
            connection.data_received(piece)
        kept = connection.reusable
        if not answer.done():
            connection.connection_lost(None)
        connection.connection_lost(None)
        return answer.result(), kept
    finally:
        loop.close()


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=9), st.data())
def test_an_answer_means_the_same_in_whatever_pieces_it_arrives(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    answer, kept = answered([whole])
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)), max_size=len(whole))))
    pieces = [whole[first:last] for first, last in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    again, kept_again = answered([piece for piece in pieces if piece])
    head, head_again = head_of(answer.received), head_of(again.received)
    assert (head and head.status) == (head_again and head_again.status)
    assert again.status == answer.status
    if kept:  # in pieces, it may end before what does not belong to it comes
        assert kept_again
    if head is not None and answer.status:
        assert head.status == answer.status


@given(
    st.lists(
        st.sampled_from([piece for piece in PIECES if not piece.startswith(b"HTTP/1.1 1")]), min_size=1, max_size=6
    )
)
def test_a_connection_is_kept_only_after_exactly_one_complete_answer(parts: list[bytes]) -> None:
    whole = b"".join(parts)
    _, kept = answered([whole])
    if kept:
        assert len(whole.upper().split(b"HTTP/")) == 2
