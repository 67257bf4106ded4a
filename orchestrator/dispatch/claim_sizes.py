"""How many events the next claim asks for, and how many a dispatcher may hold.

Many events may fall due at one instant. All that is claimed before it starts within milliseconds of it; what is claimed
later waits for the database. So claims grow while they come back full, and what is not due yet may fill the memory
further than what is due already.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.database import Claimed
from orchestrator.settings import Settings

_LARGEST_CLAIM = 2000
MOST_AHEAD = 30_000
"""Events that may be held while those claimed last are not due yet: 24 MiB of memory without their payloads."""
_NARROW_CLAIM = 500
_MOST_PAYLOAD = 1 << 26  # characters of payloads that may be held


class ClaimSizes:
    """A claim may begin while no more events are held than there is `room` beside.

    SCHEDULER_PREFETCH bounds what is held if it is given. Else it is 30,000 events while those claimed last are not
    due, and twice a claim, at least 1,000, once they are. While there is no room, narrow claims of what is due at once
    keep other destinations from waiting until a herd has drained.
    """

    def __init__(self, settings: Settings) -> None:
        self._batch, self._prefetch = settings.batch_size, settings.prefetch
        most = _LARGEST_CLAIM if self._prefetch is None else min(_LARGEST_CLAIM, self._prefetch // 2)
        self._largest = max(self._batch, most)
        self._claim = self._batch
        self._payload = 1.0  # mean characters in the last claim that gave any; the next is expected to be alike
        self._starts_at = float("-inf")  # the middle one of the events that the last claim gave, narrow ones aside
        self._held = 0  # after the last claim
        self.most = self._most_due

    @property
    def size(self) -> int:
        """Events that the next claim asks for."""
        return min(self._claim, max(1, int(_MOST_PAYLOAD / 4 / self._payload)))

    def room(self, held: int, payload: int) -> int:
        """How many events at most may be held when the next claim begins, if now so many are, of so many characters."""
        return self._room(self.most, _MOST_PAYLOAD, self.size, held, payload)

    def narrow_size(self, held: int, payload: int, now: float) -> int:
        """Events that a narrow claim asks for; 0: it would hold too many.

        While the events of the last claim are not due, it takes all that is due before them. Once they are, one event
        for two that have left since the last claim, so that fewer and fewer are held.
        """
        size = min(max(self._batch, _NARROW_CLAIM) if self.ahead(now) else (self._held - held) // 2, self.size)
        most = self._prefetch or MOST_AHEAD + self._most_due
        return size if held <= self._room(most, 2 * _MOST_PAYLOAD, size, held, payload) else 0

    def ahead(self, now: float) -> bool:
        """Whether the events of the last claim are not due yet, narrow ones aside."""
        return self._starts_at > now

    def note(self, asked: int, events: Sequence[Claimed], held: int, now: float) -> None:
        """Takes in what a claim gave when it asked for so many. `held` counts these events, too."""
        self._claim = min(2 * self._claim, self._largest) if len(events) == asked else self._batch
        if events:
            self._starts_at = events[len(events) // 2].start_at
        if self._prefetch is None:
            self.most = max(MOST_AHEAD if self.ahead(now) else 0, self._most_due)
        self.note_narrow(events, held)

    def note_narrow(self, events: Sequence[Claimed], held: int) -> None:
        """The same for a narrow claim, which says nothing about the next claims."""
        self._held = held
        if events:
            self._payload = max(1.0, sum(len(event.payload) for event in events) / len(events))

    @property
    def _most_due(self) -> int:
        return self._prefetch or max(1000, 2 * self._claim)

    def _room(self, most: int, most_payload: int, size: int, held: int, payload: int) -> int:
        room = most - size
        beyond = payload + size * self._payload - most_payload
        if held and beyond > 0:  # until events have left with the characters that are too many
            room = min(room, held - 1 - int(beyond * held / max(1, payload)))
        return max(0, room)
