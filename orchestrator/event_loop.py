"""How late an event loop runs what is due: what keeps it busy makes everything else in the process late."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_EVERY_S = 1.0


def watch_lag(observe: Callable[[float], None]) -> None:
    """Tells `observe` once a second, for as long as the running loop does, how many seconds late a timer ran."""
    loop = asyncio.get_running_loop()

    def look(due_s: float) -> None:
        now_s = time.monotonic()
        observe(max(0.0, now_s - due_s))
        loop.call_later(_EVERY_S, look, now_s + _EVERY_S)

    loop.call_later(_EVERY_S, look, time.monotonic() + _EVERY_S)
