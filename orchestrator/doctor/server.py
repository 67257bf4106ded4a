"""Checks of the database server: its configuration, and what holds vacuum back."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.database.connection import BlockingConnection
from orchestrator.doctor.finding import Finding, ok, problem, warning
from orchestrator.settings import Settings

OWN_CONNECTIONS = 9
"""Of `orchestrator run`, besides its pool and its consumers; ops/deployments/README.md lists them."""

_DURABILITY = {
    "fsync": (problem, "a crash of the machine can destroy the whole database", "set fsync = on, then restart"),
    "full_page_writes": (problem, "a crash of the machine can tear pages apart", "set full_page_writes = on"),
    "synchronous_commit": (
        warning,
        "a crash loses events that were accepted just before",
        "set synchronous_commit = on for the server, the database and the user",
    ),
}


def server_findings(connection: BlockingConnection, settings: Settings) -> Iterator[Finding]:
    rows = connection.execute(
        "select name, setting from pg_settings where name = any (%s)",
        ([*_DURABILITY, "autovacuum", "track_counts", "max_connections", "superuser_reserved_connections"],),
    ).fetchall()
    values = {str(name): str(setting) for name, setting in rows}
    switched_off = [name for name in _DURABILITY if values.get(name) == "off"]
    for name in switched_off:
        level, consequence, mend = _DURABILITY[name]
        yield level("durability", f"{name} is off: {consequence}", mend)
    if not switched_off:
        yield ok("durability", "a commit is on disk when it is answered")
    if "off" in (values.get("autovacuum"), values.get("track_counts")):
        yield problem(
            "autovacuum",
            "autovacuum is off: dead rows pile up, and claims slow down within hours",
            "set autovacuum = on and track_counts = on, then reload",
        )
    else:
        yield ok("autovacuum", "autovacuum is on")
    available = int(values["max_connections"]) - int(values["superuser_reserved_connections"])
    consumers = settings.kafka_concurrency if settings.kafka_servers is not None else 0
    needed = settings.pool_max_size + consumers + OWN_CONNECTIONS
    if needed > available:
        yield warning(
            "connections",
            f"one process may open {needed} connections, but the server allows {available}",
            "raise max_connections, lower DB_POOL_MAX_SIZE, or use a pooler",
        )
    yield from _vacuum_blockers(connection)


def _vacuum_blockers(connection: BlockingConnection) -> Iterator[Finding]:
    sessions = connection.execute(
        """
        select pid, coalesce(usename, '?'), coalesce(nullif(application_name, ''), '?'), state,
               extract(epoch from clock_timestamp() - xact_start)::bigint
        from pg_stat_activity
        where pid <> pg_backend_pid() and backend_type = 'client backend' and datname = current_database()
          and (state like 'idle in transaction%' and state_change < clock_timestamp() - interval '1 minute'
               or xact_start < clock_timestamp() - interval '10 minutes')
        order by xact_start
        limit 5
        """
    ).fetchall()
    for pid, user, application, state, seconds in sessions:
        yield warning(
            "vacuum",
            f"session {pid} ({user}, {application}) has a transaction open for {seconds} s, now {state}: "
            "dead rows since then cannot be removed",
            f"end it: select pg_terminate_backend({pid}); then set idle_in_transaction_session_timeout",
        )
    prepared = connection.execute(
        "select gid from pg_prepared_xacts where database = current_database()"
        " and prepared < clock_timestamp() - interval '10 minutes' limit 5"
    ).fetchall()
    for (gid,) in prepared:
        yield warning("vacuum", f"prepared transaction {gid!r} was left open", f"rollback prepared {gid!r}")
    slots = connection.execute(
        "select slot_name, xmin is not null or catalog_xmin is not null from pg_replication_slots where not active"
    ).fetchall()
    for name, holds_rows in slots:
        kept = "WAL and dead rows" if holds_rows else "WAL"
        yield warning(
            "vacuum",
            f"replication slot {name} has no consumer and keeps {kept}",
            f"start its consumer, or: select pg_drop_replication_slot('{name}')",
        )
    if not sessions and not prepared and not slots:
        yield ok("vacuum", "no session, prepared transaction or replication slot holds vacuum back")
