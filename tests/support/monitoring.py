"""A real Prometheus and a real Alertmanager with this project's configuration, in a hurry."""

from __future__ import annotations

import asyncio
import math
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.dev.operating_system import free_port
from tests.support.processes import ROOT
from tests.support.tools import tool
from tests.support.waiting import eventually

yaml: Any = pytest.importorskip("yaml")

OPS = ROOT / "ops"
PROMETHEUS = OPS / "prometheus" / "prometheus.yml"
ALERTMANAGER = OPS / "alertmanager" / "alertmanager.yml"
_STARTS_S = 60.0
_LABEL_VALUES = re.compile(r"label_values\((.*), (\w+)\)")


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Prometheus:
    """Asks a server of Prometheus."""

    client: httpx.AsyncClient

    async def ask(self, path: str, **parameters: str) -> Any:
        """The data of the answer. An answer that is an error fails the test with what Prometheus says about it."""
        answer = (await self.client.get(f"/api/v1/{path}", params=parameters)).json()
        assert answer["status"] == "success", f"{parameters}: {answer['error']}"
        return answer["data"]

    async def values(self, expression: str) -> list[float]:
        """The values of all series that the expression gives now, without those that are not a number."""
        found = await self.ask("query", query=expression)
        samples = [found["result"]] if found["resultType"] == "scalar" else [each["value"] for each in found["result"]]
        return [value for _, text in samples if not math.isnan(value := float(text))]

    async def label_values(self, query: str) -> list[str]:
        """What a variable of Grafana offers that is asked for by `label_values(series, label)`."""
        match = _LABEL_VALUES.fullmatch(query)
        assert match is not None, query
        found: list[str] = await self.ask(f"label/{match[2]}/values", **{"match[]": match[1]})
        return found

    async def rules(self) -> list[Any]:
        return [rule for group in (await self.ask("rules"))["groups"] for rule in group["rules"]]


@asynccontextmanager
async def monitoring(directory: Path, targets: Sequence[str], webhook: str) -> AsyncIterator[Prometheus]:
    """Both programs, until the block ends. `webhook` is told of alerts, at the path of the receiver's name."""
    programs = [tool("prometheus"), tool("prometheus-alertmanager")]
    ports = [free_port(), free_port()]
    addresses = [f"127.0.0.1:{port}" for port in ports]
    (directory / "alertmanager.yml").write_text(yaml.safe_dump(_impatient_alertmanager(webhook)))
    (directory / "prometheus.yml").write_text(yaml.safe_dump(_impatient_prometheus(targets, *addresses)))
    _copy_rules(directory)
    data = [f"--storage.{kind}={directory / name}" for kind, name in (("tsdb.path", "tsdb"), ("path", "alerts"))]
    lone = ["--cluster.listen-address="]  # of one Alertmanager alone
    commands = [
        [str(program), f"--config.file={directory / config}", f"--web.listen-address={address}", where, *more]
        for program, config, address, where, more in zip(
            programs, ("prometheus.yml", "alertmanager.yml"), addresses, data, ([], lone), strict=True
        )
    ]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with (directory / f"{Path(command[0]).name}.log").open("wb") as log:
                running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=directory))
        async with httpx.AsyncClient(base_url=f"http://{addresses[0]}", timeout=30) as client:
            await eventually(lambda: _are_ready(client, addresses), _STARTS_S, pause_s=0.1)
            yield Prometheus(client)
    finally:
        for process in running:
            process.kill()
            await asyncio.to_thread(process.wait)


async def _are_ready(client: httpx.AsyncClient, addresses: Sequence[str]) -> Any:
    try:
        answers = [await client.get(f"http://{address}/-/ready") for address in addresses]
    except httpx.TransportError:
        return False
    return all(answer.status_code == 200 for answer in answers)


def _impatient_prometheus(targets: Sequence[str], prometheus: str, alertmanager: str) -> Any:
    """The project's configuration, but for the addresses and the intervals."""
    config = read_yaml(PROMETHEUS)
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["alerting"]["alertmanagers"] = [{"static_configs": [{"targets": [alertmanager]}]}]
    places = {"orchestrator": list(targets), "prometheus": [prometheus], "alertmanager": [alertmanager]}
    for job in config["scrape_configs"]:
        job.pop("dns_sd_configs", None)
        job["static_configs"] = [{"targets": places.pop(job["job_name"])}]
    assert places == {}
    return config


def _impatient_alertmanager(webhook: str) -> Any:
    """The project's configuration, but that it waits for nothing, and tells the webhook."""
    config = read_yaml(ALERTMANAGER)
    config["route"] |= {"group_wait": "1s", "group_interval": "1s"}
    for receiver in config["receivers"]:
        receiver["webhook_configs"] = [{"url": f"{webhook}{receiver['name']}", "send_resolved": True}]
    return config


def _copy_rules(directory: Path) -> None:
    """Rules that fire after a second of what they wait for. Their expressions stay as they are."""
    shutil.copytree(PROMETHEUS.parent / "rules", directory / "rules")
    for path in (directory / "rules").glob("*.yml"):
        text = re.sub(r"^(\s+)(for|interval): \S+", r"\1\2: 1s", path.read_text(), flags=re.MULTILINE)
        path.write_text(text)
