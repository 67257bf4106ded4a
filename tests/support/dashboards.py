"""What the dashboards of ops/grafana ask of Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.processes import ROOT

DASHBOARDS = sorted((ROOT / "ops" / "grafana" / "dashboards").glob("*.json"))
SELECTOR = re.compile(r"(?<![\w:])((?:\w+:)?(?:orchestrator|outbox|process)_[\w:]+|ALERTS|up)\b(\{[^}]*\})?")
"""A series in an expression, and its matchers."""


class Asked(NamedTuple):
    """An expression, and where it stands: `overview: Lateness p99`."""

    place: str
    expression: str


def loaded(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def panels(dashboard: Any) -> list[Any]:
    """The panels that show something; headings of rows do not."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def asked(path: Path) -> Iterator[Asked]:
    """Every expression of a dashboard's panels and annotations."""
    dashboard = loaded(path)
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield Asked(f"{path.stem}: {panel['title']} ({target['refId']})", target["expr"])
    for annotation in dashboard["annotations"]["list"]:
        yield Asked(f"{path.stem}: {annotation['name']}", annotation["expr"])


def variables(path: Path) -> Iterator[Asked]:
    """The queries of a dashboard's variables."""
    for variable in loaded(path)["templating"]["list"]:
        if variable["type"] == "query":
            yield Asked(f"{path.stem}: ${variable['name']}", variable["query"]["query"])
