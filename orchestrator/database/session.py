"""What a connection is opened with: every setting whose foreign value would change what this product does.

A database or a role can be given a default for any of them, and so can libpq's environment. The program therefore
says them all when it connects (``options`` of libpq, at no round trip), or through a pooler at the begin of each
transaction.

Left to whoever runs the server: where and how rows are stored (default_tablespace, default_toast_compression), memory,
costs and parallel workers, synchronous_commit (`orchestrator doctor` says when it is off), who one is (role), and
session_replication_role, which only a superuser can set and nothing here depends on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from psycopg.conninfo import conninfo_to_dict

from orchestrator.settings import forget_session_variables

SESSION: Mapping[str, str] = {
    # How texts are read and written.
    "client_encoding": "UTF8",
    "datestyle": "ISO, MDY",
    "intervalstyle": "postgres",
    "timezone": "UTC",
    "timezone_abbreviations": "Default",
    "bytea_output": "hex",
    "xmlbinary": "base64",
    "extra_float_digits": "1",
    "array_nulls": "on",
    "standard_conforming_strings": "on",
    "backslash_quote": "safe_encoding",
    "transform_null_equals": "off",
    "quote_all_identifiers": "off",
    # What names mean, and what may be read.
    "search_path": "pg_catalog, pg_temp",
    "row_security": "on",
    "restrict_nonsystem_relation_kind": "",
    "default_table_access_method": "heap",  # rows are found by ctid
    "check_function_bodies": "on",
    # Transactions: how they see one another, and how long they may take.
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "transaction_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    # Errors and messages.
    "exit_on_error": "off",
    "client_min_messages": "warning",
    "plpgsql.extra_errors": "none",
    "plpgsql.extra_warnings": "none",
    "orchestrator.now": "",  # the clock, which tests set
    # What the plans of functions rest on, which pin what differs from this.
    "enable_bitmapscan": "on",
    "enable_hashagg": "on",
    "enable_hashjoin": "on",
    "enable_indexonlyscan": "on",
    "enable_indexscan": "on",
    "enable_material": "on",
    "enable_memoize": "on",
    "enable_mergejoin": "on",
    "enable_nestloop": "on",
    "enable_partition_pruning": "on",
    "enable_seqscan": "on",
    "enable_sort": "on",
    "enable_tidscan": "on",
    "plan_cache_mode": "auto",
    "jit": "off",  # nothing here runs long enough to gain by it
    "from_collapse_limit": "8",
    "join_collapse_limit": "8",
    "debug_parallel_query": "off",
}
"""Setting → what it is in every session of the program, unless that asks for something else itself."""

# The server reports this one to the client by itself, no pooler keeps track of it, and it means nothing to a program
# that sets no passwords. So it tells whether the settings above have reached the session.
MARK = ("scram_iterations", "4099")

_CONNECT_TIMEOUT_S = 5
# A peer that vanished is noticed within 20 seconds, in time for a failover; the default is two hours.
_KEEPALIVE = {
    "keepalives_idle": "10",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
}
_OPTION = re.compile(r"(?:-c\s*|--)((?:\\.|[^\s=\\])+)=((?:\\.|[^\s\\])*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Session:
    """How one kind of connection is opened: what DATABASE_URL says, merged with what the program needs."""

    parameters: Mapping[str, Any]
    settings: Mapping[str, str]
    given: Mapping[str, str] = field(default_factory=dict)
    """Settings that the ``options`` of DATABASE_URL ask for."""
    foreign_options: str = ""

    @classmethod
    def of(cls, url: str, role: str, **settings: str) -> Self:
        """`role` shows in pg_stat_activity; `settings` are what this kind of connection asks for itself."""
        forget_session_variables()
        given = {name: str(value) for name, value in conninfo_to_dict(url).items() if value is not None}
        name = given.get("application_name")
        parameters = {
            **{key: given.get(key, value) for key, value in _KEEPALIVE.items()},
            "connect_timeout": _timeout_s(given.get("connect_timeout")),
            "application_name": f"{name} orchestrator {role}" if name else f"orchestrator {role}",
            "client_encoding": SESSION["client_encoding"],
        }
        options = given.get("options", "")
        return cls(parameters, {**SESSION, **settings}, parsed_options(options), options)

    @property
    def options(self) -> str:
        """libpq's ``options``: those of DATABASE_URL first, so that the program's prevail."""
        ours = [f"-c {name}={_escaped(value)}" for name, value in (*self.settings.items(), MARK)]
        # The server ignores a last backslash that escapes nothing; here it would escape the blank that follows it.
        theirs = re.sub(r"(?<!\\)((?:\\\\)*)\\\Z", r"\1", self.foreign_options)
        return " ".join([*filter(None, [theirs]), *ours])

    @property
    def overruled(self) -> dict[str, str]:
        """Settings that DATABASE_URL asks for in vain."""
        return {name: value for name, value in self.given.items() if self.settings.get(name, value) != value}

    @property
    def for_transaction(self) -> str:
        """The same settings as a statement, for the begin of a transaction."""
        asked = {**self.given, **self.settings}
        calls = [
            f"set_config({_literal(name)}, {_literal(value)}, true)"
            for name, value in asked.items()
            if not name.startswith("default_transaction_")
        ]
        return f"select {', '.join(calls)}"


def parsed_options(options: str) -> dict[str, str]:
    """The settings in libpq's ``options``, such as ``-c statement_timeout=5s --geqo=off``, by name in lower case."""
    return {
        re.sub(r"\\(.)", r"\1", name).replace("-", "_").lower(): re.sub(r"\\(.)", r"\1", value)
        for name, value in _OPTION.findall(options)
    }


def _timeout_s(given: str | None) -> int:
    """Waiting for ever, libpq's 0, is not for a program that has to say when its database is away."""
    try:
        seconds = int(given or 0)
    except ValueError:
        seconds = 0
    return seconds if seconds > 0 else _CONNECT_TIMEOUT_S


def _escaped(value: str) -> str:
    return re.sub(r"([\\\s])", r"\\\1", value)


def _literal(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
