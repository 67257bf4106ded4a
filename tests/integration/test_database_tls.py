"""TLS with the database, checked in full: every role and the command line work, and say what is wrong when it is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import Spawn
from tests.support.certificates import Authority
from tests.support.tls_front import TlsFront
from tests.support.tools import tool


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(str(tool("openssl")), tmp_path_factory.mktemp("tls"))


@pytest.fixture
async def front(database_url: str, authority: Authority) -> AsyncIterator[TlsFront]:
    async with TlsFront(database_url, authority.certificate("right")) as front:
        yield front


@pytest.mark.parametrize("role", ["api", "dispatch", "maintain", "run"])
async def test_every_role_works_over_tls_checked_in_full(
    spawn: Spawn, front: TlsFront, authority: Authority, role: str
) -> None:
    process = spawn(role, DATABASE_URL=front.url(authority.trusted), LOG_FORMAT="json")
    await process.wait_for_log('"ready"', 30)
    assert front.taken > 0
    assert await process.stop() == 0
    assert "is away" not in process.log()


async def test_an_ingester_works_over_tls_checked_in_full(
    spawn: Spawn, front: TlsFront, authority: Authority, kafka: object
) -> None:
    servers = str(kafka.servers)  # type: ignore[attr-defined]
    given = {"KAFKA_BOOTSTRAP_SERVERS": servers, "KAFKA_PARTITIONS": "1", "CUSTOMER_NAME": "database-tls"}
    created = spawn("topics", "create", DATABASE_URL=front.url(authority.trusted), **given)
    assert await created.wait() == 0, created.log()
    process = spawn("ingest", DATABASE_URL=front.url(authority.trusted), LOG_FORMAT="json", **given)
    await process.wait_for_log('"ready"', 30)
    assert front.taken > 0
    assert await process.stop() == 0


@pytest.mark.parametrize("command", ["migrate", "stats", "maintain --once"])
async def test_the_command_line_works_over_tls_checked_in_full(
    spawn: Spawn, front: TlsFront, authority: Authority, command: str
) -> None:
    process = spawn(*command.split(), DATABASE_URL=front.url(authority.trusted))
    assert await process.wait() == 0, process.log()
    assert front.taken > 0


@pytest.mark.parametrize(
    ("fault", "said", "remedy"),
    [
        ("authority", "certificate verify failed", "give the authority of the server's certificate as sslrootcert"),
        ("name", "does not match host name", "name the server in DATABASE_URL as its"),
        ("expired", "certificate verify failed", "the certificate has expired: renew it on the server"),
        ("file", "absent.pem", "mount the file that sslrootcert names"),
        ("plain", "server does not support SSL", "turn on ssl in the server's configuration"),
    ],
)
@pytest.mark.parametrize("command", ["dispatch", "stats", "migrate"])
async def test_a_server_that_cannot_be_trusted_is_named_with_the_remedy(
    spawn: Spawn, front: TlsFront, authority: Authority, database_url: str, tmp_path: Path,
    fault: str, said: str, remedy: str, command: str,
) -> None:  # fmt: skip
    url = front.url(authority.trusted)
    if fault == "authority":
        front.certificate = authority.self_signed("stranger")
    elif fault == "name":
        url = front.url(authority.trusted, "localhost")
        front.certificate = authority.certificate("elsewhere", subject_alt_name="DNS:db.example")
    elif fault == "expired":
        front.certificate = authority.certificate("expired", from_days=-3, days=-1)
    elif fault == "file":
        url = front.url(tmp_path / "absent.pem")
    else:
        url = f"{database_url}?sslmode=verify-full&sslrootcert={authority.trusted}"
    process = spawn(command, DATABASE_URL=url)
    assert await process.wait() == 1
    log = process.log()
    assert said in log
    assert remedy in log
    password = urlsplit(database_url).password
    assert password is not None
    assert password not in log


async def test_a_running_process_waits_while_the_certificate_is_wrong_and_goes_on(
    spawn: Spawn, front: TlsFront, authority: Authority
) -> None:
    process = spawn("dispatch", DATABASE_URL=front.url(authority.trusted), LOG_FORMAT="json")
    await process.wait_for_log('"ready"', 30)
    front.certificate = authority.certificate("expired", from_days=-3, days=-1)
    front.cut()
    await process.wait_for_log("renew it on the server", 60)
    front.certificate = authority.certificate("right")
    await process.wait_for_log("the database is back", 60)
    assert await process.stop() == 0
