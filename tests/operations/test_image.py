"""The image: how it is built, and what its health check says. tests/drills/test_wheel.py runs what is in it."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.conftest import Spawn
from tests.integration.api_support import free_port, until
from tests.support.dockerfile import health_check, instructions
from tests.support.processes import ROOT
from tests.support.receiver import Answer, Receiver
from tests.support.tools import tool

_FROM = re.compile(r"(\S+)(?: AS (\S+))?")
_EXACT = re.compile(r"[\w./-]+:[\w.-]*\d{8}[\w.-]*|[\w./-]+:\d+\.\d+\.\d+[\w.-]*|\S+@sha256:[0-9a-f]{64}")


def values(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


async def checked(**environ: str) -> int:
    """The exit status of the image's health check with these ports."""
    command, options = health_check()
    ports = {"PATH": os.environ["PATH"]} | environ
    process = await asyncio.create_subprocess_exec(*command, env=ports, stderr=subprocess.DEVNULL)
    return await asyncio.wait_for(process.wait(), options["timeout"])


DOCKERFILES = [ROOT / "Dockerfile", *sorted((ROOT / "ops").rglob("Dockerfile"))]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_hadolint_finds_nothing_in_a_dockerfile(dockerfile: Path) -> None:
    result = subprocess.run([tool("hadolint"), "--no-color", dockerfile], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_the_base_of_the_image_is_an_exact_release() -> None:
    stages = [found.groups() for each in values("FROM") if (found := _FROM.fullmatch(each))]
    names = {name for _, name in stages}
    assert len(stages) == len(values("FROM"))
    assert [base for base, _ in stages if base not in names and not _EXACT.fullmatch(base)] == []


def test_the_image_runs_as_a_user_by_number_who_is_not_root() -> None:
    assert values("USER") == ["10001:10001"]


def test_the_image_copies_dependencies_before_the_program() -> None:
    copied = [rest for name, rest in instructions() if name == "COPY"]
    assert copied.index("pyproject.toml ./") < copied.index("orchestrator orchestrator")
    final = [rest for rest in copied if rest.startswith("--from=")]
    assert [rest.split()[0] for rest in final] == ["--from=dependencies", "--from=program"]


def test_what_the_image_copies_is_sent_to_the_builder() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = [part for rest in values("COPY") if not rest.startswith("--from") for part in rest.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists()
        assert any(fnmatch(source, pattern) for pattern in allowed), f"{source} is in .dockerignore"


def test_the_version_in_the_labels_is_that_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"VERSION={version}" in values("ARG")
    (labels,) = values("LABEL")
    given = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]+)"', labels))
    assert (given["version"], given["revision"], given["source"]) == ("$VERSION", "$REVISION", "$SOURCE")


async def test_the_health_check_asks_the_management_port_or_else_that_of_the_api(spawn: Spawn) -> None:
    management, api = str(free_port()), str(free_port())
    ports = {"MANAGEMENT_SERVER_PORT": management, "SERVER_PORT": api}
    assert await checked(**ports) != 0  # nobody listens yet
    process = spawn("api", **ports)
    await until(lambda: _healthy(ports), 30)
    # The API has a port of its own, where nothing but health would be found under this path.
    assert await checked(SERVER_PORT=api) != 0
    assert await process.stop() == 0
    process = spawn("api", SERVER_PORT=api)
    await until(lambda: _healthy({"MANAGEMENT_SERVER_PORT": "", "SERVER_PORT": api}), 30)
    assert await process.stop() == 0


async def _healthy(ports: dict[str, str]) -> bool:
    return await checked(**ports) == 0


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (204, False), (404, False), (503, False)])
async def test_the_health_check_takes_no_answer_but_200(receiver: Receiver, status: int, healthy: bool) -> None:
    receiver.script("/health", Answer(status))
    assert (await checked(MANAGEMENT_SERVER_PORT=str(receiver.port)) == 0) is healthy


async def test_the_health_check_takes_a_closed_connection_as_unhealthy(receiver: Receiver) -> None:
    receiver.script("/health", Answer(close="before answer"))
    assert await checked(MANAGEMENT_SERVER_PORT=str(receiver.port)) != 0
