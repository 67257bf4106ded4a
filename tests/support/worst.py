"""The worst that a database, a role or a session of psql can be set to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote, urlsplit, urlunsplit

import psycopg
from psycopg import sql

WORST = {
    "client_encoding": "LATIN1",
    "datestyle": "SQL, DMY",
    "intervalstyle": "sql_standard",
    "timezone": "Asia/Kolkata",
    "timezone_abbreviations": "India",
    "bytea_output": "escape",
    "xmlbinary": "hex",
    "extra_float_digits": "-15",
    "array_nulls": "off",
    "standard_conforming_strings": "off",
    "backslash_quote": "off",
    "transform_null_equals": "on",
    "quote_all_identifiers": "on",
    "search_path": "nowhere",
    "row_security": "off",
    "restrict_nonsystem_relation_kind": "view",
    "default_table_access_method": "other_heap",
    "check_function_bodies": "off",
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "statement_timeout": "1",
    "lock_timeout": "1",
    "transaction_timeout": "1",
    "idle_in_transaction_session_timeout": "1",
    "idle_session_timeout": "1",
    "exit_on_error": "on",
    "client_min_messages": "debug5",
    "plpgsql.extra_errors": "all",
    "plpgsql.extra_warnings": "all",
    "orchestrator.now": "2031-01-01T00:00:00Z",
    "enable_bitmapscan": "off",
    "enable_hashagg": "off",
    "enable_hashjoin": "off",
    "enable_indexonlyscan": "off",
    "enable_indexscan": "off",
    "enable_material": "off",
    "enable_memoize": "off",
    "enable_mergejoin": "off",
    "enable_nestloop": "off",
    "enable_partition_pruning": "off",
    "enable_seqscan": "off",
    "enable_sort": "off",
    "enable_tidscan": "off",
    "plan_cache_mode": "force_custom_plan",
    "jit": "on",
    "from_collapse_limit": "1",
    "join_collapse_limit": "1",
    "debug_parallel_query": "regress",
}

# Of a session that somebody has at a terminal: its own time-outs, plans and messages are its own affair.
WORST_IN_PSQL = {
    name: value
    for name, value in WORST.items()
    if not name.startswith(("enable_", "default_transaction"))
    and not name.endswith(("timeout", "_limit"))
    and name
    not in (
        "orchestrator.now",
        "client_encoding",
        "client_min_messages",
        "restrict_nonsystem_relation_kind",
        "exit_on_error",
    )
}


@contextmanager
def worst_login(url: str) -> Iterator[str]:
    """A superuser of its own on a database where both have `WORST` as their defaults."""
    server = urlsplit(url)
    database, name = server.path.lstrip("/"), f"worst_{server.path.lstrip('/')}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("create access method other_heap type table handler heap_tableam_handler")
        connection.execute(
            sql.SQL("create role {} superuser login password {}").format(sql.Identifier(name), sql.Literal(name))
        )
        for setting, value in WORST.items():
            for whom in ("database {database}", "role {role} in database {database}"):
                connection.execute(
                    sql.SQL(f"alter {whom} set {{setting}} = {{value}}").format(
                        database=sql.Identifier(database),
                        role=sql.Identifier(name),
                        setting=sql.SQL(setting),
                        value=sql.SQL(value if "," in value else f"'{value}'"),
                    )
                )
        try:
            yield urlunsplit(server._replace(netloc=f"{quote(name)}:{quote(name)}@{server.hostname}:{server.port}"))
        finally:
            for setting in WORST:
                connection.execute(
                    sql.SQL("alter database {} reset {}").format(sql.Identifier(database), sql.SQL(setting))
                )
            connection.execute(sql.SQL("reassign owned by {} to current_user").format(sql.Identifier(name)))
            connection.execute(sql.SQL("drop owned by {}").format(sql.Identifier(name)))
            connection.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))
