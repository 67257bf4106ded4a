"""What doctor says of the numbers that alerts watch."""

from __future__ import annotations

import pytest
from psycopg import sql

from orchestrator.database.connection import connect_blocking
from orchestrator.doctor.vital_signs import vital_sign_findings


def diagnosed(database_url: str) -> dict[str, tuple[str, str]]:
    with connect_blocking(database_url, "doctor") as connection:
        return {found.check: (found.level, found.what) for found in vital_sign_findings(connection)}


def test_a_fresh_database_is_well(database_url: str) -> None:
    found = diagnosed(database_url)
    assert {check: level for check, (level, _) in found.items()} == {
        "timers": "ok",
        "sessions": "ok",
        "statistics": "ok",
    }


@pytest.mark.parametrize(
    ("timers", "dead", "connections", "warned"),
    [
        (100, 200_001, 10, {"timers"}),
        (1_000_000, 900_000, 10, set()),
        (100, 100_000, 91, {"sessions"}),
        (0, 0, 90, set()),
    ],
)
def test_bloat_and_a_server_short_of_connections_are_named(
    database_url: str, timers: int, dead: int, connections: int, warned: set[str]
) -> None:
    with connect_blocking(database_url, "test") as connection:
        connection.execute("drop function orchestrator.vital_signs()")
        connection.execute(
            sql.SQL(
                "create function orchestrator.vital_signs(out a float8, out b float8, out c bigint, out d bigint,"
                " out e bigint, out f bigint, out g bigint, out h bigint, out i bigint)"
                " language sql as $$ select 0, 0, 0, {}::bigint, {}::bigint, 0, 0, {}::bigint, 100 $$"
            ).format(timers, dead, connections)
        )
    found = diagnosed(database_url)
    assert {check for check, (level, _) in found.items() if level == "warning"} == warned


def test_an_owner_who_sees_no_sessions_of_others_is_named(database_url: str) -> None:
    with connect_blocking(database_url, "test") as connection:
        [database] = connection.execute("select current_database()").fetchone() or [""]
        owner = f"owner_of_{database}"
        connection.execute(sql.SQL("create role {}").format(sql.Identifier(owner)))
        connection.execute(sql.SQL("alter schema orchestrator owner to {}").format(sql.Identifier(owner)))
        try:
            level, what = diagnosed(database_url)["statistics"]
        finally:
            connection.execute("alter schema orchestrator owner to current_user")
            connection.execute(sql.SQL("drop role {}").format(sql.Identifier(owner)))
    assert level == "warning"
    assert owner in what
