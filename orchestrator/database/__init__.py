"""The database as Python sees it: the only package that names SQL functions."""

from orchestrator.database.connection import Connection, connect, translated
from orchestrator.database.gateway import (
    COPY_SUBMISSIONS,
    ApiKey,
    Cancelled,
    Database,
    Filter,
    Rescheduled,
    Submitted,
    submit_all,
    submit_free,
)
from orchestrator.database.leases import NOTIFY_CHANNEL, Claimed, Claims, Finished, Leases, NotDelivered

__all__ = [
    "COPY_SUBMISSIONS",
    "NOTIFY_CHANNEL",
    "ApiKey",
    "Cancelled",
    "Claimed",
    "Claims",
    "Connection",
    "Database",
    "Filter",
    "Finished",
    "Leases",
    "NotDelivered",
    "Rescheduled",
    "Submitted",
    "connect",
    "submit_all",
    "submit_free",
    "translated",
]
