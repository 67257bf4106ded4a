"""ops/terraform planned and applied without an account, by its own tests: the provider is a mock."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.terraform import initialised, terraform

pytestmark = pytest.mark.timeout(600)


def test_the_plan_holds_what_its_tests_ask_for(tmp_path: Path) -> None:
    copy = initialised(tmp_path)
    done = terraform(copy, "test", "-no-color", timeout_s=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout


def test_a_database_in_one_zone_would_fail_them(tmp_path: Path) -> None:
    copy = initialised(tmp_path)
    database = copy / "database.tf"
    text = database.read_text(encoding="utf-8")
    assert "multi_az               = true" in text
    database.write_text(text.replace("multi_az               = true", "multi_az               = false"))
    done = terraform(copy, "test", "-no-color", timeout_s=280)
    assert done.returncode == 1
    assert "expected two zones" in done.stdout + done.stderr
