"""What the garbage collector looks at."""

from __future__ import annotations

import asyncio
import gc

_STARTED_S = 1.0  # after which the parts of a process have imported what they run
_YOUNG = 10_000  # new objects after which it looks; a batch of records is thousands that are all in use


def spare_what_stays() -> None:
    """Takes what the process has made by a second from now, mostly modules, out of the collector's sight.

    It would look through all of that time and again while events come and go, and find nothing: that was a tenth of
    what the API's own code takes for a single submission, and pauses of many milliseconds in every process. New objects
    are looked through more seldom, too: Python's 700 took a twentieth of an ingester's time.
    """
    gc.collect()
    gc.set_threshold(_YOUNG)
    asyncio.get_running_loop().call_later(_STARTED_S, gc.freeze)
