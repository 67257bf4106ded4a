"""Every shell script and YAML file of the repository, and what in it could be a secret."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.processes import ROOT
from tests.support.tools import tool

_SHELLS = (b"#!/bin/sh", b"#!/bin/bash", b"#!/usr/bin/env bash", b"#!/usr/bin/env sh")


def tracked() -> list[Path]:
    """The files of the repository, those that are to be added included; not what tools leave behind."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    paths = [ROOT / name for name in listed.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


@pytest.fixture(scope="module")
def files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone of the repository, so its files are not known apart from others")
    return tracked()


def is_script(path: Path) -> bool:
    if path.suffix in {".sh", ".bash"}:
        return True
    with path.open("rb") as file:
        return file.readline().strip().startswith(_SHELLS)


def complaints(program: str, *arguments: str | Path) -> str:
    result = subprocess.run([tool(program), *arguments], capture_output=True, text=True, cwd=ROOT)
    return result.stdout + result.stderr if result.returncode else ""


def test_shellcheck_finds_nothing_in_any_script(files: list[Path]) -> None:
    scripts = [path for path in files if is_script(path)]
    assert ROOT / ".ci" / "run" in scripts
    assert complaints("shellcheck", "--format=gcc", "--external-sources", "--source-path=SCRIPTDIR", *scripts) == ""


def test_every_yaml_file_is_well_formed(files: list[Path]) -> None:
    given = [path for path in files if path.suffix in {".yml", ".yaml"}]
    assert ROOT / "docker-compose.yml" in given
    assert complaints("yamllint", "--strict", "--format=parsable", *given) == ""


def test_no_secret_is_in_the_repository(files: list[Path], tmp_path: Path) -> None:
    for path in files:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    report = ("--report-path=-", "--report-format=csv", "--no-banner", "--log-level=error")
    assert complaints("gitleaks", "dir", str(tmp_path), "--config", ROOT / ".gitleaks.toml", *report) == ""
