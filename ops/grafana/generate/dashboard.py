"""A dashboard, in the JSON that Grafana keeps: places for its panels, variables, links and annotations."""

from __future__ import annotations

from ops.grafana.generate.panels import DATASOURCE, IDENTITY, Json, Panel, expanded

TAG = "orchestrator"
RUNBOOKS = "https://git.example.com/scheduled-event-orchestrator/ops/runbooks"
"""Where the runbooks can be read. Every installation has its own place, and sets the variable `runbooks` to it."""
_SCHEMA = 41  # of Grafana 12; newer servers convert it when they read it
_COLUMNS = 24


class Row:
    """Panels under a heading, from left to right and then downwards."""

    def __init__(self, title: str, *panels: Panel) -> None:
        self.title = title
        self.panels = panels


def dashboard(name: str, about: str, *rows: Row, by: tuple[str, ...] = ()) -> Json:
    """`by` are labels with a variable of their own, beside those of every dashboard."""
    return {
        "uid": f"orchestrator-{name}",
        "title": f"Orchestrator {name}",
        "description": about,
        "tags": [TAG],
        "schemaVersion": _SCHEMA,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [*_variables(), *(_variable(label, (*IDENTITY,)) for label in by), _runbooks()]},
        "annotations": {"list": [_ALERTS, _STARTS]},
        "links": [_dashboards()],
        "panels": _placed(rows),
    }


def _placed(rows: tuple[Row, ...]) -> list[Json]:
    placed: list[Json] = []
    y = 0
    for row in rows:
        placed.append(
            {
                "id": len(placed) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": _COLUMNS, "h": 1},
                "panels": [],
            }
        )
        y += 1
        x = height = 0
        for panel in row.panels:
            if x + panel.width > _COLUMNS:
                x, y, height = 0, y + height, 0
            place = {"x": x, "y": y, "w": panel.width, "h": panel.height}
            placed.append({"id": len(placed) + 1, **panel.json, "gridPos": place})
            x, height = x + panel.width, max(height, panel.height)
        y += height
    return placed


def _variables() -> list[Json]:
    chosen = {"text": "default", "value": "default"}
    source = {
        "name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "regex": "",
        "refresh": 1, "multi": False, "includeAll": False, "hide": 0, "current": chosen, "options": [],
    }  # fmt: skip
    return [source, *(_variable(label, IDENTITY[:number]) for number, label in enumerate(IDENTITY))]


def _variable(label: str, within: tuple[str, ...]) -> Json:
    """The values of a label, of what the variables before it leave."""
    series = "orchestrator_build_info" if label in IDENTITY else f"orchestrator_{label}_attempts_total"
    filters = ",".join(f'{other}=~"${other}"' for other in within)
    query = f"label_values({series}{{{filters}}}, {label})" if filters else f"label_values({series}, {label})"
    return {
        "name": label,
        "label": label.capitalize(),
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
        "regex": "",
        "hide": 0,
        "options": [],
    }


def _runbooks() -> Json:
    chosen = {"text": RUNBOOKS, "value": RUNBOOKS}
    return {
        "name": "runbooks", "label": "Runbooks at", "type": "textbox", "query": RUNBOOKS, "current": chosen,
        "options": [chosen | {"selected": True}], "hide": 2,
    }  # fmt: skip


def _dashboards() -> Json:
    return {
        "type": "dashboards", "title": "Orchestrator", "tags": [TAG], "asDropdown": False, "includeVars": True,
        "keepTime": True, "targetBlank": False, "icon": "external link", "tooltip": "", "url": "",
    }  # fmt: skip


_ALERTS: Json = {
    "name": "Alerts",
    "datasource": DATASOURCE,
    "enable": True,
    "iconColor": "red",
    "expr": expanded('ALERTS{alertstate="firing"}'),
    "step": "60s",
    "titleFormat": "{{alertname}}",
    "textFormat": "{{severity}} {{deployment}} {{environment}}",
}
_STARTS: Json = {
    "name": "Starts of processes",
    "datasource": DATASOURCE,
    "enable": True,
    "iconColor": "blue",
    "expr": expanded("process_start_time_seconds{} * 1000"),
    "useValueForTime": True,
    "step": "60s",
    "titleFormat": "Started: {{instance}}",
    "textFormat": "{{deployment}} {{environment}}",
}
