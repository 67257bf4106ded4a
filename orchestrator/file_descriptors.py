"""File descriptors: the limit of this process, raised as far as allowed, and what of it each kind of use may take.

What the API's clients hold open must never be missing where events are delivered and the database is spoken to.
"""

from __future__ import annotations

import resource
import sys
from contextlib import suppress

from orchestrator.settings import Settings

MOST_CLIENTS = 5000
"""Connections of clients unless API_MAX_CONNECTIONS says otherwise; more would take memory that nobody planned."""
MANAGEMENT = 64
"""Connections to health and metrics, where they have a port, or a process without an API, to themselves."""
_OWN = 60  # log, libraries, event loop, names being looked up, files of secrets
_DATABASE_APART = 8  # connections besides the pool: claims, results, notifications, maintenance
_KAFKA = 30
_FEWEST = 8


def raise_limit() -> int:
    """Raises this process's limit to the most it is allowed, and returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return limit()


def limit(*, hard: bool = False) -> int:
    """This process's limit as it is; with `hard` as `raise_limit` would make it."""
    found = resource.getrlimit(resource.RLIMIT_NOFILE)[hard]
    return sys.maxsize if found == resource.RLIM_INFINITY else found


def clients(settings: Settings, limit: int) -> int:
    """How many connections of clients fit, beside what the API itself needs; what they get when that is not set."""
    reserved = _OWN + settings.pool_max_size + (_KAFKA if settings.kafka_servers else 0)
    reserved += MANAGEMENT if settings.management_port is not None else 0
    # Some more are held for a moment, to be told that there is no room.
    fit = max(_FEWEST, (limit - reserved) * 8 // 9)
    return min(settings.api_max_connections or MOST_CLIENTS, fit)


def deliveries(settings: Settings, limit: int) -> int:
    """How many deliveries fit; as many connections again may be idle."""
    reserved = _OWN + _DATABASE_APART + (_KAFKA if settings.kafka_servers else 0) + MANAGEMENT
    return min(settings.http_max_connections, max(_FEWEST, (limit - reserved) // 2))


def shortages(settings: Settings, limit: int) -> list[str]:
    """What the limit does not allow of the settings, a line each."""
    found = []
    if (most := deliveries(settings, limit)) < settings.http_max_connections:
        found.append(
            f"HTTP_MAX_CONNECTIONS: {settings.http_max_connections:,} are too many for {limit:,} file "
            f"descriptors (ulimit -n); {most:,} are used"
        )
    most = clients(settings, limit)
    if settings.api_max_connections is not None and most < settings.api_max_connections:
        found.append(
            f"API_MAX_CONNECTIONS: {settings.api_max_connections:,} are too many for {limit:,} file "
            f"descriptors (ulimit -n); {most:,} are used"
        )
    if limit < _OWN + settings.pool_max_size + _KAFKA:
        found.append(
            f"DB_POOL_MAX_SIZE: {settings.pool_max_size:,} are too many for {limit:,} file descriptors (ulimit -n)"
        )
    return found
