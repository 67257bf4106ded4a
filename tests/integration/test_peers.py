"""This project and its peers by turns, on one server; see benchmarks/peers/README.md."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.peers.compare import PEERS, main

PACKAGES = os.environ.get("PEERS_PACKAGES", "")


@pytest.mark.skipif(not PACKAGES, reason="PEERS_PACKAGES names no folder into which npm has installed the peers")
def test_every_system_runs_both_scenarios(database_url: str, tmp_path: Path) -> None:
    arguments = ["--packages", PACKAGES, "--events", "500", "--rounds", "1", "--database-url", database_url]
    result = CliRunner().invoke(main, [*arguments, "--results", str(tmp_path / "results")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "results").read_text().splitlines()) == 2 * (1 + len(PEERS))
    for figure in ("| whole_life_per_s | ", "| last_start_ms | "):
        assert figure in result.output


def test_peers_that_are_missing_are_named_with_the_command_that_installs_them(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--packages", str(tmp_path)])
    assert result.exit_code == 1
    assert f"npm install --prefix {tmp_path} graphile-worker pg-boss pg" in result.output
