"""Connection backoff: how long to wait before trying again to reach the database, the brokers or a child process.

The retry backoff of an event, between its attempts, is another one: the SQL function `retry_delay` computes it, in
sql/functions/41_retry_backoff.sql.
"""

from __future__ import annotations

import random

_FIRST_S = 0.1
_LAST_S = 5.0


def backoff_s(failures: int) -> float:
    """Seconds to wait after this many consecutive failures, from 1 on.

    The wait doubles from 0.1 s to 5 s, less a random part of up to half of it, so that processes do not connect in
    step.
    """
    return min(_LAST_S, _FIRST_S * 2.0 ** min(failures - 1, 10)) * random.uniform(0.5, 1.0)
