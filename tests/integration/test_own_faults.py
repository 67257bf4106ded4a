"""What this machine lacks: deliveries wait for it, and no event spends an attempt."""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.dispatch.http.secrets import Secrets
from orchestrator.errors import OwnFaultError
from orchestrator.own_faults import own_fault
from tests.conftest import MakeSettings
from tests.support.brokers import Kafka
from tests.support.dispatching import arrivals, assert_laws, dispatching, finished, soon
from tests.support.receiver import Answer, Receiver
from tests.support.sql_client import Client
from tests.support.waiting import eventually


@contextmanager
def no_descriptors() -> Iterator[None]:
    """This process can open nothing more; what is open stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # poll() wants some
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_lack_of_descriptors_spends_no_attempt_and_opens_no_breaker(
    settings: MakeSettings, client: Client, receiver: Receiver, host: str
) -> None:
    async with dispatching(settings()) as running:
        url = receiver.url("/hook").replace("127.0.0.1", host)
        with no_descriptors():
            ids = client.schedule_many(15, scheduled_at=soon(0), destination=url, max_retries=0)
            await eventually(lambda: running.value("own_faults_total") >= 20)
            assert running.value("events_dead_total") == running.value("events_retried_total") == 0
        await finished(client, ids)
    assert arrivals(receiver.requests) == dict.fromkeys(ids, 1)
    assert client.column("select result from orchestrator.outcomes") == ["delivered"] * 15
    assert client.value("select count(*) from orchestrator.lane where breaker <> 'closed'") == 0
    assert_laws(client, receiver.requests, ids)


async def test_a_deferred_event_is_handed_back_when_the_dispatcher_stops(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    with_time = settings()
    async with dispatching(with_time) as running:
        with no_descriptors():
            event_id = client.schedule(scheduled_at=soon(0), destination=receiver.url(), max_retries=0)
            await eventually(lambda: running.value("own_faults_total") > 0)
            began = asyncio.get_running_loop().time()
            await running.stop()
            assert asyncio.get_running_loop().time() - began < 5
    assert client.value("select worker is null and attempt = 1 from orchestrator.timer where event_id = %s", event_id)


async def test_a_secret_that_cannot_be_opened_for_want_of_descriptors_spends_no_attempt(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("abc")
    secrets = Secrets(str(tmp_path))
    with no_descriptors(), pytest.raises(OwnFaultError, match="Too many open files"):
        secrets.header("token")
    assert secrets.header("token") == "abc"


async def test_kafka_that_cannot_be_reached_for_want_of_a_file_spends_no_attempt(
    settings: MakeSettings, client: Client, kafka: Kafka
) -> None:
    without = settings(
        KAFKA_BOOTSTRAP_SERVERS=kafka.servers, KAFKA_SECURITY_PROTOCOL="SSL", KAFKA_SSL_CA_FILE="/nowhere/ca.pem"
    )
    async with dispatching(without) as running:
        event_id = client.schedule(scheduled_at=soon(0), delivery_type="KAFKA", destination="t", max_retries=0)
        await eventually(lambda: running.value("own_faults_total") >= 2)
    assert client.status(event_id) == "scheduled"
    assert client.value("select count(*) from orchestrator.outcomes") == 0


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EMFILE, "x"), "EMFILE"),
        (OSError(errno.ENFILE, "x"), "ENFILE"),
        (OSError(errno.ENOBUFS, "x"), "ENOBUFS"),
        (OSError(errno.ENOMEM, "x"), "ENOMEM"),
        (OSError(errno.EADDRNOTAVAIL, "x"), "EADDRNOTAVAIL"),
        (MemoryError(), "ENOMEM"),
        (RuntimeError("can't start new thread"), "threads"),
        (socket.gaierror(socket.EAI_MEMORY, "x"), "ENOMEM"),
        (OSError("Multiple exceptions: [Errno 101] unreachable, [Errno 24] Too many open files"), "EMFILE"),
        (OSError("Multiple exceptions: [Errno 99] no address, [Errno 111] refused"), None),
        (OSError(errno.ECONNREFUSED, "x"), None),
        (OSError(errno.ENETUNREACH, "x"), None),
        (socket.gaierror(socket.EAI_NONAME, "x"), None),
        (socket.gaierror(socket.EAI_AGAIN, "x"), None),
        (TimeoutError(), None),
        (ssl.SSLError(1, "x"), None),
        (ConnectionResetError(), None),
        (ValueError("x"), None),
    ],
)
def test_faults_of_this_machine_are_told_from_those_of_receivers(error: BaseException, kind: str | None) -> None:
    wrapped = Exception()
    wrapped.__cause__ = error
    for each in (error, wrapped):
        found = own_fault(each)
        assert (found and found.kind) == kind


async def test_a_resolver_without_a_thread_spends_no_attempt(
    settings: MakeSettings, client: Client, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    async with dispatching(settings()) as running:
        url = receiver.url("/hook").replace("127.0.0.1", "localhost")
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            event_id = client.schedule(scheduled_at=soon(0), destination=url, max_retries=0)
            await eventually(lambda: running.value("own_faults_total") > 0)
        await finished(client, [event_id])
    assert arrivals(receiver.requests) == {event_id: 1}


async def test_a_receivers_own_error_is_still_an_attempt(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    url = receiver.script("/busy", Answer(503))
    async with dispatching(settings()) as running:
        event_id = client.schedule(scheduled_at=soon(0), destination=url, max_retries=0)
        await finished(client, [event_id])
    assert running.value("own_faults_total") == 0
    assert client.status(event_id) == "dead"
