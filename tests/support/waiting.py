"""Waiting for conditions, which is what the tests do in place of sleeping."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

T = TypeVar("T")


@overload
async def eventually(condition: Callable[[], Awaitable[T]], timeout_s: float = 10.0, *, pause_s: float = 0.01) -> T: ...
@overload
async def eventually(condition: Callable[[], T], timeout_s: float = 10.0, *, pause_s: float = 0.01) -> T: ...
async def eventually(condition: Callable[[], Any], timeout_s: float = 10.0, *, pause_s: float = 0.01) -> Any:
    """Calls `condition`, plain or async, until it returns something truthy, and returns that.

    Raises AssertionError with the last value when the time is over. Exceptions of the condition pass
    through, but for AssertionError: a condition may assert, and is tried again.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        last: Any = None
        try:
            outcome = condition()
            last = await outcome if inspect.isawaitable(outcome) else outcome
            if last:
                return last
        except AssertionError as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {timeout_s} s; the last value was {last!r}") from None
        await asyncio.sleep(pause_s)
