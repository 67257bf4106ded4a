"""The examples do what they say, on the real system."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from orchestrator.dev.environment import new_webhook_secret
from orchestrator.dev.operating_system import free_port
from orchestrator.dev.postgres_install import find_installation
from orchestrator.settings.webhook_secrets import decode_secret
from tests.conftest import Spawn
from tests.integration.api_support import status, until
from tests.support.ingesting import Topic
from tests.support.processes import ROOT
from tests.support.receiver import Receiver
from tests.support.sql_client import Client
from tests.support.waiting import eventually

EXAMPLES = ROOT / "examples"
TIMEOUT_S = 30.0


async def output_of(*command: str, **environ: str) -> str:
    """What a command prints, which must succeed. It finds the commands of this interpreter's environment first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = await asyncio.create_subprocess_exec(
        *command,
        env=os.environ | {"PATH": path} | environ,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    printed, complaints = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert process.returncode == 0, (printed + complaints).decode()
    return printed.decode()


async def serving(spawn: Spawn, **given: str) -> str:
    """The URL of the API of a whole system."""
    port = free_port()
    spawn("run", SERVER_PORT=str(port), **given)
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:

        async def ready() -> bool:
            return await status(client, "/ready") == 200

        await until(ready, TIMEOUT_S)
    return url


@pytest.mark.skipif(shutil.which("curl") is None, reason="the example calls curl")
async def test_submit_sh_submits_one_event_and_waits_for_its_delivery(spawn: Spawn, receiver: Receiver) -> None:
    api = await serving(spawn)
    printed = await output_of("sh", str(EXAMPLES / "submit.sh"), api, receiver.url("/hook"))
    [delivery] = await receiver.wait_for(1)
    event_id = delivery.headers["webhook-id"]
    assert printed.splitlines() == [f"submitted {event_id}", f"submitted {event_id}", "delivered"]
    assert json.loads(delivery.body) == {"order": 17}


async def test_from_psql_sql_submits_asks_and_cancels(database_url: str, client: Client) -> None:
    psql = shutil.which("psql") or str(find_installation().bin_dir / "psql")
    options = ("--no-psqlrc", "--no-align", "--tuples-only", "--set", "destination=https://example.com/hook")
    printed = await output_of(psql, database_url, *options, "--file", str(EXAMPLES / "from_psql.sql"))
    assert "1|accepted||" in printed
    assert "2|refused|scheduled_at|" in printed
    assert "order-17/reminder|scheduled" in printed
    assert printed.splitlines()[-1].startswith("cancelled")
    kept = client.rows("select external_job_id, status from orchestrator.event_status order by 1")
    assert kept == [("order-17/reminder", "cancelled"), ("order-18/reminder", "scheduled")]


async def test_producer_py_submits_through_kafka(spawn: Spawn, topic: Topic, client: Client) -> None:
    spawn("ingest", **topic.environ)
    where = {"KAFKA_BOOTSTRAP_SERVERS": topic.kafka.servers, "KAFKA_TOPIC_SUBMISSION": topic.name}
    await output_of(sys.executable, str(EXAMPLES / "producer.py"), "https://example.com/hook", "3", **where)
    jobs = "select external_job_id from orchestrator.event_status order by 1"
    await eventually(lambda: len(client.column(jobs)) == 3, TIMEOUT_S)
    assert client.column(jobs) == ["order-0/reminder", "order-1/reminder", "order-2/reminder"]


async def test_receiver_py_takes_signed_deliveries_once_and_refuses_others(spawn: Spawn, client: Client) -> None:
    secret, port = new_webhook_secret(), free_port()
    url = f"http://127.0.0.1:{port}/hook"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(EXAMPLES / "receiver.py"), str(port)),
        env=os.environ | {"WEBHOOK_SECRET": secret},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        spawn("dispatch", WEBHOOK_SECRETS=secret)
        async with httpx.AsyncClient(trust_env=False) as sender:

            async def listens() -> bool:
                return await status(sender, url) is not None

            await until(listens, TIMEOUT_S)
            event_id = client.schedule(scheduled_at=datetime.now(UTC), destination=url, payload={"order": 17})
            line = await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S)
            assert line.decode() == f'{event_id} attempt 1: {{"order": 17}}\n'

            async def sent(name: str, sent_at: float, body: str, signed: str | None = None) -> int:
                timestamp = str(int(sent_at))
                text = f"{name}.{timestamp}.{body if signed is None else signed}".encode()
                mac = hmac.digest(decode_secret(secret), text, hashlib.sha256)
                headers = {
                    "webhook-id": name,
                    "webhook-timestamp": timestamp,
                    "webhook-signature": f"v1,AAAA v1,{base64.b64encode(mac).decode()}",
                    "orchestrator-attempt": "2",
                }
                return (await sender.post(url, content=body, headers=headers)).status_code

            assert await sent("forged", time.time(), "{}", signed="[]") == 401
            assert await sent("recorded", time.time() - 3600, "{}") == 401
            assert await sent(event_id, time.time(), "{}") == 204
            assert await sent("other", time.time(), "{}") == 204
        assert await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S) == b"other attempt 2: {}\n"
    finally:
        process.kill()
        await process.wait()


async def test_destinations_sh_limits_pauses_and_resumes(
    environ: Callable[..., dict[str, str]], client: Client
) -> None:
    printed = await output_of("sh", str(EXAMPLES / "destinations.sh"), "hooks.example.com", **environ())
    assert "50" in printed
    assert "paused" in printed
    assert client.rows("select * from orchestrator.destination") == []
