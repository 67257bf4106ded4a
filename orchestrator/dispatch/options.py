"""What a destination's settings say about an attempt: rate limit, time-out and secrets, as a claim returns them."""

from __future__ import annotations

from functools import lru_cache

import msgspec

from orchestrator.dispatch.attempt import RETRY, Attempted

_CORRECTED_S = 60.0  # an operator has to correct it


class Options(msgspec.Struct, frozen=True):
    """`rate`: a rate limit (GCRA) has booked a slot, which is lost unless the attempt begins in time. `bound`: other
    events wait for its result.

    `signing_secret`, and the values of `secret_headers`, are names of secrets. With a `fault` nothing can be sent.
    """

    rate: bool = False
    bound: bool = False
    timeout_s: float | None = None
    signing_secret: str | None = None
    secret_headers: dict[str, str] | None = None
    fault: Attempted | None = None


NO_OPTIONS = Options()


@lru_cache(maxsize=4096)
def options_of(text: str) -> Options:
    """Reads JSON text, which is the same for all events of a destination."""
    try:
        return msgspec.json.decode(text, type=Options)
    except msgspec.MsgspecError as error:  # whoever owns the tables can write anything
        reason = f"the configuration of its destination cannot be read: {error}"
        return Options(fault=Attempted(RETRY, error=reason, retry_after_s=_CORRECTED_S))
