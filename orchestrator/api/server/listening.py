"""The listening sockets of the API, and of health and metrics."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from orchestrator.errors import OrchestratorError
from orchestrator.settings import Settings

BACKLOG = 2048


class Listeners(NamedTuple):
    """`management` is the socket of health and metrics, if they have one to themselves."""

    api: socket.socket
    management: socket.socket | None = None

    def close(self) -> None:
        for each in self:
            if each is not None:
                each.close()


@contextmanager
def listening(settings: Settings) -> Iterator[Listeners]:
    """Opens the sockets. Raises OrchestratorError, naming the setting, when a port is taken."""
    with ExitStack() as sockets:
        api = sockets.enter_context(listen("SERVER_PORT", settings.server_host, settings.server_port))
        management = None
        if settings.management_port is not None:
            opened = listen("MANAGEMENT_SERVER_PORT", settings.server_host, settings.management_port)
            management = sockets.enter_context(opened)
        yield Listeners(api, management)


def listen(setting: str, host: str, port: int) -> socket.socket:
    """A listening socket; opened here, because uvicorn would end the process when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        why = {
            errno.EADDRINUSE: "another process listens there; stop it or choose another port",
            errno.EACCES: "not permitted; choose a port above 1023",
        }.get(error.errno or 0, error.strerror or str(error))
        raise OrchestratorError(f"{setting}: cannot listen on {host}:{port}: {why}") from error
    # Connections inherit this option. uvicorn writes head and body separately; without the option each body waits
    # 40 ms for the client to acknowledge the head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
