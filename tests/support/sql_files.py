"""The files of SQL, in the order in which they are applied."""

from __future__ import annotations

from pathlib import Path

from tests.support.processes import ROOT


def _relative(*paths: Path) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


SQL_FILES = _relative(
    *sorted((ROOT / "sql" / "schema").glob("*.sql")),
    *sorted((ROOT / "sql" / "functions").glob("*.sql")),
    *sorted((ROOT / "sql" / "views").glob("*.sql")),
    ROOT / "sql" / "roles.sql",
    *sorted((ROOT / "ops").glob("*.sql")),
)
