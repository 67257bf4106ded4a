"""Panels, in the JSON that Grafana keeps.

Expressions are short: each selector `x{…}` gets the filters of the dashboard's variables, `by(…)` the labels of a
deployment, and `[]` is the range that Grafana chooses for a rate. So `sum by() (rate(x_total{}[]))` is a whole query.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

Json = dict[str, Any]

IDENTITY = ("deployment", "customer", "environment")
FILTERS = ",".join(f'{label}=~"${label}"' for label in IDENTITY)
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
EACH = "{{deployment}} {{environment}}"
"""The legend of a series of one deployment."""
_SELECTOR = re.compile(r"(?<=\w)\{([^}]*)\}")
_BY = re.compile(r"\bby\(([^)]*)\)")


class Query(NamedTuple):
    expression: str
    legend: str = EACH


class Limits(NamedTuple):
    """Where a value becomes orange and red; `low`: below them, not above."""

    orange: float
    red: float
    low: bool = False

    @property
    def steps(self) -> list[Json]:
        if self.low:
            colours: list[tuple[str, float | None]] = [("red", None), ("orange", self.red), ("green", self.orange)]
        else:
            colours = [("green", None), ("orange", self.orange), ("red", self.red)]
        return [{"color": colour, "value": value} for colour, value in colours]


class Panel(NamedTuple):
    """A panel that has no place yet: its size, and its JSON without id and position."""

    width: int
    height: int
    json: Json


def expanded(expression: str) -> str:
    """An expression as Prometheus and Grafana take it."""
    filtered = _SELECTOR.sub(lambda found: f"{{{','.join(filter(None, (FILTERS, found[1])))}}}", expression)
    grouped = _BY.sub(lambda found: f"by ({', '.join(filter(None, (*IDENTITY, found[1])))})", filtered)
    return grouped.replace("[]", "[$__rate_interval]")


def quantiles(series: str, *labels: str) -> list[Query]:
    """The queries for p50, p95 and p99 of a histogram, for each value of the labels."""
    legend = " ".join(f"{{{{{label}}}}}" for label in labels)
    by = ", ".join(("le", *labels))
    return [
        Query(
            f"histogram_quantile(0.{percent}, sum by ({by}) (rate({series}_bucket{{}}[])))",
            f"p{percent} {legend}".strip(),
        )
        for percent in (50, 95, 99)
    ]


def stat(
    title: str,
    about: str,
    unit: str,
    expression: str,
    limits: Limits | None = None,
    *,
    runbook: str | None = None,
    **more: Any,
) -> Panel:
    """One number, with its course behind it; `runbook` is the alert that it has to do with, `more` go to the field."""
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value" if limits is None else "background",
        "graphMode": "area",
        "justifyMode": "center",
        "textMode": "auto",
        "orientation": "auto",
    }
    field = {"color": {"mode": "thresholds"}, "thresholds": _thresholds(limits), "noValue": "–"} | more
    return _panel("stat", title, about, unit, [Query(expression, "")], (3, 4), field, options, runbook)


def lines(
    title: str,
    about: str,
    unit: str,
    *queries: Query,
    limits: Limits | None = None,
    stacked: bool = False,
    width: int = 8,
    runbook: str | None = None,
) -> Panel:
    """Values over time; with limits, dashed lines show them."""
    custom: Json = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 30 if stacked else 8,
        "showPoints": "never",
        "stacking": {"group": "A", "mode": "normal" if stacked else "none"},
        "thresholdsStyle": {"mode": "off" if limits is None else "dashed"},
    }
    field = {
        "color": {"mode": "palette-classic"},
        "custom": custom,
        "min": 0,
        "thresholds": _thresholds(limits),
    }
    options = {
        "legend": {"showLegend": True, "displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return _panel("timeseries", title, about, unit, queries, (width, 9), field, options, runbook)


def heat_map(title: str, about: str, unit: str, expression: str) -> Panel:
    """How many values of a histogram fell into each bucket, over time."""
    options = {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64, "exponent": 0.4, "fill": "dark-orange"},
        "filterValues": {"le": 1e-9},
        "rowsFrame": {"layout": "auto"},
        "showValue": "never",
        "legend": {"show": True},
        "tooltip": {"mode": "single", "yHistogram": True},
        "yAxis": {"axisPlacement": "left", "reverse": False, "unit": unit},
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
    }
    query = Query(expression, "{{le}}")
    return _panel("heatmap", title, about, "short", [query], (12, 9), {}, options, format="heatmap")


def table(title: str, about: str, unit: str, expression: str, *hidden: str) -> Panel:
    """What holds now, a row for each series; labels are columns, but for the hidden ones."""
    options = {"showHeader": True, "cellHeight": "sm", "footer": {"show": False, "reducer": ["sum"], "fields": ""}}
    excluded = dict.fromkeys(("Time", "__name__", "job", *hidden), True)
    panel = _panel(
        "table", title, about, unit, [Query(expression, "")], (12, 9), {"noValue": "none"}, options,
        format="table", instant=True, range=False,
    )  # fmt: skip
    panel.json["transformations"] = [{"id": "organize", "options": {"excludeByName": excluded}}]
    return panel


def _thresholds(limits: Limits | None) -> Json:
    return {"mode": "absolute", "steps": [{"color": "green", "value": None}] if limits is None else limits.steps}


def _panel(
    kind: str,
    title: str,
    about: str,
    unit: str,
    queries: list[Query] | tuple[Query, ...],
    size: tuple[int, int],
    field: Json,
    options: Json,
    runbook: str | None = None,
    **of_target: Any,
) -> Panel:
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": DATASOURCE,
            "editorMode": "code",
            "expr": expanded(query.expression),
            "legendFormat": query.legend,
            "range": True,
            "instant": False,
        }
        | of_target
        for number, query in enumerate(queries)
    ]
    json: Json = {
        "type": kind,
        "title": title,
        "description": about,
        "datasource": DATASOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": unit} | field, "overrides": []},
        "options": options,
    }
    if runbook is not None:
        json["links"] = [
            {"title": f"Runbook: {runbook}", "url": f"${{runbooks}}/{runbook}.md", "targetBlank": True},
        ]
    return Panel(*size, json)
