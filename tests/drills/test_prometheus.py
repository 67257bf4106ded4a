"""A real Prometheus reads the product at work: every dashboard and every rule finds its series, and alerts arrive."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.types.json import Jsonb

from orchestrator.dev.operating_system import free_port
from tests.conftest import Spawn
from tests.support.brokers import Kafka
from tests.support.dashboards import DASHBOARDS, SELECTOR, Asked, asked, variables
from tests.support.ingesting import Topic, feed
from tests.support.monitoring import Prometheus, monitoring
from tests.support.processes import ROOT, Spawned
from tests.support.receiver import Answer, Receiver
from tests.support.waiting import eventually

FILLED_S = 150.0
ALERTED_S = 60.0
ALERT = "BreakerOpen"
EMPTY_PANELS = {
    "overview: Faults of this machine (A)": "nothing failed on this machine",
    "database: Failures by step (A)": "no step of maintenance failed",
    "database: Age of the last good backup (A)": "no backup is set up",
    "database: Lag of the read replica (A)": "there is no replica",
}
EMPTY_SERIES = {
    "CertificateExpiring": "the API serves without TLS",
    "orchestrator_tls_certificate_expiry_timestamp_seconds": "the API serves without TLS",
    "BackupFailing": "no backup is set up",
    "BackupMissing": "no backup is set up",
    "BackupTooOld": "no backup is set up",
    "orchestrator_backup_failing": "no backup is set up",
    "orchestrator_backup_last_success_timestamp_seconds": "no backup is set up",
    "ReadReplicaBehind": "there is no replica",
    "orchestrator_read_replica_lag_seconds": "there is no replica",
    "orchestrator_read_replica_in_use": "there is no replica",
}
"""Series that rules ask for, or the rules themselves."""
_COMPARISON = re.compile(r'\{[^}]*\}|"[^"]*"|(?:[<>]=?|[=!]=)(?!\s*bool)')


def chosen(expression: str, deployment: str) -> str:
    """The expression with values for Grafana's variables."""
    values = {"deployment": deployment, "customer": ".*", "environment": ".*", "destination": ".*"}
    for name, value in values.items():
        expression = expression.replace(f"${name}", value)
    return expression.replace("$__rate_interval", "1m")


def compared(expression: str) -> str:
    """What an alert looks at, whether or not it fires: comparisons answer 0 or 1, and nothing is taken away."""
    told = _COMPARISON.sub(lambda found: found[0] if found[0][0] in '{"' else f"{found[0]} bool", expression)
    return re.sub(r"\bunless\b", "or", told)


async def empty(prometheus: Prometheus, questions: Iterable[Asked]) -> list[str]:
    """Where an expression gives nothing, or nothing that is a number."""
    return [place for place, expression in questions if not await prometheus.values(expression)]


class Traffic:
    """All that can become of events, again and again: submitted over HTTP and Kafka, delivered, failed, refused."""

    def __init__(self, apis: list[httpx.AsyncClient], topic: Topic, works: Receiver, fails: Receiver) -> None:
        self._apis = apis
        self._topic = topic
        self._hook = works.script("/hook", Answer(204))
        self._gone = works.script("/gone", Answer(404))
        self._failing = fails.script("/hook", Answer(500))
        self._numbers = itertools.count(1)

    def event(self, destination: str | None, due_in_s: float = 0.0, **more: Any) -> dict[str, Any]:
        kind = {"delivery_type": "KAFKA"} if destination is None else {"destination": destination}
        return {
            "source": "drill",
            "external_job_id": f"job-{next(self._numbers)}",
            "scheduled_at": (datetime.now(UTC) + timedelta(seconds=due_in_s)).isoformat(),
            "payload": {},
            **kind,
            **more,
        }

    async def refused(self, locked: dict[str, Any]) -> None:
        """Submits what another session has submitted and not committed."""
        answer = await self._apis[-1].post("/api/v1/events", json=locked)
        assert answer.status_code == 503, answer.text

    async def round(self) -> None:
        for api in self._apis:
            later = self.event(self._hook, 300)
            events = [self.event(each) for each in (self._hook, None, self._gone, self._failing) for _ in range(4)]
            events += [later, later, self.event(self._hook, 30), self.event("not a URL")]
            answer = await api.post("/api/v1/events/batch", json={"events": events})
            assert answer.status_code in (200, 202), answer.text
            await api.delete(f"/api/v1/events/external/{later['external_job_id']}")
            with socket.create_connection((api.base_url.host, api.base_url.port)) as nonsense:
                nonsense.sendall(b"nonsense\r\n\r\n")
        await feed(self._topic, [json.dumps(self.event(self._hook)).encode(), b"{", None])
        commands = self._topic._replace(name=self._topic.commands)
        await feed(commands, [b'{"command": "cancel", "external_job_id": "job-1"}', b"{}"])


@asynccontextmanager
async def under_way(traffic: Traffic, database_url: str) -> AsyncIterator[asyncio.Task[None]]:
    """The traffic goes on for as long as the block does, beside a transaction that somebody has left open."""
    locked = traffic.event(None, 3600)

    async def rounds() -> None:
        while True:
            await traffic.round()
            await asyncio.sleep(0.5)  # or it takes what the programs need

    async def refusals() -> None:
        async with await psycopg.AsyncConnection.connect(database_url) as left_open:
            await left_open.execute("select orchestrator.submit_events(%s)", (Jsonb([locked]),))
            while True:
                await traffic.refused(locked)

    async def both() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(rounds())
            tasks.create_task(refusals())

    task = asyncio.create_task(both())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def ready(process: Spawned, url: str) -> None:
    async def answers() -> Any:
        assert process.returncode is None, process.log()
        with suppress(httpx.TransportError):
            return (await client.get(url)).is_success

    async with httpx.AsyncClient(timeout=10) as client:
        await eventually(answers, 60.0, pause_s=0.1)


@pytest.mark.timeout(420)
async def test_every_panel_and_rule_finds_its_series_and_an_alert_arrives(
    spawn: Spawn, kafka: Kafka, database_url: str, receiver: Receiver, tmp_path: Path
) -> None:
    customer = kafka.unique("drill")
    ours = {**kafka.environ, "CUSTOMER_NAME": customer, "DEPLOYMENT_NAME": customer, "KAFKA_PARTITIONS": "2"}
    ours |= {"KAFKA_SESSION_TIMEOUT_MS": "2000", "LOG_LEVEL": "ERROR"}
    assert await spawn("topics", "create", **ours).wait(60) == 0
    topic = Topic(kafka, f"{customer}.event.submissions", f"{customer}.process-kafka-message")
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("select orchestrator.pause_destination('paused.example')")
    ports = {role: str(free_port()) for role in ("run", "api", "dispatch")}
    without_kafka = {name: value for name, value in ours.items() if not name.startswith("KAFKA_")}
    processes = [
        spawn("run", SERVER_PORT=ports["run"], **ours),
        spawn("api", SERVER_PORT=ports["api"], **without_kafka),
        spawn("dispatch", MANAGEMENT_SERVER_PORT=ports["dispatch"], **ours),
    ]
    targets = [f"127.0.0.1:{port}" for port in ports.values()]
    for process, target in zip(processes, targets, strict=True):
        await ready(process, f"http://{target}/ready")
    async with (
        Receiver() as failing,
        httpx.AsyncClient(base_url=f"http://{targets[0]}", timeout=30) as one,
        httpx.AsyncClient(base_url=f"http://{targets[1]}", timeout=30) as other,
        under_way(Traffic([one, other], topic, receiver, failing), database_url) as traffic,
        monitoring(tmp_path, targets, receiver.url("/")) as prometheus,
    ):
        await assert_everything_is_found(prometheus, traffic, customer)
        await assert_an_alert_arrives(receiver, customer)


async def assert_everything_is_found(prometheus: Prometheus, traffic: asyncio.Task[None], deployment: str) -> None:
    panels = [question for path in DASHBOARDS for question in asked(path)]
    shown = [Asked(place, chosen(expression, ".*")) for place, expression in panels]
    assert EMPTY_PANELS.keys() <= {place for place, _ in panels}

    async def all_filled() -> Any:
        assert not traffic.done(), traffic.exception()
        missing = [place for place in await empty(prometheus, shown) if place not in EMPTY_PANELS]
        assert not missing, "nothing in " + ", ".join(missing)
        return True

    await eventually(all_filled, FILLED_S, pause_s=1.0)
    # Somebody else's dashboard shows nothing of this: each query is filtered.
    elsewhere = [Asked(place, chosen(expression, "nobody")) for place, expression in panels]
    assert await empty(prometheus, elsewhere) == [place for place, _ in panels]
    for place, query in (question for path in DASHBOARDS for question in variables(path)):
        offered = await prometheus.label_values(chosen(query, ".*"))
        assert offered, place
        assert place.partition("$")[2] not in ("deployment", "customer") or offered == [deployment], place
    await assert_rules_are_sound(prometheus)


async def assert_rules_are_sound(prometheus: Prometheus) -> None:
    rules = await prometheus.rules()
    assert len(rules) > 20
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []
    missing = set()
    for rule in rules:
        for series, matchers in SELECTOR.findall(rule["query"]):
            if not await prometheus.values(f"count({series}{matchers})"):
                missing.add(f"{series}{matchers}")
        looked_at = rule["query"] if rule["type"] == "recording" else compared(rule["query"])
        if "absent" not in looked_at and not await prometheus.values(looked_at):
            missing.add(rule["name"])
    assert {each for each in missing if not {each, each.partition("{")[0]} & EMPTY_SERIES.keys()} == set()


async def assert_an_alert_arrives(receiver: Receiver, deployment: str) -> None:
    def arrived() -> list[tuple[str, Any]]:
        return [
            (request.path, alert)
            for request in receiver.requests
            if request.path in ("/page", "/ticket")
            for alert in json.loads(request.body)["alerts"]
            if alert["labels"]["alertname"] == ALERT
        ]

    (path, alert), *_ = await eventually(arrived, ALERTED_S, pause_s=0.1)
    labels = alert["labels"]
    assert (alert["status"], path) == ("firing", f"/{labels['severity']}")
    assert {labels[name] for name in ("deployment", "customer")} == {deployment}
    assert alert["annotations"]["summary"]
    assert (ROOT / alert["annotations"]["runbook_url"]).is_file()
