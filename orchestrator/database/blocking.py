"""Blocking calls of the database from an event loop, which can be given up at any time."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import psycopg
from psycopg.rows import TupleRow

T = TypeVar("T")
OnConnected = Callable[[psycopg.Connection[TupleRow]], None]


async def blocking(work: Callable[[OnConnected], T]) -> T:
    """What `work` answers, which tells of each connection that it opens, in a thread of its own.

    Cancelled, it cuts those connections, so that the thread ends; the process does not wait for it.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    opened: list[psycopg.Connection[TupleRow]] = []

    def tell(answer: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(answer)  # type: ignore[arg-type]  # None only if T has it

    def run() -> None:
        answer: T | None = None
        failure: BaseException | None = None
        try:
            answer = work(opened.append)
        except BaseException as error:
            failure = error
        with suppress(RuntimeError):  # the loop may have ended meanwhile
            loop.call_soon_threadsafe(tell, answer, failure)

    threading.Thread(target=run, daemon=True, name="database").start()
    try:
        return await done
    except asyncio.CancelledError:
        for connection in opened:
            cut(connection)
        raise


def cut(connection: psycopg.Connection[TupleRow]) -> None:
    """Ends a connection under a call of another thread, which fails then, whether the server answers or not."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.pgconn.socket)) as end:
        end.shutdown(socket.SHUT_RDWR)
