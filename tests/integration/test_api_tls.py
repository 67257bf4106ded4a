"""TLS of the API itself, on a real socket: certificates that change, clients that are slow, wrong or not known."""

from __future__ import annotations

import asyncio
import logging
import shutil
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import uvloop

from orchestrator.api.server import certificate
from orchestrator.api.server.certificate import load
from orchestrator.api.server.server import serve
from orchestrator.database import Database
from orchestrator.doctor.machine import machine_findings
from orchestrator.errors import SettingsError
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings
from tests.conftest import MakeSettings, Spawn
from tests.integration.api_support import submission, until
from tests.support.certificates import Authority
from tests.support.waiting import eventually

GET = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
LAST = GET[:-2] + b"Connection: close\r\n\r\n"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return made_authority(tmp_path_factory.mktemp("tls"))


def made_authority(folder: Path) -> Authority:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl program to make certificates")
    return Authority(openssl, folder)


class Files(NamedTuple):
    """Certificate and key, as a secret is mounted: `put` replaces both at once, as Kubernetes does."""

    folder: Path

    @property
    def environ(self) -> dict[str, str]:
        return {
            "SERVER_SSL_CERT_FILE": str(self.folder / "now" / "tls.crt"),
            "SERVER_SSL_KEY_FILE": str(self.folder / "now" / "tls.key"),
        }

    def put(self, cert: Path, key: Path | None = None) -> None:
        mounted = self.folder / f"..{time.monotonic_ns()}"
        mounted.mkdir()
        shutil.copy(cert, mounted / "tls.crt")
        shutil.copy(key or cert, mounted / "tls.key")
        link = self.folder / f"link-{time.monotonic_ns()}"
        link.symlink_to(mounted)
        link.rename(self.folder / "now")


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> Files:
    found = Files(tmp_path)
    found.put(authority.certificate("first"))
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "LOOK_S", 0.02)


class Served(NamedTuple):
    port: int
    metrics: Metrics
    trusted: ssl.SSLContext
    writers: list[asyncio.StreamWriter]

    def refused(self, reason: str) -> float:
        refused: float = self.metrics.http_refusals_total(reason)._value.get()
        return refused

    @property
    def open(self) -> float:
        opened: float = self.metrics.http_connections._value.get()
        return opened

    async def connect(self, context: ssl.SSLContext | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection over TLS, which is closed at the end of the test."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=context or self.trusted)
        self.writers.append(writer)
        return reader, writer

    async def plain(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        return reader, writer

    async def name(self) -> str:
        """Whose certificate a new connection gets."""
        _, writer = await self.connect()
        found = writer.get_extra_info("peercert")["subject"][0][0][1]
        writer.close()
        return str(found)


@asynccontextmanager
async def serving(settings: Settings, authority: Authority) -> AsyncIterator[Served]:
    """A server in a thread, because it runs on uvloop, whose TLS differs from that of asyncio."""
    metrics, stop, loops = Metrics(settings), asyncio.Event(), []
    served = Served(settings.server_port, metrics, ssl.create_default_context(cafile=authority.trusted), [])

    async def serve_it() -> None:
        loops.append(asyncio.get_running_loop())
        async with Database(settings, role="api") as database:
            await serve(settings, database, metrics, stop=stop)

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve_it())

    running = asyncio.create_task(asyncio.to_thread(run))

    async def listens() -> bool:
        if running.done():
            await running
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", settings.server_port)
        except OSError:
            return False
        writer.close()
        return True

    try:
        await until(listens)
        await eventually(lambda: served.open == 0)
        yield served
    finally:
        if loops:
            loops[0].call_soon_threadsafe(stop.set)
        for writer in served.writers:
            if not writer.is_closing():  # before Python 3.11.3, a closed one cannot be aborted
                writer.transport.abort()
        await running


def client(context: ssl.SSLContext, port: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"https://127.0.0.1:{port}", verify=context, trust_env=False, timeout=30)


async def test_requests_over_tls_are_answered_and_kept_alive(
    settings: MakeSettings, authority: Authority, files: Files
) -> None:
    async with serving(settings(**files.environ), authority) as served, client(served.trusted, served.port) as tls:
        for _ in range(3):
            assert (await tls.post("/api/v1/events", json=submission())).status_code == 201
        large = [submission(payload={"text": "x" * 200_000}) for _ in range(20)]
        assert (await tls.post("/api/v1/events/batch", json={"events": large})).status_code == 200
        assert served.open == 1
        openapi = (await tls.get("/openapi.json")).text
        assert len(openapi) > 50_000
        series = [line for line in (await tls.get("/metrics")).text.splitlines() if "tls_certificate_expiry" in line]
        assert float(series[-1].split()[-1]) == pytest.approx(time.time() + 86_400, abs=600)
        assert 'listener="api"' in series[-1]
    assert served.open == 0


async def test_many_connections_at_once_lose_no_first_bytes(
    settings: MakeSettings, authority: Authority, files: Files
) -> None:
    async with serving(settings(**files.environ), authority) as served:

        async def ask() -> None:
            reader, writer = await served.connect()
            writer.write(LAST)
            assert (await reader.read()).startswith(b"HTTP/1.1 200")
            writer.close()

        for _ in range(4):
            await asyncio.gather(*(ask() for _ in range(25)))
        await eventually(lambda: served.open == 0)
        assert served.refused("tls_handshake") == 0


async def test_only_tls_of_today_is_spoken(settings: MakeSettings, authority: Authority, files: Files) -> None:
    async with serving(settings(**files.environ), authority) as served:
        old = ssl.create_default_context(cafile=authority.trusted)
        with pytest.warns(DeprecationWarning, match="TLSv1_1 is deprecated"):
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await served.connect(old)
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            new = ssl.create_default_context(cafile=authority.trusted)
            new.minimum_version = new.maximum_version = version
            new.set_alpn_protocols(["h2", "http/1.1"])
            reader, writer = await served.connect(new)
            assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
            writer.write(LAST)
            assert (await reader.read()).startswith(b"HTTP/1.1 200")
            writer.close()


async def test_plain_text_on_the_port_of_tls_is_closed_and_counted(
    settings: MakeSettings, authority: Authority, files: Files
) -> None:
    async with serving(settings(**files.environ), authority) as served:
        reader, writer = await served.plain()
        writer.write(GET)
        async with asyncio.timeout(10):
            assert b"HTTP" not in await reader.read()
        writer.close()
        await eventually(lambda: served.open == 0)
        assert served.refused("tls_handshake") == 1
        assert await served.name() == "first"


async def test_a_handshake_has_the_deadline_of_a_head_and_a_place_among_the_connections(
    settings: MakeSettings, authority: Authority, files: Files
) -> None:
    chosen = settings(**files.environ, API_HEAD_TIMEOUT_SECONDS="0.5", API_MAX_CONNECTIONS="20")
    async with serving(chosen, authority) as served:
        silent = [await served.plain() for _ in range(60)]
        for _, writer in silent[:30]:
            writer.write(b"\x16\x03\x01")  # the beginning of a handshake
        await eventually(lambda: served.refused("connections") >= 30)
        assert served.open <= 23
        assert await served.name() == "first"
        reader, writer = await served.connect()  # and a head that stays away after the handshake
        writer.write(GET[:10])
        async with asyncio.timeout(10):
            assert b" 408 " in await reader.readline()
        writer.close()
        await eventually(lambda: served.refused("head_timeout") >= 10)
        await eventually(lambda: served.open == 0)


async def test_a_refusal_reaches_a_client_that_still_sends(
    settings: MakeSettings, authority: Authority, files: Files
) -> None:
    async with serving(settings(**files.environ), authority) as served:
        reader, writer = await served.connect()
        writer.write(b"GET / HTTP/1.1\r\nX: " + b"a" * 5_000_000)
        async with asyncio.timeout(10):
            assert b" 431 " in await reader.readline()
        writer.transport.abort()
        await eventually(lambda: served.open == 0)


async def test_a_new_pair_is_used_for_new_connections_and_no_connection_ends(
    settings: MakeSettings, authority: Authority, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(settings(**files.environ), authority) as served:
        reader, writer = await served.connect()
        files.put(authority.certificate("second", days=3))

        async def second() -> bool:
            return await served.name() == "second"

        await until(second)
        writer.write(LAST)
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()
        expires_at = served.metrics.tls_certificate_expiry_timestamp_seconds("api")._value.get()
        assert expires_at == pytest.approx(time.time() + 3 * 86_400, abs=600)

        # A pair that does not match stays out, until the other file follows.
        third = authority.certificate("third")
        files.put(third, authority.certificate("other"))
        await eventually(lambda: any("a new certificate is refused" in each.message for each in caplog.records))
        assert await served.name() == "second"
        assert "is not that of the certificate" in caplog.text
        files.put(third)

        async def takes_third() -> bool:
            return await served.name() == "third"

        await until(takes_third)
        (files.folder / "now").unlink()
        await eventually(lambda: "cannot read" in caplog.text)
        assert await served.name() == "third"


async def test_with_an_authority_of_clients_only_clients_that_it_knows_are_served(
    settings: MakeSettings, authority: Authority, files: Files, tmp_path: Path
) -> None:
    (tmp_path / "clients").mkdir()
    clients = made_authority(tmp_path / "clients")
    ca_file = tmp_path / "ca.pem"
    shutil.copy(clients.trusted, ca_file)
    async with serving(settings(**files.environ, SERVER_SSL_CLIENT_CA_FILE=str(ca_file)), authority) as served:

        async def answer(shown: Path | None) -> bytes:
            context = ssl.create_default_context(cafile=authority.trusted)
            if shown is not None:
                context.load_cert_chain(shown)
            try:
                reader, writer = await served.connect(context)
                writer.write(LAST)
                answered = await reader.read()
                writer.close()
            except (ssl.SSLError, ConnectionError):
                return b""
            return answered

        known = clients.certificate("known")
        strangers = [None, authority.certificate("stranger"), clients.certificate("over", from_days=-3, days=-1)]
        assert (await answer(known)).startswith(b"HTTP/1.1 200")
        for stranger in strangers:
            assert await answer(stranger) == b""
        await eventually(lambda: served.refused("tls_handshake") == len(strangers))

        # Another authority takes the place of the first: no session of before opens the door.
        shutil.copy(authority.trusted, tmp_path / "new.pem")
        (tmp_path / "new.pem").rename(ca_file)

        async def turned() -> bool:
            return (await answer(strangers[1])).startswith(b"HTTP/1.1 200")

        await until(turned)
        assert await answer(known) == b""


async def test_an_expired_certificate_is_served_and_everybody_is_told(
    settings: MakeSettings, authority: Authority, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    files.put(authority.certificate("over", from_days=-3, days=-1))
    caplog.set_level(logging.WARNING)
    chosen = settings(**files.environ)
    async with serving(chosen, authority) as served:
        assert "the API's certificate has expired" in caplog.text
        assert served.metrics.tls_certificate_expiry_timestamp_seconds("api")._value.get() < time.time()
        with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
            await served.connect()
        findings = {each.check: each for each in await asyncio.to_thread(lambda: list(machine_findings(chosen)))}
        assert findings["certificate"].level == "problem"
        assert "has expired" in findings["certificate"].what
        assert "an orchestrator answers there" in findings["ports"].what


@pytest.mark.parametrize(
    ("cert", "key", "said"),
    [
        ("absent", "good", "SERVER_SSL_CERT_FILE: cannot read .*absent: No such file"),
        ("good", "absent", "SERVER_SSL_KEY_FILE: cannot read .*absent: No such file"),
        ("good", "other", "SERVER_SSL_KEY_FILE: the key in .* is not that of the certificate"),
        ("good", "locked", "SERVER_SSL_KEY_FILE: the key in .*locked has a passphrase; write it without: openssl pkey"),
        ("nonsense", "good", r"SERVER_SSL_CERT_FILE: expected a certificate \(PEM\) in .*nonsense"),
        ("broken", "good", r"SERVER_SSL_CERT_FILE: expected a certificate \(PEM\) in .*broken"),
        ("good", "nonsense", "SERVER_SSL_CERT_FILE and SERVER_SSL_KEY_FILE: cannot use .*nonsense"),
        ("good", ".", "SERVER_SSL_KEY_FILE: cannot read .*: Is a directory"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    authority: Authority, tmp_path: Path, cert: str, key: str, said: str
) -> None:
    shutil.copy(authority.certificate("good"), tmp_path / "good")
    shutil.copy(authority.certificate("other"), tmp_path / "other")
    (tmp_path / "nonsense").write_bytes(b"\x00\xffnonsense")
    (tmp_path / "broken").write_text("-----BEGIN CERTIFICATE-----\nMAMCAQE=\n-----END CERTIFICATE-----\n")
    encrypt = ["pkey", "-in", str(tmp_path / "good"), "-aes256", "-passout", "pass:secret", "-out"]
    authority._run(*encrypt, str(tmp_path / "locked"))
    paths = {"SERVER_SSL_CERT_FILE": str(tmp_path / cert), "SERVER_SSL_KEY_FILE": str(tmp_path / key)}
    with pytest.raises(SettingsError, match=f"^{said}"):
        load(Settings.from_env(paths))


def test_authorities_of_clients_that_are_none_are_named(authority: Authority, tmp_path: Path) -> None:
    good = str(authority.certificate("good"))
    given = {"SERVER_SSL_CERT_FILE": good, "SERVER_SSL_KEY_FILE": good}
    for content in (b"", b"nonsense", b"\xff\xfe"):
        (tmp_path / "ca.pem").write_bytes(content)
        with pytest.raises(SettingsError, match=r"^SERVER_SSL_CLIENT_CA_FILE: expected certificates"):
            load(Settings.from_env(given | {"SERVER_SSL_CLIENT_CA_FILE": str(tmp_path / "ca.pem")}))


def test_how_long_a_certificate_is_valid_is_read_from_all_of_its_chain(authority: Authority, tmp_path: Path) -> None:
    long, short = tmp_path / "long.pem", authority.certificate("short", days=2)
    made = [*authority._key("long.key"), "-subj", "/CN=long", "-days", "20000", "-out", str(tmp_path / "long.crt")]
    authority._run("req", "-x509", *made)
    long.write_text((authority.trusted.parent / "long.key").read_text() + (tmp_path / "long.crt").read_text())
    chain = tmp_path / "chain.pem"
    chain.write_text(long.read_text() + short.read_text())
    for file, begins, days in ((long, 0, 20_000), (chain, 0, 2), (short, -1, 2)):
        key = short if file == short else long
        pair = load(Settings.from_env({"SERVER_SSL_CERT_FILE": str(file), "SERVER_SSL_KEY_FILE": str(key)}))
        assert pair is not None
        assert pair.ends_at == pytest.approx(time.time() + days * 86_400, abs=600)
        assert pair.begins_at == pytest.approx(time.time() + begins * 86_400, abs=600)


@pytest.mark.parametrize("role", ["api", "run"])
async def test_a_process_does_not_start_with_a_certificate_that_it_cannot_use(
    spawn: Spawn, authority: Authority, role: str
) -> None:
    good, other = (str(authority.certificate(name)) for name in ("good", "other"))
    process = spawn(role, SERVER_SSL_CERT_FILE=good, SERVER_SSL_KEY_FILE=other)
    assert await process.wait() == 1
    assert "SERVER_SSL_KEY_FILE: the key in" in process.log()
    checked = spawn("config", "check", SERVER_SSL_CERT_FILE=good, SERVER_SSL_KEY_FILE=other)
    assert await checked.wait() == 2
    assert "SERVER_SSL_KEY_FILE: the key in" in checked.log()


async def test_the_api_of_run_speaks_tls_and_health_is_plain_on_its_own_port(
    spawn: Spawn, environ: object, authority: Authority, files: Files
) -> None:
    from orchestrator.dev.operating_system import free_port

    port, management = free_port(), free_port()
    ports = {"SERVER_PORT": str(port), "MANAGEMENT_SERVER_PORT": str(management)}
    process = spawn("run", **files.environ, **ports, LOG_FORMAT="json")
    await process.wait_for_log('"ready"')
    async with client(ssl.create_default_context(cafile=authority.trusted), port) as tls:
        assert (await tls.post("/api/v1/events", json=submission())).status_code == 201
        ready = await tls.get(f"http://127.0.0.1:{management}/ready")
        assert ready.status_code == 200
        assert "tls_certificate_expiry" in (await tls.get(f"http://127.0.0.1:{management}/metrics")).text
    assert await process.stop() == 0
