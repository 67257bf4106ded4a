"""ops/terraform: its form, and what it says to PostgreSQL; tests/drills plans it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from orchestrator.database.connection import connect_blocking
from orchestrator.dev.postgres import EmbeddedPostgres
from orchestrator.doctor.server import server_findings
from orchestrator.settings import Settings
from tests.support.manifests import KUBERNETES
from tests.support.terraform import CONFIGURATION, initialised, terraform


def test_the_configuration_is_formatted() -> None:
    done = terraform(CONFIGURATION, "fmt", "-check", "-recursive", "-diff")
    assert done.returncode == 0, done.stdout


@pytest.mark.timeout(300)
def test_the_configuration_is_valid(tmp_path: Path) -> None:
    copy = initialised(tmp_path)
    done = terraform(copy, "validate", "-no-color")
    assert done.returncode == 0, done.stderr
    (copy / "outputs.tf").write_text('output "broken" { value = aws_db_instance.this.adress }\n')
    assert terraform(copy, "validate", "-no-color").returncode == 1


def test_a_server_with_the_parameters_starts_and_doctor_finds_nothing() -> None:
    text = (CONFIGURATION / "database.tf").read_text(encoding="utf-8")
    parameters = dict(re.findall(r"^ +(\w+) += \{ value = \"([^\"]+)\"", text, re.MULTILINE))
    assert {"autovacuum_naptime", "idle_in_transaction_session_timeout", "synchronous_commit"} <= parameters.keys()
    tuning = parameters | {"shared_buffers": "32MB", "max_wal_size": "256MB"}
    with EmbeddedPostgres.temporary(tuning=tuning) as server, connect_blocking(server.url(), "doctor") as connection:
        findings = list(server_findings(connection, Settings.from_env({})))
        row = connection.execute("select current_setting('idle_in_transaction_session_timeout')").fetchone()
    assert {finding.level for finding in findings} == {"ok"}, findings
    assert row is not None


def test_the_network_is_the_one_that_the_manifests_open() -> None:
    variables = (CONFIGURATION / "variables.tf").read_text(encoding="utf-8")
    policy = (KUBERNETES / "components" / "managed-services" / "network-policy.yaml").read_text(encoding="utf-8")
    (network,) = re.findall(r'default += "([0-9./]+/[0-9]+)"', variables)
    assert f"cidr: {network}" in policy
