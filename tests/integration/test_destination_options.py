"""What a destination's configuration changes about an attempt: its time-out, its signature, its headers."""

from __future__ import annotations

import base64
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, cast

import pytest

from orchestrator.dispatch.http.signing import Signer
from tests.conftest import MakeSettings
from tests.support.brokers import Kafka
from tests.support.dispatching import arrivals, dispatching, finished, soon
from tests.support.receiver import HANG, Answer, Received, Receiver
from tests.support.sql_client import Client, event
from tests.support.topics import headers, records
from tests.support.waiting import eventually

OURS = "whsec_" + base64.b64encode(b"ours" * 8).decode()
OLD = "whsec_" + base64.b64encode(b"old!" * 8).decode()
NEW = "whsec_" + base64.b64encode(b"new!" * 8).decode()


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    directory = tmp_path / "secrets"
    directory.mkdir()
    return directory


def place(receiver: Receiver) -> str:
    return f"127.0.0.1:{receiver.port}"


def outcomes(client: Client, event_id: str) -> list[Any]:
    return cast(list[Any], client.get(event_id)["outcomes"])


def signed_by(request: Received, *keys: str) -> bool:
    timestamp = int(request.headers["webhook-timestamp"])
    expected = Signer(keys).signature(request.headers["webhook-id"], timestamp, request.body)
    return request.headers.get("webhook-signature", "") == expected


async def test_a_destination_has_a_time_out_of_its_own_shorter_or_longer(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    hanging = receiver.script("/hanging", HANG)
    async with Receiver() as other:
        slow = other.script("/slow", Answer(204, delay_s=0.9))
        client.rows("select orchestrator.configure_destination(%s, p_timeout => '0.2 s')", place(receiver))
        client.rows("select orchestrator.configure_destination(%s, p_timeout => '5 s')", place(other))
        short = client.schedule(scheduled_at=soon(0), destination=hanging, max_retries=0)
        long = client.schedule(scheduled_at=soon(0), destination=slow, max_retries=0)
        async with dispatching(settings(HTTP_TIMEOUT_SECONDS="0.5")):
            await finished(client, [short, long])
    (timed_out,) = outcomes(client, short)
    assert timed_out["error"] == "timeout: no complete response within 0.2 s"
    assert client.status(long) == "delivered"


async def test_a_destination_is_signed_for_with_its_own_secret_and_others_with_the_general_one(
    settings: MakeSettings, client: Client, receiver: Receiver, secrets: Path
) -> None:
    (secrets / "acme").write_text(f"{NEW}\n{OLD}\n")
    client.rows("select orchestrator.configure_destination(%s, p_signing_secret => 'acme')", place(receiver))
    async with Receiver() as other:
        ids = [client.schedule(scheduled_at=soon(0), destination=to.url()) for to in (receiver, other)]
        async with dispatching(settings(SECRETS_DIRECTORY=str(secrets), WEBHOOK_SECRETS=OURS)):
            await finished(client, ids)
        assert signed_by(receiver.requests[0], NEW, OLD)
        assert signed_by(other.requests[0], OURS)


async def test_a_secret_that_is_replaced_is_used_without_a_restart(
    settings: MakeSettings, client: Client, receiver: Receiver, secrets: Path
) -> None:
    (secrets / "acme").write_text(OLD)
    client.rows("select orchestrator.configure_destination(%s, p_signing_secret => 'acme')", place(receiver))
    async with dispatching(settings(SECRETS_DIRECTORY=str(secrets))):
        await finished(client, [client.schedule(scheduled_at=soon(0), destination=receiver.url())])
        assert signed_by(receiver.requests[0], OLD)
        (secrets / ".acme").write_text(NEW)
        os.replace(secrets / ".acme", secrets / "acme")

        deadline_s = time.monotonic() + 5
        while not signed_by(receiver.requests[-1], NEW):
            assert time.monotonic() < deadline_s
            await finished(client, [client.schedule(scheduled_at=soon(0), destination=receiver.url())])


async def test_a_secret_header_replaces_the_events_own_header_and_never_a_reserved_one(
    settings: MakeSettings, client: Client, receiver: Receiver, secrets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    (secrets / "token").write_text("Bearer t0ken\n")
    client.rows(
        """select orchestrator.configure_destination(%s, p_secret_headers => '{"Authorization": "token"}')""",
        place(receiver),
    )
    # The function refuses headers that are ours to set, but an owner of the tables can write what he likes.
    client.rows("""update orchestrator.destination set secret_headers = secret_headers || '{"webhook-id": "token"}'""")
    given = {"authorization": "Bearer mine", "x-kept": "yes"}
    event_id = client.schedule(scheduled_at=soon(0), destination=receiver.url(), headers=given)
    async with dispatching(settings(SECRETS_DIRECTORY=str(secrets))):
        await finished(client, [event_id])
    (request,) = receiver.requests
    assert request.headers["authorization"] == "Bearer t0ken"
    assert request.headers["x-kept"] == "yes"
    assert request.headers["webhook-id"] == event_id
    assert "t0ken" not in caplog.text
    assert "t0ken" not in str(client.get(event_id))


@pytest.mark.parametrize("content", [None, "s3cret but\nnot a key"])
async def test_an_event_waits_for_a_secret_that_is_missing_or_malformed(
    settings: MakeSettings,
    client: Client,
    receiver: Receiver,
    secrets: Path,
    caplog: pytest.LogCaptureFixture,
    content: str | None,
) -> None:
    caplog.set_level(logging.DEBUG)
    if content is not None:
        (secrets / "acme").write_text(content)
    client.rows("select orchestrator.configure_destination(%s, p_signing_secret => 'acme')", place(receiver))
    event_id = client.schedule(scheduled_at=soon(0), destination=receiver.url())
    async with dispatching(settings(SECRETS_DIRECTORY=str(secrets))):
        (outcome,) = await eventually(lambda: outcomes(client, event_id))
    assert outcome["result"] == "retried"
    assert "acme" in outcome["error"]
    assert "SECRETS_DIRECTORY" in outcome["error"]
    assert "s3cret" not in outcome["error"] + caplog.text
    assert client.value("select due_at - now() > '50 s' from orchestrator.timer")
    assert receiver.requests == []


async def test_a_configuration_that_cannot_be_read_costs_one_attempt_and_not_the_dispatcher(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    client.rows("select orchestrator.configure_destination(%s, p_timeout => '1 s')", place(receiver))
    client.rows("""update orchestrator.destination set secret_headers = '{"x": 1}'""")
    async with Receiver() as other:
        bad = client.schedule(scheduled_at=soon(0), destination=receiver.url())
        good = client.schedule_many(5, scheduled_at=soon(0), destination=other.url())
        async with dispatching(settings()):
            await finished(client, good)
            (outcome,) = await eventually(lambda: outcomes(client, bad))
        assert outcome["error"].startswith("the configuration of its destination cannot be read: ")
        assert arrivals(other.requests) == dict.fromkeys(good, 1)


async def test_a_record_carries_the_secret_headers_of_its_topic(
    settings: MakeSettings, client: Client, kafka: Kafka, secrets: Path
) -> None:
    """They are for webhooks; an owner of the tables can write them for a topic, too."""
    (secrets / "token").write_text("t0ken")
    topic = kafka.unique("secret")
    await kafka.create_topic(topic, 1)
    client.rows("select orchestrator.configure_destination(%s, p_timeout => '10 s')", f"kafka:{topic}")
    given = {"x-tenant": "token", "orchestrator-attempt": "token"}
    client.rows("update orchestrator.destination set secret_headers = %s", json.dumps(given))
    made = event(delivery_type="KAFKA", destination=topic, scheduled_at=soon(0), headers={"X-Tenant": "mine", "a": "b"})
    event_id = str(client.submit(made)[0].id)
    async with dispatching(settings(**kafka.environ, SECRETS_DIRECTORY=str(secrets))):
        await finished(client, [event_id])
    (record,) = await records(kafka.servers, topic)
    found = headers(record)
    assert (found["x-tenant"], found["a"], found["orchestrator-attempt"]) == ("t0ken", "b", "1")
    assert "X-Tenant" not in found
