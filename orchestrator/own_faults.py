"""Tells faults of this machine from those of the far end: a fault of this machine must cost no event an attempt."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import re
import socket
import ssl
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from orchestrator.errors import OwnFaultError

if TYPE_CHECKING:
    from orchestrator.metrics import Metrics

PAUSE_S = 1.0
"""About how long to wait before trying again after a fault of this machine."""
_PROBED = 3  # descriptors that resolving a name takes
_LOG_EVERY_S = 10.0
_RAISE_LIMIT = "raise the limit (ulimit -n, LimitNOFILE= in systemd), or lower HTTP_MAX_CONNECTIONS"
_REMEDIES = {
    errno.EMFILE: _RAISE_LIMIT,
    errno.ENFILE: "raise fs.file-max",
    errno.ENOBUFS: "give this machine more memory for sockets",
    errno.ENOMEM: "give this process more memory",
    errno.ENOSPC: "raise fs.epoll.max_user_watches",
    errno.EADDRNOTAVAIL: "widen net.ipv4.ip_local_port_range",
    errno.ENETDOWN: "bring its network up",
}
# A fault with one address says little while other addresses of the same host answer, even by refusing.
_OF_ALL_ADDRESSES = frozenset(_REMEDIES) - {errno.EADDRNOTAVAIL, errno.ENETDOWN}
_QUOTED_ERRNO = re.compile(r"\[Errno (\d+)\]")

_log = logging.getLogger(__name__)


def own_fault(error: BaseException) -> OwnFaultError | None:
    """What this machine lacked when `error` was raised; None when the far end may be to blame."""
    for cause in _causes(error):
        if isinstance(cause, OwnFaultError):
            return cause
        if isinstance(cause, MemoryError):
            return _of(errno.ENOMEM)
        if isinstance(cause, RuntimeError) and "start new thread" in str(cause):
            return OwnFaultError("threads", "no thread can be started", "raise the limit (ulimit -u, TasksMax=)")
        if isinstance(cause, socket.gaierror):
            # Without descriptors the resolver reports an unknown name, or a temporary failure.
            if cause.errno == socket.EAI_MEMORY:
                return _of(errno.ENOMEM)
            return without_descriptors()
        if isinstance(cause, OSError):
            if cause.errno in _REMEDIES:
                return _of(cause.errno)
            if cause.errno is None:  # several addresses failed in several ways; only the text says how
                for number in map(int, _QUOTED_ERRNO.findall(str(cause))):
                    if number in _OF_ALL_ADDRESSES:
                        return _of(number)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _of(number: int) -> OwnFaultError:
    return OwnFaultError(errno.errorcode[number], os.strerror(number), _REMEDIES[number])


def without_descriptors() -> OwnFaultError | None:
    """A fault if no descriptors are left at this moment; otherwise None."""
    opened = []
    try:
        for _ in range(_PROBED):
            opened.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return _of(error.errno) if error.errno in _REMEDIES else None
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return None


def trusts_nobody() -> bool:
    """Whether this machine has no certificates of authorities, so that no receiver's certificate can be checked."""
    paths = ssl.get_default_verify_paths()
    if paths.cafile:
        return False
    try:
        return not paths.capath or not os.listdir(paths.capath)
    except OSError:
        return True


def no_authorities() -> OwnFaultError:
    return OwnFaultError(
        "authorities",
        "there are no certificates of authorities on this machine",
        "install ca-certificates, or set SSL_CERT_FILE to a file that exists, and start again",
    )


class Postponing:
    """Waits after faults of this machine, counts them, and logs them, one line in ten seconds at most."""

    def __init__(self, metrics: Metrics) -> None:
        self._total = metrics.own_faults_total
        self._closed = asyncio.Event()
        self._next_s = 0.0
        self._unsaid: Counter[str] = Counter()

    async def pause(self, fault: OwnFaultError, attempts: int = 1) -> None:
        """Returns after about PAUSE_S, at once when closed."""
        self._total(fault.kind).inc(attempts)
        self._unsaid[fault.kind] += attempts
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + _LOG_EVERY_S
            put_off, self._unsaid = dict(self._unsaid), Counter()
            _log.error("this machine cannot deliver; no attempt is spent: %s", fault, extra={"put_off": put_off})
        with suppress(TimeoutError):
            async with asyncio.timeout(PAUSE_S * random.uniform(0.5, 1.5)):
                await self._closed.wait()

    def close(self) -> None:
        """Ends every pause."""
        self._closed.set()
