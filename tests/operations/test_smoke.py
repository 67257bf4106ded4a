"""`orchestrator smoke` against a deployment that runs: it shows each step, and of a fault the reason."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from orchestrator.api.auth import key_hash, new_key
from orchestrator.dev.operating_system import free_port
from tests.conftest import Spawn
from tests.integration.cli_support import invoke, refused, told
from tests.support.brokers import Kafka
from tests.support.certificates import Authority
from tests.support.receiver import Answer, Receiver
from tests.support.sql_client import Client
from tests.support.tools import tool
from tests.support.topics import arrived
from tests.unit.test_config import KEY

STEPS = ["health", "ready", "submit", "deliver", "signature", "status", "cancel", "metrics"]
OTHER_KEY = "whsec_" + "A" * 32
FAST = ("--due-in", "0.5", "--timeout", "20")


class Deployment:
    """A process that runs, its addresses, and keys for it."""

    def __init__(self, port: int, management_port: int, database_url: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.management_url = f"http://127.0.0.1:{management_port}"
        self.database_url = database_url

    def key(self, *scopes: str) -> str:
        key = new_key()
        with Client(self.database_url) as client:
            named = ("-".join(scopes), key_hash(key), list(scopes))
            client.rows("select orchestrator.create_api_key(%s, %s, %s)", *named)
        return key

    async def smoke(self, *arguments: str, key: str = "", secrets: str = "") -> Result:
        call = ("smoke", self.url, "--management-url", self.management_url, *FAST, *arguments)
        env = {"ORCHESTRATOR_API_KEY": key, "WEBHOOK_SECRETS": secrets}
        return await asyncio.to_thread(lambda: invoke(*call, env=env))

    def statuses(self) -> list[str]:
        with Client(self.database_url) as client:
            return sorted(client.column("select status from orchestrator.event_status"))


async def started(spawn: Spawn, database_url: str, **given: str) -> Deployment:
    port, management_port = free_port(), free_port()
    ports = {"SERVER_PORT": str(port), "MANAGEMENT_SERVER_PORT": str(management_port)}
    process = spawn("run", DATABASE_URL=database_url, **ports, **given)
    await process.wait_for_log('"ready"', 60)
    return Deployment(port, management_port, database_url)


def failed(result: Result) -> str:
    """The reason, which stands in the JSON document and in the last step but the cleaning up."""
    assert result.exit_code == 1, result.output
    document = json.loads(result.stdout)
    assert document["ok"] is False
    last = [step for step in document["steps"] if step["step"] != "clean up"][-1]
    assert (last["ok"], document["reason"]) == (False, f"{last['step']}: {last['detail']}")
    reason: str = document["reason"]
    return reason


async def test_a_deployment_that_works_passes_every_step(
    spawn: Spawn, database_url: str, tmp_path: Path, receiver: Receiver
) -> None:
    with Client(database_url) as client:  # production does not start without a key
        client.rows("select orchestrator.create_api_key('first', %s, '{admin}')", b"x" * 32)
    deployment = await started(spawn, database_url, ENVIRONMENT="production", WEBHOOK_SECRETS=KEY, CUSTOMER_NAME="air")
    key = deployment.key("read", "submit")
    lines = told(await deployment.smoke(key=key, secrets=f"{OTHER_KEY},{KEY}")).splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [["✓", step] for step in STEPS]
    assert (lines[4].split("ms", 1)[1].strip(), lines[-1]) == ("one of WEBHOOK_SECRETS signed it", "All is well.")
    assert lines[7].endswith("of deployment event-scheduler, customer air")
    assert deployment.statuses() == ["cancelled", "delivered"]

    (tmp_path / "key").write_text(f"{key}\n")
    named = ("--destination", receiver.url("/hook"), "--api-key-file", str(tmp_path / "key"), "--json")
    document = json.loads(told(await deployment.smoke(*named)))
    assert (document["ok"], document["reason"]) == (True, None)
    assert [(step["step"], step["ok"]) for step in document["steps"]] == [(step, True) for step in STEPS]
    assert len(receiver.received("/hook")) == 1
    assert deployment.statuses() == ["cancelled"] * 2 + ["delivered"] * 2

    assert "answered 401" in failed(await deployment.smoke("--json"))
    wrong = failed(await deployment.smoke("--json", key="orch_" + "x" * 43))
    assert wrong.startswith("submit: POST ")
    assert "answered 401: The API key is unknown or was revoked.; set ORCHESTRATOR_API_KEY" in wrong
    read_only = failed(await deployment.smoke("--json", key=deployment.key("read")))
    assert "answered 403: The key 'read' has the scopes read; this needs submit.; create one" in read_only
    assert "another secret" in failed(await deployment.smoke("--json", key=key, secrets=OTHER_KEY))
    assert key not in wrong + read_only


async def test_what_a_deployment_does_not_do_is_said_and_nothing_is_left_behind(
    spawn: Spawn, database_url: str, receiver: Receiver
) -> None:
    deployment = await started(spawn, database_url)
    assert "not signed" in failed(await deployment.smoke("--json", secrets=KEY))

    broken = receiver.script("/broken", Answer(503))
    reason = failed(await deployment.smoke("--json", "--destination", broken))
    assert reason.startswith("deliver: the event is dead: ")
    assert "503" in reason

    reason = failed(await deployment.smoke("--json", "--callback-url", "http://192.0.2.1"))
    assert reason.startswith("deliver: the event is ")

    stranger = failed(await deployment.smoke("--json", "--callback-url", receiver.url("")))
    assert "the API says delivered, but" in stranger

    with Client(database_url) as client:
        client.rows("select orchestrator.pause_all()")
        result = await deployment.smoke("--json", "--timeout", "1")
        assert "the event is still scheduled 1 s after it was due: deliveries are paused" in failed(result)
        cleaned = json.loads(result.stdout)["steps"][-1]
        assert (cleaned["step"], cleaned["detail"]) == ("clean up", "1 of 1 events cancelled")
        assert client.column("select count(*) from orchestrator.timer") == [0]


async def test_an_event_goes_the_whole_way_through_kafka(spawn: Spawn, database_url: str, kafka: Kafka) -> None:
    customer, topic = kafka.unique("smoke"), kafka.unique("smoked")
    for name in (f"{customer}.event.submissions", f"{customer}.process-kafka-message", topic):
        await kafka.create_topic(name)
    deployment = await started(spawn, database_url, CUSTOMER_NAME=customer, **kafka.environ)
    told(await deployment.smoke("--topic", topic, "--timeout", "60"))
    [record] = await arrived(kafka.servers, topic, 1)
    assert json.loads(record.value)["smoke"].startswith("smoke-")


async def test_a_deployment_that_is_not_there_is_said_to_be_so() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    reason = failed(await asyncio.to_thread(invoke, "smoke", url, "--json"))
    assert reason.startswith(f"health: GET {url}/health: ")
    assert reason.endswith("; is it running, and is the address right?")
    lines = (await asyncio.to_thread(invoke, "smoke", url)).stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["✗", "health"]]


@asynccontextmanager
async def nothing_over_tls(authority: Authority) -> AsyncIterator[str]:
    """A server that answers every request with 503, over TLS."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.certificate("api"))
    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context) as server:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_certificate_that_is_not_trusted_is_said_to_be_so(tmp_path: Path) -> None:
    authority = Authority(str(tool("openssl")), tmp_path)
    async with nothing_over_tls(authority) as url:
        reason = failed(await asyncio.to_thread(invoke, "smoke", url, "--json"))
        assert "its certificate is not trusted: " in reason
        assert reason.endswith("name its authority by --ca-file")
        trusted = ("smoke", url, "--json", "--ca-file", str(authority.trusted))
        assert failed(await asyncio.to_thread(invoke, *trusted)) == (
            f"health: GET {url}/health answered 503: no reason given"
        )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["localhost:8080"], "expected http:// or https:// and a host"),
        (["http://u:s3cret@h"], "without a login in it"),
        (["http://h", "--listen", "8080"], "expected ADDRESS:PORT"),
        (["http://h", "--destination", "http://i", "--topic", "t"], "--destination and --topic: expected one of them"),
        (["http://h", "--api-key-file", "/absent"], "--api-key-file: '/absent' does not exist"),
        (["http://h", "--api-key", "orch_s3cret"], "No such option"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_sent(arguments: list[str], complaint: str) -> None:
    line = refused(invoke("smoke", *arguments), 2)
    assert complaint in line
    assert "s3cret" not in line or "No such option" in line


def test_a_key_and_a_secret_that_cannot_be_are_refused_without_being_shown(tmp_path: Path) -> None:
    env: dict[str, Any] = {"ORCHESTRATOR_API_KEY": "orch_s3cret\nX-Other: 1"}
    assert "s3cret" not in refused(invoke("smoke", "http://h", env=env), 2)
    line = refused(invoke("smoke", "http://h", env={"WEBHOOK_SECRETS_FILE": str(tmp_path / "absent")}), 2)
    assert line.startswith("WEBHOOK_SECRETS_FILE: ")
