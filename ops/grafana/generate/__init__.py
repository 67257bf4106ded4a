"""Writes ops/grafana/dashboards: ``python -m ops.grafana.generate``.

A dashboard is rows of panels. Each module here says what one of them shows; panels.py and dashboard.py know Grafana's
JSON. tests/operations/test_dashboards.py fails while a file is stale.
"""

from __future__ import annotations

import json
from pathlib import Path

from ops.grafana.generate import database, destinations, ingestion, overview

DIRECTORY = Path(__file__).parents[1] / "dashboards"


def files() -> dict[str, str]:
    """Name of each file in ops/grafana/dashboards and what it should hold."""
    return {
        f"{module.__name__.rpartition('.')[2]}.json": json.dumps(module.content(), indent=2, ensure_ascii=False) + "\n"
        for module in (overview, ingestion, destinations, database)
    }
