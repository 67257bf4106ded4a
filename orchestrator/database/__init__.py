"""The database as Python sees it: the only package that names SQL functions."""

from orchestrator.database.api_key_calls import ApiKey
from orchestrator.database.connection import Connection, connect, translated
from orchestrator.database.copying import COPY_STAGED, staged, submit_direct
from orchestrator.database.event_calls import Cancelled, Filter, Rescheduled
from orchestrator.database.gateway import Database
from orchestrator.database.leases import NOTIFY_CHANNEL, Claimed, Claims, Finished, Leases, NotDelivered
from orchestrator.database.submission_calls import Submitted, submit_all, submit_free

__all__ = [
    "COPY_STAGED",
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
    "staged",
    "submit_all",
    "submit_direct",
    "submit_free",
    "translated",
]
