"""`orchestrator demo` and `orchestrator dev`: what a newcomer runs first."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from orchestrator.cli.dev import first_curl
from orchestrator.dev import environment
from orchestrator.dev.demo_result import result_of
from orchestrator.dev.environment import kept_webhook_secret, new_webhook_secret
from orchestrator.dev.operating_system import free_port, is_alive
from orchestrator.dev.receiver import Webhook, listen
from orchestrator.dev.stack import prepared
from orchestrator.dispatch.http.signing import Signer
from tests.conftest import Spawn
from tests.support.processes import Spawned
from tests.support.waiting import eventually

SUBMISSION = "select orchestrator.schedule_event('http://127.0.0.1:9/', '1', now() + interval '1 hour')"


def family(pid: int) -> list[psutil.Process]:
    """The process and everything it has started, whatever their sessions."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def document(process: Spawned) -> dict[str, object]:
    """The JSON document among the lines that a process has printed."""
    found = [line for line in process.log().splitlines() if line.startswith("{") and '"ts"' not in line]
    assert len(found) == 1, process.log()
    parsed: dict[str, object] = json.loads(found[0])
    return parsed


# The demo


async def test_the_demo_delivers_every_event_once_and_none_early(spawn: Spawn) -> None:
    process = spawn("demo", "--events", "300", "--seconds", "1", "--json", DATABASE_URL="")
    assert await process.wait(60) == 0
    result = document(process)
    counts = ("submitted", "through_kafka", "delivered", "lost", "duplicated", "early")
    assert {name: result[name] for name in counts} == {
        "submitted": 300,
        "through_kafka": 150,
        "delivered": 300,
        "lost": 0,
        "duplicated": 0,
        "early": 0,
    }
    lateness = result["lateness_ms"]
    assert isinstance(lateness, dict)
    assert 0 <= lateness["p50"] <= lateness["p99"] <= lateness["max"]
    assert isinstance(result["events_per_s"], float)
    assert result["events_per_s"] > 0


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_the_demo_leaves_no_process_and_no_data_behind_when_it_is_interrupted(
    spawn: Spawn, end: signal.Signals
) -> None:
    process = spawn("demo", "--events", "100", "--seconds", "60", DATABASE_URL="")
    await process.wait_for_log("delivering", 40)
    started = family(process.pid)
    assert len(started) >= 9  # itself, the database, the broker, two APIs, an ingester, two dispatchers, the receiver
    data = next(each.cmdline()[-1] for each in started if each.cmdline()[-2:-1] == ["-D"])
    os.kill(process.pid, end)
    assert await process.wait(30) == (-end if end == signal.SIGKILL else 130)
    await eventually(lambda: not [each for each in started if is_alive(each)], 30)
    await eventually(lambda: not Path(data).exists())


async def test_the_demo_refuses_a_database_in_which_events_wait_for_delivery(spawn: Spawn, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(SUBMISSION)
    process = spawn("demo", "--events", "10", "--database-url", database_url)
    assert await process.wait(40) == 1
    assert "Error: --database-url: the demo would deliver the events that wait" in process.log()


def test_the_result_counts_lost_repeated_and_early_deliveries() -> None:
    scheduled = {"a": 10.0, "b": 10.0, "c": 10.0, "d": 12.0}
    ids = ["a", "b", "b", "stranger", "d", "b"]
    result = result_of(scheduled, 10.0, ids, [10.1, 10.2, 10.3, 10.4, 11.5, 10.6])
    counts = (result.submitted, result.delivered, result.lost, result.duplicated, result.early)
    assert counts == (4, 3, 1, 2, 1)
    assert result.lateness_ms.p50 == pytest.approx(100)
    assert result.lateness_ms.max == pytest.approx(200)
    assert result.events_per_s == pytest.approx(10)
    assert not result.flawless
    assert result_of({"a": 1.0}, 1.0, ["a"], [1.5]).flawless
    assert result_of({"a": 1.0}, 1.0, [], []).lost == 1


# The receiver


async def test_the_receiver_reads_pipelined_and_divided_requests_and_answers_each() -> None:
    got: list[Webhook] = []
    async with await listen(got.append) as server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        request = b"POST /a HTTP/1.1\r\nHost: x\r\nWebhook-Id: 7\r\nContent-Length: 5\r\n\r\nhello"
        writer.write(request + request[:50])
        await eventually(lambda: len(got) == 1)
        writer.write(request[50:])
        assert await reader.readexactly(2 * len(b"HTTP/1.1 204 No Content\r\n\r\n"))
        assert [(each.path, each.id, each.body) for each in got] == [("/a", "7", b"hello")] * 2
        writer.write(b"nonsense\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400")
        writer.close()


@pytest.mark.parametrize(
    ("changes", "genuine"),
    [({}, True), ({"webhook-id": "8"}, False), ({"webhook-timestamp": "x"}, False), ({"webhook-signature": ""}, False)],
)
def test_the_receiver_knows_a_genuine_signature(changes: dict[str, str], genuine: bool) -> None:
    old, new = new_webhook_secret(), new_webhook_secret()
    signature = Signer([new, old]).signature("7", 1_700_000_000, b"body")
    headers = {"webhook-id": "7", "webhook-timestamp": "1700000000", "webhook-signature": signature} | changes
    webhook = Webhook("/", headers, b"body", 0.0)
    assert webhook.is_signed_by(Signer([old])) is genuine
    assert not webhook.is_signed_by(Signer([new_webhook_secret()]))
    assert not webhook.is_signed_by(Signer([]))


# dev


@pytest.mark.skipif(shutil.which("curl") is None, reason="it is curl that is pasted")
async def test_the_first_curl_of_dev_can_be_pasted_and_its_delivery_is_seen(spawn: Spawn) -> None:
    port = str(free_port())
    process = spawn("dev", "--json", SERVER_PORT=port, WEBHOOK_SECRETS=new_webhook_secret(), HTTP_ALLOW_NETWORKS="")
    await process.wait_for_log('"receiver"')
    addresses = document(process)
    assert addresses["api"] == f"http://127.0.0.1:{port}/api/v1/events"
    command = first_curl(f"http://127.0.0.1:{port}", str(addresses["receiver"]))
    answer = json.loads(subprocess.run(["/bin/sh", "-c", command], capture_output=True, check=True).stdout)
    await process.wait_for_log(f"webhook /hello  {answer['id']}", 15)
    line = next(line for line in process.log().splitlines() if "webhook /hello" in line)
    assert "after its time  signature ok" in line
    assert '{"hello": "world"}' in line
    assert await process.stop() == 0


async def test_dev_names_the_remedy_when_its_port_is_taken(spawn: Spawn) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = spawn("dev", SERVER_PORT=str(port), DATABASE_URL="", WEBHOOK_SECRETS=new_webhook_secret())
        assert await process.wait() == 1
    assert f"SERVER_PORT: another process listens on 127.0.0.1:{port}" in process.log()
    assert " orchestrator dev" in process.log()


async def test_dev_is_refused_in_production(spawn: Spawn) -> None:
    process = spawn("dev", ENVIRONMENT="production", WEBHOOK_SECRETS=new_webhook_secret())
    assert await process.wait() == 1
    assert "dev is not for production" in process.log()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], dict[str, str]]]:
    """The environment of a user who runs the package from elsewhere than a checkout."""
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)  # as root, the database's account has to reach its data
        monkeypatch.setattr(environment, "_PACKAGE", Path(home) / "site-packages" / "orchestrator")
        yield lambda: {"XDG_STATE_HOME": f"{home}/state", "SERVER_PORT": str(free_port())}


def test_dev_keeps_its_data_and_its_secret_between_runs(installed: Callable[[], dict[str, str]]) -> None:
    with prepared(installed()) as stack:
        secrets = stack.settings.webhook_secrets
        with psycopg.connect(stack.settings.database_url, autocommit=True) as connection:
            connection.execute(SUBMISSION)
    with prepared(installed()) as stack:
        assert stack.settings.webhook_secrets == secrets
        with psycopg.connect(stack.settings.database_url) as connection:
            assert connection.execute("select count(*) from orchestrator.event").fetchone() == (1,)
        assert stack.settings.server_host == "127.0.0.1"
        assert [str(network) for network in stack.settings.http_allow_networks] == ["127.0.0.0/8", "::1/128"]


def test_the_kept_secret_is_for_its_owner_alone(tmp_path: Path) -> None:
    secret = kept_webhook_secret(tmp_path / "new")
    assert kept_webhook_secret(tmp_path / "new") == secret
    assert (tmp_path / "new" / "webhook-secret").stat().st_mode & 0o777 == 0o600
