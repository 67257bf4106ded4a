"""What the API, the CLI and maintenance ask of the database."""

from __future__ import annotations

from orchestrator.database.api_key_calls import ApiKeyCalls
from orchestrator.database.event_calls import EventCalls
from orchestrator.database.submission_calls import SubmissionCalls


class Database(SubmissionCalls, EventCalls, ApiKeyCalls):
    """Every call that goes through the pool; `Pool` says what each of them raises.

    `Destinations`, `Rejects` and `Sweeps` ask through it, too.
    """
