"""What each kind of process must be allowed to do: a right to a function that stands for the rest of its role's."""

from __future__ import annotations

from typing import NamedTuple


class Ability(NamedTuple):
    role: str
    """The role of ``sql/roles.sql`` that gives it."""
    function: str


ABILITIES = {
    "submit": Ability("orchestrator_submit", "orchestrator.submit_staged()"),
    "ingest": Ability("orchestrator_ingest", "orchestrator.submit_set_aside(integer)"),
    "dispatch": Ability("orchestrator_dispatch", "orchestrator.release_events(uuid[], integer[])"),
    "query": Ability("orchestrator_read", "orchestrator.statistics()"),
    "maintain": Ability("orchestrator_ops", "orchestrator.run_maintenance(integer, integer)"),
}

NEEDED = {
    "run": ("submit", "dispatch", "maintain"),
    "api": ("submit",),
    "dispatch": ("dispatch",),
    "ingest": ("ingest",),
    "maintain": ("maintain",),
}
"""Of the processes, by their role, what they are not ready without: an API that answers no questions serves clients."""
