"""Logs, every 30 s at most, which sessions' open transactions hold work up."""

from __future__ import annotations

import logging
import time

from orchestrator.database import Leases
from orchestrator.tasks import within

_EVERY_S = 30.0
_ANSWER_S = 5.0

_log = logging.getLogger(__name__)


class LockHolders:
    """One for each kind of work; `message` says which work is held up."""

    def __init__(self, message: str) -> None:
        self._message = message
        self._told_s = -_EVERY_S

    async def tell(self, leases: Leases, **context: int) -> None:
        """Raises as any call of the database does, and TimeoutError when it does not answer."""
        if time.monotonic() < self._told_s + _EVERY_S:
            return
        self._told_s = time.monotonic()
        _log.warning(self._message, extra=context | {"holders": await within(_ANSWER_S, leases.holders())})
