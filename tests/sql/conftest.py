"""Sessions on this test's own database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.support.sql_client import NOON, Client

Connect = Callable[[], Client]


@pytest.fixture
def connect(database_url: str) -> Iterator[Connect]:
    """Opens one more session, whose clock stands at `NOON`."""
    with ExitStack() as sessions:
        yield lambda: sessions.enter_context(Client(database_url)).at(NOON)


@pytest.fixture
def client(connect: Connect) -> Client:
    """A session of the owner's, whose clock stands at `NOON`."""
    return connect()


@pytest.fixture
def observer(connect: Connect) -> Client:
    """A session that only looks on, while others wait for one another."""
    return connect()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """Runs what may block."""
    with ThreadPoolExecutor(20) as pool:
        yield pool
