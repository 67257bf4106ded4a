"""The files of ops/deployments: each is valid, has the values that its customer had before, and fits its servers."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.doctor.server import OWN_CONNECTIONS
from orchestrator.settings import Settings
from orchestrator.settings.env_file import read_env_file
from tests.integration.cli_support import answer, invoke
from tests.support.processes import ROOT

FILES = sorted((ROOT / "ops" / "deployments").glob("*.env"))
REPLICAS = 3
OTHERS = 11  # migrate, doctor, backups and people
RESERVED = 3  # superuser_reserved_connections
EVENTS_A_DAY = 10_000_000

CUSTOMERS: dict[str, tuple[int, int, int, int, int, int, int]] = {
    "ocean": (8080, 1000, 3000, 15, 20, 50, 15),
    "air": (8081, 750, 4000, 12, 15, 40, 12),
    "rail": (8082, 600, 5000, 10, 12, 35, 10),
    "coretrac": (8083, 1500, 2000, 20, 25, 60, 20),
}
TOPICS = {
    "submission": "event.submissions",
    "scheduled": "event.scheduled",
    "ready": "event.ready",
    "timestamp": "timestamp.processing",
    "processing": "process-kafka-message",
    "dlq": "event.dlq",
}


def path_of(name: str) -> Path:
    return ROOT / "ops" / "deployments" / f"{name}.env"


def settings_of(name: str) -> Settings:
    return Settings.from_env(read_env_file(path_of(name)), elsewhere=True)


def test_there_is_a_file_for_each_deployment() -> None:
    assert {path.stem for path in FILES} == {*CUSTOMERS, "onboarding", "school", "inventory"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_passes_the_check_and_what_is_remarked_on_has_a_reason(path: Path) -> None:
    told = answer(invoke("config", "check", "--env-file", str(path), "--json"))
    for notice in told["notices"]:
        assert "no effect; " in notice or "does not exist; mount the secret there" in notice
    assert told["settings"]["CUSTOMER_NAME"]["value"] == path.stem
    assert told["settings"]["DEPLOYMENT_NAME"]["value"] == f"event-scheduler-{path.stem}"
    assert told["settings"]["ENVIRONMENT"]["value"] == "production"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_holds_no_secret_and_means_the_same_to_every_program_that_reads_it(path: Path) -> None:
    for name, value in read_env_file(path).items():
        assert not re.search("PASSWORD$|SECRET|JAAS|TOKEN|_KEY$", name), name
        assert not re.search(r"[\"'`$\\#\s]|//[^/]*@", value), name
    assert all(line.isascii() for line in path.read_text().splitlines())


@pytest.mark.parametrize("name", CUSTOMERS)
def test_a_customer_of_the_shared_binary_has_the_values_it_had(name: str) -> None:
    port, batch, interval_ms, concurrency, parallel, most, idle = CUSTOMERS[name]
    settings = settings_of(name)
    assert settings.server_port == port
    assert (settings.batch_size, settings.poll_interval_s) == (batch, interval_ms / 1000)
    assert (settings.kafka_concurrency, settings.customer_max_parallel) == (concurrency, parallel)
    assert (settings.pool_max_size, settings.pool_min_idle) == (most, idle)
    assert settings.database_url.endswith(f"/{name}_events_db")
    variables = read_env_file(path_of(name))
    assert variables["DATABASE_URL"].startswith("jdbc:postgresql://")
    assert variables.keys() >= {"DATABASE_USERNAME", "KAFKA_STREAMS_APP_ID", "REDIS_HOST", "LOG_LEVEL", "LOG_FILE"}
    for topic, tail in TOPICS.items():
        assert getattr(settings, f"topic_{topic}") == variables[f"KAFKA_TOPIC_{topic.upper()}"] == f"{name}.{tail}"


def test_no_two_deployments_share_a_database_a_topic_or_a_group() -> None:
    everything = [settings_of(path.stem) for path in FILES]
    shared: dict[str, list[Any]] = {
        "database": [each.database_url for each in everything],
        "group": [each.kafka_group for each in everything],
        "deployment": [each.deployment for each in everything],
        "topic": [getattr(each, f"topic_{topic}") for each in everything for topic in (*TOPICS, "answers")],
    }
    for what, values in shared.items():
        assert len(values) == len(set(values)), what


def most_connections(settings: Settings) -> int:
    """What one process of `orchestrator run` can open."""
    return settings.pool_max_size + settings.kafka_concurrency + OWN_CONNECTIONS


def table() -> dict[str, list[int]]:
    """The table of the README: customer → its numbers."""
    text = (ROOT / "ops" / "deployments" / "README.md").read_text()
    rows = re.findall(r"^\| (\w+) ((?:\| [\d,]+ )+)\|$", text, re.MULTILINE)
    return {name: [int(cell.replace(",", "")) for cell in cells.strip("| ").split(" | ")] for name, cells in rows}


def test_the_table_of_sizes_says_what_the_settings_give() -> None:
    documented = table()
    assert documented.keys() == CUSTOMERS.keys()
    for name, row in documented.items():
        settings = settings_of(name)
        assert settings.poll_interval_s is not None
        connections = most_connections(settings)
        per_s = 2 * settings.batch_size / settings.poll_interval_s
        assert row == [
            connections,
            connections * (REPLICAS + 1),
            connections * (REPLICAS + 1) + RESERVED + OTHERS,
            settings.kafka_concurrency * REPLICAS,
            settings.kafka_partitions,
            round(per_s),
            math.floor(per_s * 86_400),
        ], name


@pytest.mark.parametrize("name", CUSTOMERS)
def test_the_sizes_of_a_customer_fit_its_load(name: str) -> None:
    settings = settings_of(name)
    assert settings.poll_interval_s is not None
    assert settings.kafka_concurrency * REPLICAS <= settings.kafka_partitions
    assert settings.kafka_partitions % REPLICAS == 0
    assert settings.batch_size / settings.poll_interval_s * 86_400 > EVENTS_A_DAY
