"""Writes docs/reference from what it is about: `make docs`, or ``python -m docs.generate``.

The pages come from the OpenAPI document, the catalog of a migrated database, the commands, the settings and the
metrics, so that each is said in one place. tests/docs/test_reference.py fails when a page is stale.
"""

from __future__ import annotations

from pathlib import Path

from docs.generate import api, cli, metrics, settings, sql

DIRECTORY = Path(__file__).parents[1] / "reference"


def pages(database_url: str) -> dict[str, str]:
    """Name of each file in docs/reference and what it should hold. The database must be migrated."""
    return {
        "api.md": api.page(),
        "cli.md": cli.page(),
        "metrics.md": metrics.page(),
        "settings.md": settings.page(),
        "sql.md": sql.page(database_url),
    }
