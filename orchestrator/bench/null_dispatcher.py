"""A dispatcher whose deliveries do nothing: what the database and the dispatcher alone can do.

``python -m orchestrator.bench.null_dispatcher``, configured by the environment as ``orchestrator dispatch`` is.
"""

from __future__ import annotations

import asyncio
import os
import signal

import uvloop

from orchestrator import logs
from orchestrator.config import Settings
from orchestrator.dispatch.attempt import DELIVERED, Attempted
from orchestrator.dispatch.dispatcher import Dispatcher
from orchestrator.dispatch.http import Delivery
from orchestrator.metrics import Metrics

_DELIVERED = Attempted(DELIVERED, 204)


class NullSender:
    async def send(self, _delivery: Delivery) -> Attempted:
        return _DELIVERED


async def _main() -> None:
    settings = Settings.from_env(os.environ)
    logs.configure(settings, "null dispatcher")
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await Dispatcher(settings, Metrics(settings), NullSender()).run(stop)


if __name__ == "__main__":
    uvloop.run(_main())
