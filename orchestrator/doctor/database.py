"""Checks of the database: its server, its schema and the work in it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psycopg

from orchestrator.database import migrate
from orchestrator.database.connection import BlockingConnection, connect_blocking
from orchestrator.database.customer import customer_of, handing_over
from orchestrator.database.rights import ABILITIES
from orchestrator.doctor.backlog import backlog_findings
from orchestrator.doctor.backups import backup_findings
from orchestrator.doctor.finding import Finding, guarded, is_production, listed, ok, problem, warning
from orchestrator.doctor.maintenance import maintenance_findings
from orchestrator.doctor.open_transactions import open_transaction_findings
from orchestrator.doctor.pauses_and_limits import pause_and_limit_findings
from orchestrator.doctor.replica import replica_findings
from orchestrator.doctor.server import server_findings
from orchestrator.doctor.vital_signs import vital_sign_findings
from orchestrator.errors import OrchestratorError, UnusableDatabase, first_line
from orchestrator.settings import Settings, database_url

_ROLES = (
    "orchestrator_submit",
    "orchestrator_dispatch",
    "orchestrator_ingest",
    "orchestrator_ops",
    "orchestrator_read",
)
_PARTS = ("submit", "dispatch", "query", "maintain")
_LEAST_DAYS_AHEAD = 2


def database_findings(settings: Settings) -> Iterator[Finding]:
    """Findings about the server, the schema and the work in it. If it cannot be reached, that is the only finding."""
    masked = database_url.masked(settings.database_url)
    try:
        connection = connect_blocking(settings.database_url, "doctor", statement_timeout="15s", lock_timeout="2s")
    except UnusableDatabase as error:
        what, _, mend = str(error).partition("; ")
        yield problem("database", what, mend)
        return
    except psycopg.OperationalError as error:
        yield problem(
            "database",
            f"cannot reach {masked}: {first_line(error)}",
            "start the server, or correct DATABASE_URL (or DB_HOST, DB_PORT, DB_NAME, DB_USER, DB_PASSWORD)",
        )
        return
    with connection:
        version = connection.info.server_version
        if version < migrate.MINIMUM_VERSION:
            yield problem(
                "database",
                f"{masked} is PostgreSQL {version // 10000}; expected 18 or newer",
                "upgrade the server, or set DATABASE_URL to a newer one",
            )
            return
        yield ok("database", f"PostgreSQL {version // 10000}.{version % 10000} at {masked}")
        try:
            if connection.pooled:
                yield _pooler(connection)
        except UnusableDatabase as error:
            what, _, mend = str(error).partition("; ")
            yield problem("pooler", what, mend)
            return
        yield from guarded("writes", lambda: _writes(connection))
        yield from guarded("server", lambda: server_findings(connection, settings))
        yield from guarded("read replica", lambda: replica_findings(connection, settings))
        yield from guarded("clock", lambda: _clock(connection))
        yield from guarded("roles", lambda: _roles(connection))
        migrated = True
        for finding in guarded("migrations", lambda: _migrations(connection, settings)):
            migrated = migrated and finding.level != "problem"
            yield finding
        if migrated:
            yield from guarded("customer", lambda: _customer(connection, settings))
            yield from guarded("rights", lambda: _rights(connection, settings))
            yield from guarded("partitions", lambda: _partitions(connection, settings))
            yield from guarded("API keys", lambda: _api_keys(connection, settings))
            yield from maintenance_findings(connection, settings)
            yield from guarded("backups", lambda: backup_findings(connection, settings))
            yield from backlog_findings(connection)
            yield from pause_and_limit_findings(connection)
            yield from open_transaction_findings(connection)
            yield from vital_sign_findings(connection)


def _pooler(connection: BlockingConnection) -> Finding:
    with connection.transaction():
        return ok(
            "pooler",
            "connections go through a pooler: dispatchers get no notifications and only poll for due events, once a "
            "second or every SCHEDULER_POLL_INTERVAL_MS",
        )


def _clock(connection: BlockingConnection) -> Iterator[Finding]:
    # The fastest of a few answers bounds the difference best.
    answers = []
    for _ in range(5):
        sent_s = time.time()
        row = connection.execute("select extract(epoch from clock_timestamp())::float8").fetchone()
        received_s = time.time()
        assert row is not None
        answers.append((received_s - sent_s, row[0] - (sent_s + received_s) / 2))
    took_s, skew_s = min(answers)
    size_s = max(0.0, abs(skew_s) - took_s / 2)
    shown = f"this machine's clock is {abs(skew_s):.3g} s {'behind' if skew_s > 0 else 'ahead of'} the database's"
    mend = "synchronise both clocks with NTP (chrony, systemd-timesyncd)"
    if size_s < 1:
        yield ok("clock", "this machine's clock and the database's agree")
    elif size_s < 60:
        yield warning("clock", f"{shown}; events are delivered by the clock of the database", mend)
    else:
        yield problem("clock", f"{shown}; receivers refuse signatures that seem minutes old", mend)


def _writes(connection: BlockingConnection) -> Iterator[Finding]:
    row = connection.execute("select current_setting('transaction_read_only')::boolean, pg_is_in_recovery()").fetchone()
    assert row is not None
    read_only, standby = row
    if standby:
        mend = "promote it, or name all servers in DATABASE_URL: the one that takes writes is used"
        yield problem("writes", "the database takes no writes: it is a standby", mend)
    elif read_only:
        mend = "alter system reset default_transaction_read_only, and the same for the database and the login"
        yield problem("writes", "the database takes no writes: default_transaction_read_only is on", mend)
    else:
        yield ok("writes", "the database takes writes")


def _roles(connection: BlockingConnection) -> Iterator[Finding]:
    rows = connection.execute("select rolname from pg_roles where rolname = any (%s)", (list(_ROLES),)).fetchall()
    missing = sorted(set(_ROLES) - {str(row[0]) for row in rows})
    if missing:
        yield problem(
            "roles",
            f"these roles are missing: {', '.join(missing)}",
            "run orchestrator migrate as a user who may create roles",
        )
    else:
        yield ok("roles", "all roles exist")


def _migrations(connection: BlockingConnection, settings: Settings) -> Iterator[Finding]:
    try:
        pending = migrate.check(settings.database_url)
    except OrchestratorError as error:
        what, _, mend = str(error).partition("; ")
        yield problem("migrations", what, mend or "see the server's log")
        return
    if pending == ["roles.sql"]:
        yield from _grants(connection)
    elif pending:
        shown = listed(pending[:3], len(pending))
        yield problem("migrations", f"{len(pending)} pending: {shown}", "run orchestrator migrate")
    else:
        yield ok("migrations", "the schema is up to date")


def _grants(connection: BlockingConnection) -> Iterator[Finding]:
    rows = connection.execute("select object, lacking, foreign_rights from orchestrator.changed_rights()").fetchall()
    changes = [
        f"{each}: {what} {', '.join(rights)}"
        for each, lacking, foreign in rows
        for what, rights in (("without", lacking), ("with", foreign))
        if rights
    ]
    shown = "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")
    what = f"rights differ from those that migrate gave, as after pg_restore --no-acl: {shown or 'roles.sql is new'}"
    yield problem("grants", what, "run orchestrator migrate")


def _customer(connection: BlockingConnection, settings: Settings) -> Iterator[Finding]:
    recorded, ours = customer_of(connection), settings.named_customer
    if recorded is None:
        yield ok("customer", "no customer is recorded: any may use this database")
    elif ours in (None, recorded):
        yield ok("customer", f"this is the database of {recorded}")
    else:
        what = f"this is the database of {recorded}, and CUSTOMER_NAME is {ours}: processes do not start"
        mend = f"correct CUSTOMER_NAME or DATABASE_URL; to hand the database over: {handing_over(ours)}"
        yield problem("customer", what, mend)


def _rights(connection: BlockingConnection, settings: Settings) -> Iterator[Finding]:
    row = connection.execute("select current_user, rolsuper from pg_roles where rolname = current_user").fetchone()
    assert row is not None
    user, is_superuser = row
    if is_superuser and is_production(settings):
        yield warning(
            "rights",
            f"{user} is a superuser: a fault in one process could touch everything on the server",
            "create a login for the processes and grant it orchestrator_submit, _dispatch, _read and _ops as needed",
        )
        return
    may = {
        ability: connection.execute(
            "select has_function_privilege(%s::regprocedure, 'execute')", (ABILITIES[ability].function,)
        ).fetchone()
        == (True,)
        for ability in _PARTS
    }
    lacking = [ability for ability, allowed in may.items() if not allowed]
    if lacking:
        roles = ", ".join(ABILITIES[ability].role for ability in lacking)
        yield warning(
            "rights",
            f"{user} may not {', '.join(lacking)}, as orchestrator run must",
            f"grant {roles} to {user}; or leave it, if this login is for other work",
        )
    else:
        yield ok("rights", f"{user} may {', '.join(may)}" + (" (a superuser)" if is_superuser else ""))


def _partitions(connection: BlockingConnection, settings: Settings) -> Iterator[Finding]:
    row = connection.execute(
        "select orchestrator.now() >= first_day and orchestrator.now() < end_day,"
        " extract(epoch from end_day - orchestrator.now())::float8 / 86400, end_day::date::text"
        " from orchestrator.partition_bounds()"
    ).fetchone()
    assert row is not None
    today, days_ahead, end_day = row
    mend = "run orchestrator maintain --once, and make sure that run, maintain, cron or pg_cron does so from now on"
    if not today:
        yield problem("partitions", "there is no partition for today: the first event of each day must make it", mend)
    elif days_ahead < _LEAST_DAYS_AHEAD:
        yield problem("partitions", f"partitions end before {end_day}: later events wait in the horizon", mend)
    elif days_ahead < settings.partition_days_ahead / 2:
        yield warning(
            "partitions",
            f"partitions end before {end_day}, but PARTITION_DAYS_AHEAD is {settings.partition_days_ahead}",
            mend,
        )
    else:
        yield ok("partitions", f"partitions exist for {days_ahead:.0f} days ahead")


def _api_keys(connection: BlockingConnection, settings: Settings) -> Iterator[Finding]:
    row = connection.execute("select orchestrator.count_api_keys()").fetchone()
    count = row[0] if row else 0
    mend = "create one: orchestrator keys create NAME --scope submit"
    if not settings.allow_anonymous and count == 0:
        yield problem(
            "API keys", "there is no key, and anonymous requests are not allowed: the API does not start", mend
        )
    elif settings.allow_anonymous and is_production(settings):
        yield warning("API keys", "ALLOW_ANONYMOUS=true in production: the API needs no key", "unset ALLOW_ANONYMOUS")
    elif settings.allow_anonymous:
        yield ok("API keys", f"no key is needed: anonymous requests are allowed (keys: {count})")
    else:
        yield ok("API keys", f"keys: {count}")
