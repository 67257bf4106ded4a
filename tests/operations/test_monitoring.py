"""The configuration of Prometheus, Alertmanager and Grafana, as these programs and one another see it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.monitoring import ALERTMANAGER, OPS, PROMETHEUS, read_yaml
from tests.support.processes import ROOT
from tests.support.tools import tool


def run(*command: str | Path) -> str:
    """What a checker says; fails the test with it when the checker finds fault."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def alerts() -> dict[str, str]:
    """The alerts of all rules, each with its severity."""
    return {
        rule["alert"]: rule["labels"]["severity"]
        for path in (OPS / "prometheus" / "rules").glob("*.yml")
        for group in read_yaml(path)["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }


def test_prometheus_takes_its_configuration_and_all_rules() -> None:
    said = run(tool("promtool"), "check", "config", PROMETHEUS)
    assert [path for path in OPS.glob("prometheus/rules/*.yml") if path.name not in said] == []


def test_prometheus_is_told_of_every_container_that_serves_metrics() -> None:
    [job] = [each for each in read_yaml(PROMETHEUS)["scrape_configs"] if each["job_name"] == "orchestrator"]
    [source] = job["dns_sd_configs"]
    services = read_yaml(ROOT / "docker-compose.yml")["services"]
    serving = {name for name, service in services.items() if {"run", "api"} & {*service.get("command", ())}}
    assert (set(source["names"]), source["port"]) == (serving, 9080)


def test_alertmanager_takes_its_configuration() -> None:
    said = run(tool("amtool"), "check-config", ALERTMANAGER)
    assert "2 receivers" in said


@pytest.mark.parametrize("severity", ["page", "ticket"])
def test_an_alert_goes_to_the_receiver_of_its_severity(severity: str) -> None:
    receiver = run(tool("amtool"), "config", "routes", "test", f"--config.file={ALERTMANAGER}", f"severity={severity}")
    assert receiver.strip() == severity


def test_every_alert_has_a_severity_that_alertmanager_routes() -> None:
    receivers = {each["name"] for each in read_yaml(ALERTMANAGER)["receivers"]}
    assert alerts()
    assert set(alerts().values()) <= receivers


def test_an_inhibition_names_alerts_that_there_are_and_only_of_the_same_deployment() -> None:
    rules = read_yaml(ALERTMANAGER)["inhibit_rules"]
    assert rules
    for rule in rules:
        named = re.findall(r"[A-Z]\w+", " ".join([*rule["source_matchers"], *rule["target_matchers"]]))
        assert [name for name in named if name not in alerts()] == []
        assert rule["equal"] == ["deployment", "customer", "environment"]


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    sources = read_yaml(OPS / "grafana" / "provisioning" / "datasources" / "prometheus.yml")["datasources"]
    assert {each["uid"]: each["type"] for each in sources} == {
        "orchestrator-prometheus": "prometheus",
        "orchestrator-alertmanager": "alertmanager",
    }
    [provider] = read_yaml(OPS / "grafana" / "provisioning" / "dashboards" / "orchestrator.yml")["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    interval = read_yaml(PROMETHEUS)["global"]["scrape_interval"]
    assert sources[0]["jsonData"]["timeInterval"] == interval
