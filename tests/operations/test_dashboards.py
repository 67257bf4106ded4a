"""The dashboards of Grafana: current, complete, and about series that the program has."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from ops.grafana.generate import DIRECTORY, files
from tests.support.dashboards import DASHBOARDS, SELECTOR, asked, loaded, panels, variables
from tests.support.processes import ROOT

IDENTITY = ("deployment", "customer", "environment")
FILTERS = [f'{label}=~"${label}"' for label in IDENTITY]
COLUMNS = 24
BUILT_IN = {"stat", "timeseries", "heatmap", "table"}
OF_PROMETHEUS = {"ALERTS": {"alertname", "alertstate", "severity"}}
OF_THE_CLIENT = re.compile(r"process_(cpu_seconds_total|resident_memory_bytes|open_fds|max_fds|start_time_seconds)")
_DOCUMENTED = re.compile(r"^\| `(\w+)` \| (\w+) \| ([^|]*) \|", re.MULTILINE)
_MATCHER = re.compile(r"(\w+)(?:=~|!~|!=|=)\"")
_BY = re.compile(r"\bby \(([^)]*)\)")

each_dashboard = pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)


def documented() -> dict[str, set[str]]:
    """Series of docs/reference/metrics.md, each with its own labels; of a histogram, all that it has."""
    found: dict[str, set[str]] = {}
    text = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    for name, kind, labels in _DOCUMENTED.findall(text):
        own = set(re.findall(r"\w+", labels))
        if kind == "histogram":
            found |= {f"{name}_bucket": {*own, "le"}, f"{name}_sum": own, f"{name}_count": own}
        else:
            found[name] = own
    return found


def labels_of(series: str) -> set[str]:
    """The labels that a series may be asked for by."""
    own = OF_PROMETHEUS.get(series)
    if own is None:
        own = set() if OF_THE_CLIENT.fullmatch(series) else documented()[series]
    return {*own, *IDENTITY, "instance"}


def test_the_dashboards_are_as_the_generator_writes_them() -> None:
    written = {path.name: path.read_text(encoding="utf-8") for path in DIRECTORY.iterdir()}
    stale = [name for name, text in files().items() if written.pop(name, None) != text]
    assert (stale, written) == ([], {}), "run: .venv/bin/python -m ops.grafana.generate"


@each_dashboard
def test_a_dashboard_can_be_linked_to_and_needs_no_plugin(path: Path) -> None:
    dashboard = loaded(path)
    assert dashboard["uid"] == f"orchestrator-{path.stem}"
    assert (dashboard["timezone"], dashboard["schemaVersion"]) == ("browser", 41)
    assert {panel["type"] for panel in panels(dashboard)} <= BUILT_IN
    ids = [panel["id"] for panel in dashboard["panels"]]
    titles = [panel["title"] for panel in panels(dashboard)]
    assert len(set(ids)) == len(ids)
    assert len(set(titles)) == len(titles)
    [link] = dashboard["links"]
    assert set(link["tags"]) <= set(dashboard["tags"])
    assert link["includeVars"]
    assert link["keepTime"]


def test_no_two_dashboards_have_the_same_address() -> None:
    uids = [loaded(path)["uid"] for path in DASHBOARDS]
    assert len(set(uids)) == len(uids) == 4


@each_dashboard
def test_no_panel_lies_over_another_or_out_of_sight(path: Path) -> None:
    places = [panel["gridPos"] for panel in loaded(path)["panels"]]
    assert [place for place in places if place["x"] + place["w"] > COLUMNS] == []
    overlapping = [
        (one, other)
        for one, other in itertools.combinations(places, 2)
        if one["x"] < other["x"] + other["w"]
        and other["x"] < one["x"] + one["w"]
        and one["y"] < other["y"] + other["h"]
        and other["y"] < one["y"] + one["h"]
    ]
    assert overlapping == []


@each_dashboard
def test_a_panel_says_what_it_shows_and_in_which_unit(path: Path) -> None:
    for panel in panels(loaded(path)):
        about = panel["description"]
        assert re.fullmatch(r"[^ ].{15,300}\.", about), f"{panel['title']}: {about!r}"
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]


@each_dashboard
def test_a_query_asks_only_for_what_the_variables_have_chosen(path: Path) -> None:
    for place, expression in asked(path):
        selectors = SELECTOR.findall(expression)
        assert selectors, place
        for series, matchers in selectors:
            assert [each for each in FILTERS if each not in matchers] == [], f"{place}: {series}{matchers}"


@each_dashboard
def test_a_query_names_series_and_labels_that_there_are(path: Path) -> None:
    for place, expression in [*asked(path), *variables(path)]:
        labels: set[str] = set()
        for series, matchers in SELECTOR.findall(expression):
            assert set(_MATCHER.findall(matchers)) <= labels_of(series), f"{place}: {series}{matchers}"
            labels |= labels_of(series)
        grouped = {label for listed in _BY.findall(expression) for label in listed.split(", ")}
        assert grouped <= labels, f"{place}: {grouped - labels}"


@each_dashboard
def test_a_legend_names_labels_that_its_query_leaves(path: Path) -> None:
    for panel in panels(loaded(path)):
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            grouped = _BY.findall(target["expr"])
            left = set(grouped[0].split(", ")) if grouped else None
            assert left is None or named <= left, f"{panel['title']}: {named - left}"


@each_dashboard
def test_the_variables_narrow_one_another_and_choose_all_at_first(path: Path) -> None:
    by_name: dict[str, Any] = {each["name"]: each for each in loaded(path)["templating"]["list"]}
    for number, label in enumerate(IDENTITY):
        variable = by_name[label]
        assert (variable["multi"], variable["includeAll"], variable["allValue"]) == (True, True, ".*")
        assert variable["current"]["value"] == ["$__all"]
        query = variable["query"]["query"]
        assert query.endswith(f", {label})")
        assert [each for each in FILTERS if each in query] == FILTERS[:number]
    assert by_name["datasource"]["query"] == "prometheus"


@each_dashboard
def test_a_panel_links_to_runbooks_that_there_are(path: Path) -> None:
    links = [link for panel in panels(loaded(path)) for link in panel.get("links", ())]
    assert len(links) > 5
    for link in links:
        name = link["url"].removeprefix("${runbooks}/")
        assert (ROOT / "ops" / "runbooks" / name).is_file(), link["url"]
        assert link["title"] == f"Runbook: {name.removesuffix('.md')}"
