"""``Retry-After``: how long a receiver asks to be left alone (RFC 9110, section 10.2.3)."""

from __future__ import annotations

import re
from datetime import UTC
from email.utils import parsedate_to_datetime

MAX_RETRY_AFTER_S = 86_400.0  # a receiver cannot park an event for longer than a day
_DELAY_SECONDS = re.compile(r"[0-9]+")


def parse_retry_after(value: str | None, now_s: float) -> float | None:
    """Seconds to wait from `now_s` (since 1970), from either form of the header, 0 to `MAX_RETRY_AFTER_S`.

    A date that has passed means 0. Text that is neither whole seconds nor an HTTP date, such as a negative number,
    counts as no header: None.
    """
    if value is None:
        return None
    value = value.strip(" \t")
    if _DELAY_SECONDS.fullmatch(value):
        # Ten digits are three centuries already; int() would refuse thousands of them.
        return MAX_RETRY_AFTER_S if len(value.lstrip("0")) > 9 else min(float(value), MAX_RETRY_AFTER_S)
    if not value[:3].isalpha():
        return None  # every HTTP date begins with a day's name; the parser below is more lenient
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return min(max(moment.timestamp() - now_s, 0.0), MAX_RETRY_AFTER_S)
