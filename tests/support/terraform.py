"""Terraform over a copy of ops/terraform, with the provider that this machine keeps or can download."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.tools import ROOT, tool

CONFIGURATION = ROOT / "ops" / "terraform"
_INIT_S = 100.0
_PLUGINS = (
    os.environ.get("TERRAFORM_PLUGIN_DIR", ""),
    "/opt/tf-plugins",
    "/usr/share/terraform/plugins",
    "/usr/local/share/terraform/plugins",
    "~/.terraform.d/plugins",
)
"""Where providers may lie; TERRAFORM_PLUGIN_DIR names another place."""


def terraform(directory: Path, *arguments: str, timeout_s: float = 110.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool("terraform"), *arguments],
        cwd=directory,
        env=os.environ | {"TF_IN_AUTOMATION": "1", "TF_INPUT": "0", "CHECKPOINT_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def initialised(directory: Path) -> Path:
    """A copy of the configuration with its provider. Skips the test when that cannot be had."""
    copy = directory / "terraform"
    shutil.copytree(CONFIGURATION, copy, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*"))
    kept = [f"-plugin-dir={place}" for place in map(_expanded, _PLUGINS) if place and _has_provider(place)]
    try:
        done = terraform(copy, "init", "-backend=false", "-no-color", *kept[:1], timeout_s=_INIT_S)
    except subprocess.TimeoutExpired:
        pytest.skip("the provider of AWS is not on this machine, and could not be downloaded in time")
    if done.returncode:
        why = re.sub(r"\s+", " ", done.stderr).strip()[:300]
        pytest.skip(f"the provider of AWS is not on this machine (TERRAFORM_PLUGIN_DIR), nor to be had: {why}")
    return copy


def _expanded(place: str) -> Path | None:
    return Path(place).expanduser() if place else None


def _has_provider(place: Path) -> bool:
    return any(place.glob("registry.terraform.io/hashicorp/aws/5.*/*/terraform-provider-aws*"))
