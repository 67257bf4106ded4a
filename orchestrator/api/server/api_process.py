"""Runs the API in a process of its own, beside the one that delivers, so that no client makes an event late.

A thread would not be enough: an expensive request would hold the interpreter's lock, and share memory and descriptors
with deliveries. The delivering process opens the sockets and passes them on. It answers the API's process, starts it
again when it has died, and tells it to stop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from orchestrator.api.server.listening import Listeners, listening
from orchestrator.api.server.process_link import Deliverer, Link, Message
from orchestrator.backoff import backoff_s
from orchestrator.errors import DatabaseUnavailable, OrchestratorError
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings

_ENDING_S = 1.0
_VICTIM = "500"  # of 1000: when memory runs out, the kernel kills the API rather than the delivering process

_log = logging.getLogger(__name__)


async def serve_api_process(settings: Settings, role: str, metrics: Metrics, *, stop: asyncio.Event) -> None:
    """Serves the API until `stop` is set. Raises OrchestratorError as `serve` does when it cannot start.

    Raises it also when the API's process does not stop in order.
    """
    with listening(settings) as listeners:
        failures, has_served = 0, False
        while not stop.is_set():
            try:
                failure, served = await _serve_once(settings, role, metrics, listeners, stop)
            except OSError as error:  # this machine lacks what a new process needs
                failure, served = Message("failed", f"its process cannot be started: {error}"), False
            has_served |= served
            if stop.is_set():
                return
            if not has_served and not failure.passing:
                raise OrchestratorError(failure.text)
            failures = 1 if served else failures + 1
            wait_s = backoff_s(failures)
            _log.error("the API ended; starting it again: %s", failure.text, extra={"retry_in_s": round(wait_s, 3)})
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await stop.wait()


async def _serve_once(
    settings: Settings, role: str, metrics: Metrics, listeners: Listeners, stop: asyncio.Event
) -> tuple[Message, bool]:
    """Runs one process until it has ended; returns why it ended, and whether it had begun to serve.

    Raises OrchestratorError when it had to be killed at a stop, or failed while it stopped.
    """
    failure, served = None, False
    async with _process(settings, role, listeners) as (process, link):
        stopping = asyncio.create_task(_stop(stop, listeners, link, process, settings.shutdown_timeout_s))
        try:
            while (message := await link.receive()) is not None:
                if message.kind == "ask":
                    link.send(Message("samples", samples=metrics.samples()))
                elif message.kind == "failed":
                    failure = message
                    if stop.is_set() and not message.passing:
                        raise OrchestratorError(f"the API failed while it stopped: {message.text}")
                else:
                    served = True
            status = await _ended(process)
            if stopping.done():
                raise OrchestratorError(
                    f"the API had not ended after SHUTDOWN_TIMEOUT_SECONDS ({settings.shutdown_timeout_s:g}), and was "
                    "killed"
                )
        finally:
            stopping.cancel()
            await asyncio.gather(stopping, return_exceptions=True)
    return failure or Message("failed", f"the API's process ended by itself, with status {status}"), served


@asynccontextmanager
async def _process(
    settings: Settings, role: str, listeners: Listeners
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Link]]:
    """Starts the API's process; it has ended when the block does."""
    ours, theirs = socket.socketpair()
    with theirs:
        descriptors = [theirs.fileno(), *(each.fileno() for each in listeners if each is not None)]
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # it must find modules where this process does, not first in the current directory
                "-m",
                __name__,
                *map(str, descriptors),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=descriptors,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C is for this process, which then stops the other in order
            )
        except BaseException:
            ours.close()
            raise
    link = await Link.over(ours)
    try:
        link.send_raw(pickle.dumps((settings, role)))
        yield process, link
    finally:
        await link.close()  # then it ends at once if it has not yet
        await _ended(process)


async def _ended(process: asyncio.subprocess.Process) -> int:
    """Its exit status; kills it if it has not ended within a second."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_ENDING_S):
            return await process.wait()
    with suppress(ProcessLookupError):
        process.kill()
    return await process.wait()


async def _stop(
    stop: asyncio.Event, listeners: Listeners, link: Link, process: asyncio.subprocess.Process, timeout_s: float
) -> None:
    await stop.wait()
    listeners.close()
    link.send(Message("stop"))
    await asyncio.sleep(timeout_s + _ENDING_S)
    with suppress(ProcessLookupError):
        process.kill()


# The code below runs in the API's process.


def main() -> None:
    """Serves on the sockets whose descriptors it is given: the link, the API's, and perhaps one for health alone."""
    import uvloop

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the delivering process gets them, too, and tells this one to stop
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_VICTIM)
    link, *listeners = (socket.socket(fileno=int(descriptor)) for descriptor in sys.argv[1:])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status = runner.run(_serve(link, Listeners(*listeners)))
    logging.shutdown()
    os._exit(status)


async def _serve(end: socket.socket, listeners: Listeners) -> int:
    from orchestrator import logs
    from orchestrator.api.server.server import serve
    from orchestrator.database import Database
    from orchestrator.database.rights import NEEDED
    from orchestrator.event_loop import watch_lag
    from orchestrator.garbage import spare_what_stays

    link = await Link.over(end)
    given = await link.receive_raw()
    if given is None:
        return 1
    settings, role = pickle.loads(given)  # noqa: S301  # from our own parent, over a socket that only it has
    logs.configure(settings, role)
    metrics = Metrics(settings, role)
    metrics.count_log_lines()
    watch_lag(metrics.event_loop_lag_seconds.observe)
    stop = asyncio.Event()
    deliverer = Deliverer(link, stop)
    listener = asyncio.create_task(deliverer.listen())
    status = 0
    spare_what_stays()
    try:
        async with Database(settings, role="api", needs=NEEDED[role], serves_clients=True) as database:
            await serve(
                settings,
                database,
                metrics,
                stop=stop,
                listeners=listeners,
                deliverer=deliverer,
                on_serving=lambda: link.send(Message("serving")),
            )
    except Exception as error:
        status = 1
        cause = _cause(error)
        if not isinstance(cause, OrchestratorError):
            _log.exception("the API ended with an unexpected error")
        text = str(cause) or type(cause).__name__
        link.send(Message("failed", text, passing=isinstance(cause, DatabaseUnavailable)))
    finally:
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)
        await link.close()
    return status


def _cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    main()
