"""The steps of a process before it can work: each is tried until the database answers, or until a stop."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress

from orchestrator.backoff import backoff_s
from orchestrator.errors import DatabaseUnavailable, OrchestratorError
from orchestrator.tasks import within

ANSWER_S = 10.0

_log = logging.getLogger(__name__)

# Texts of libpq and of a server that speaks English; in other languages the process waits, and its log says why.
_REFUSED = re.compile(
    r'(?:password authentication failed for user|no password supplied|role "[^"]*" does not exist'
    r'|database "[^"]*" does not exist|no pg_hba\.conf entry for|permission denied for database'
    r'|role "[^"]*" is not permitted to log in|unrecognized configuration parameter|invalid value for parameter'
    r'|parameter "[^"]*" cannot be|permission denied to set parameter'
    r"|invalid command-line argument for server process).*"
)


# Also what libpq says when TLS cannot be agreed on as DATABASE_URL demands.
_UNTRUSTED = re.compile(
    r"(?:SSL error: certificate verify failed|server certificate for .* does not match host name"
    r'|root certificate file "[^"]*" does not exist|server does not support SSL).*'
)


async def until_done(
    step: str, work: Callable[[], Awaitable[None]], stop: asyncio.Event, *, answer_s: float = ANSWER_S
) -> bool:
    """Tries the work until the database is there and answers in time. False: `stop` came first.

    Raises OrchestratorError for what waiting does not mend: a wrong login or option, a missing schema.
    """
    failures = 0
    while not stop.is_set():
        try:
            await within(answer_s, work(), stop)
        except (DatabaseUnavailable, TimeoutError) as error:
            if stop.is_set():
                break
            if refusal := _refusal(error, _REFUSED):
                raise OrchestratorError(f"DATABASE_URL: the server refuses it: {refusal}") from error
            if refusal := _refusal(error, _UNTRUSTED):
                raise OrchestratorError(f"DATABASE_URL: the server is not trusted: {refusal}") from error
            failures += 1
            wait_s = backoff_s(failures)
            why = str(error).splitlines()[0] if str(error) else f"no answer within {answer_s:g} s"
            _log.warning("waiting for the database", extra={"step": step, "error": why, "retry_in_s": round(wait_s, 3)})
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await stop.wait()
        else:
            if failures:
                _log.info("the database is there", extra={"step": step})
            return True
    return False


def _refusal(error: BaseException, known: re.Pattern[str]) -> str | None:
    """Why the login fails for good; None unless it does so with every server that was tried."""
    text = str(error)
    tried = [line for line in text.splitlines() if line.startswith("- ")] or [text]
    found = [known.search(each) for each in tried]
    return found[0].group() if all(found) and found[0] else None
