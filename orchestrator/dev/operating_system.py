"""What the embedded server needs of the operating system: processes, ports, locks and time."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import secrets
import socket
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import OrchestratorError

# psutil comes with the extra "embedded" and is imported where it is used, so that a missing extra is
# reported by find_installation in words.
if TYPE_CHECKING:
    import psutil

# Below the range from which systems choose ports for outgoing connections: no connection can take the port
# of a server that is down for a moment, nor can a client that retries the port connect to itself.
_PORTS = range(15_000, 32_000)
_BLOCK = 100


def free_port() -> int:
    """A port of 127.0.0.1 on which no program listens. While this process lives, no other gets it from here."""
    ports = _own_ports(os.getpid())
    for port in itertools.islice(ports, _BLOCK):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OrchestratorError(f"{_BLOCK} ports of 127.0.0.1 from {next(ports)} on are taken")


@cache
def _own_ports(pid: int) -> Iterator[int]:
    """Cycles through the ports of a block that the process `pid`, this one, owns: it has bound the first of them."""
    for first in secrets.SystemRandom().sample(_PORTS[::_BLOCK], len(_PORTS) // _BLOCK):
        owner = socket.socket()
        try:
            owner.bind(("127.0.0.1", first))
        except OSError:
            owner.close()
            continue
        owner.detach()  # it stays open until the process ends
        return itertools.cycle(range(first + 1, first + _BLOCK))
    raise OrchestratorError(f"no free port between {_PORTS.start} and {_PORTS.stop} on 127.0.0.1")


@contextlib.contextmanager
def exclusive(directory: Path, timeout_s: float) -> Iterator[int]:
    """Lets one process of the machine at a time create the content of a directory, by a lock on the directory itself.

    Yields the lock's descriptor: a child that it is passed to holds the lock until it has ended, even when this
    process is killed meanwhile. Raises OrchestratorError if other processes do not release it in time.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OrchestratorError(f"{directory}: cannot be locked: {error.strerror}") from error
    try:
        for _ in until(timeout_s):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                continue
            except OSError as error:
                raise OrchestratorError(f"{directory}: cannot be locked: {error.strerror}") from error
        else:
            raise OrchestratorError(
                f"{directory}: another process has kept it locked for {timeout_s:g} s; end it (fuser -v {directory})"
            )
        yield descriptor
    finally:
        os.close(descriptor)


def until(timeout_s: float) -> Iterator[None]:
    """Yields again and again, with short pauses, until the time is over."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        yield
        time.sleep(0.01)


def runs_with_argument(pid: int, argument: str) -> bool:
    """Whether the process lives and was started with this argument. Works for other users' processes."""
    import psutil

    try:
        return argument in psutil.Process(pid).cmdline()
    except psutil.Error:
        return False


def kill_family(pid: int) -> list[psutil.Process]:
    """SIGKILL to a process and then to all of its descendants, which are returned with it."""
    import psutil

    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return family


def is_alive(process: psutil.Process) -> bool:
    """False for zombies too: an orphan is one until the init process notices, and holds nothing by then."""
    import psutil

    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
