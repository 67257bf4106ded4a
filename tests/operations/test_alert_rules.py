"""Alert rules: valid, tested firing and not firing, about series that exist, and each with its runbook."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from orchestrator.metrics import Metrics
from orchestrator.settings import Settings
from tests.support.processes import ROOT
from tests.support.tools import tool

PROMETHEUS = ROOT / "ops/prometheus"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
RUNBOOKS = ROOT / "ops/runbooks"
SEVERITIES = {"page", "ticket"}
WHO = {"deployment", "customer", "environment"}
WITHOUT_DEPLOYMENT = {"NothingScraped", "InstanceDown"}
"""Alerts about targets, of which Prometheus knows no more than the address."""

_NAME = re.compile(r"(?<![\w:\"])(?:up|(?:orchestrator|outbox|process)_[a-z0-9_]+)\b(?![\w:(\"])")


def documents(paths: list[Path]) -> dict[str, Any]:
    return {path.stem: msgspec.yaml.decode(path.read_bytes()) for path in paths}


def rules() -> list[dict[str, Any]]:
    return [rule for document in documents(RULES).values() for group in document["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
each_alert = pytest.mark.parametrize("name", sorted(ALERTS))


def checks() -> Iterator[tuple[str, bool]]:
    """Of each check of an alert in the unit tests: its name, and whether it must fire."""
    for document in documents(TESTS).values():
        for test in document["tests"]:
            for check in test["alert_rule_test"]:
                yield check["alertname"], bool(check["exp_alerts"])


def known_series() -> set[str]:
    """Every series of docs/reference/metrics.md, as queries name it."""
    known: set[str] = set()
    for line in (ROOT / "docs/reference/metrics.md").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"\| `(\w+)` \| (\w+) \|", line):
            name, kind = found.groups()
            known |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    assert len(known) > 50
    return known


def test_promtool_accepts_every_file_of_rules() -> None:
    assert RULES
    checked = subprocess.run([tool("promtool"), "check", "rules", *RULES], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "FAILED" not in checked.stdout + checked.stderr


@pytest.mark.parametrize("file", TESTS, ids=lambda path: path.stem)
def test_the_alerts_fire_when_they_should_and_only_then(file: Path) -> None:
    tested = subprocess.run(
        [tool("promtool"), "test", "rules", file.name], cwd=file.parent, capture_output=True, text=True, check=False
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_file_of_rules_is_tested() -> None:
    assert [path.name for path in TESTS] == [path.name for path in RULES]


@each_alert
def test_each_alert_is_tested_both_firing_and_not_firing(name: str) -> None:
    assert {fires for alert, fires in checks() if alert == name} == {True, False}


def test_the_unit_tests_name_no_alert_that_does_not_exist() -> None:
    assert {name for name, _ in checks()} == ALERTS.keys()


def test_no_two_alerts_share_a_name() -> None:
    names = [rule["alert"] for rule in rules() if "alert" in rule]
    assert sorted(names) == sorted(set(names))


@each_alert
def test_each_alert_says_how_urgent_it_is_what_happened_to_whom_and_where_its_runbook_is(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in SEVERITIES
    told = rule["annotations"]
    assert told.keys() == {"summary", "description", "runbook_url"}
    assert told["runbook_url"] == f"ops/runbooks/{name}.md"
    if name not in WITHOUT_DEPLOYMENT:
        assert {label for label in WHO if f"$labels.{label}" in told["summary"]} == WHO
        assert all(label in rule["expr"] for label in WHO)


@each_alert
def test_each_alert_has_a_runbook_in_which_all_questions_are_answered(name: str) -> None:
    text = (RUNBOOKS / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        "What it means", "First look", "Remedy", "It is over when", "False alarms",
    ]  # fmt: skip
    assert ("A page: act now." in text) == (ALERTS[name]["labels"]["severity"] == "page")


def test_the_index_lists_every_runbook_and_its_urgency() -> None:
    assert {path.stem for path in RUNBOOKS.glob("*.md")} - {"README"} == ALERTS.keys()
    listed = re.findall(
        r"^\| \[(\w+)\]\(\1\.md\) \| (\w+) \|", (RUNBOOKS / "README.md").read_text(encoding="utf-8"), re.M
    )
    assert sorted(listed) == sorted((name, rule["labels"]["severity"]) for name, rule in ALERTS.items())


def test_rules_use_only_series_that_exist() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    known = known_series() | {"up"}
    unknown = {}
    for rule in rules():
        used = set(_NAME.findall(rule["expr"]))
        assert used or any(name in rule["expr"] for name in recorded), rule["expr"]
        if missing := used - known:
            unknown[rule.get("alert", rule.get("record"))] = missing
        assert set(re.findall(r"deployment:\w+:\w+", rule["expr"])) <= recorded
    assert unknown == {}


def test_a_series_that_does_not_exist_would_be_found() -> None:
    assert set(_NAME.findall('max(orchestrator_no_such_thing{up="x"}) > 0 and up == 1')) == {
        "orchestrator_no_such_thing",
        "up",
    }


@each_alert
def test_what_every_process_tells_of_the_database_is_never_added_up(name: str) -> None:
    shared = {"due_oldest", "dead_letters", "database_up", "xmin_horizon", "timer_rows", "outbox_event", "paused"}
    for part in shared:
        assert not re.search(rf"(sum|count)[^()]*\([^()]*\)\s*\((?:outbox|orchestrator)_{part}", ALERTS[name]["expr"])


def test_promtool_finds_nothing_wrong_with_the_metrics_but_what_is_meant() -> None:
    metrics = Metrics(Settings.from_env({}), "run")
    metrics.events_received_total("http").inc()
    metrics.destination_attempts_total.count("HTTP", "receiver.example", "delivered")
    metrics.set_vital_signs(None)
    text, _ = metrics.exposition()
    checked = subprocess.run([tool("promtool"), "check", "metrics"], input=text, capture_output=True, check=False)
    found = {line.strip() for line in (checked.stdout + checked.stderr).decode().splitlines() if line.strip()}
    assert found == {
        # Days are what partitions are made by.
        'orchestrator_partition_days_ahead use base unit "seconds" instead of "days"',
        # Its help says why.
        'outbox_event_pending_total non-counter metrics should not have "_total" suffix',
    }
