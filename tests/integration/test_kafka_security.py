"""Brokers that demand a login, or certificates: the settings are honoured, and errors name the one that is wrong."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from aiokafka import AIOKafkaConsumer

from orchestrator.dev.kafka import MavenBroker, Security
from orchestrator.dev.kafka_maven import unavailable
from orchestrator.errors import KafkaUnavailable, SettingsError
from orchestrator.kafka.client import client_arguments, started_producer
from orchestrator.kafka.topics import create_topics
from orchestrator.settings import Settings
from tests.support.databases import scratch_directory
from tests.support.processes import Spawned

USER, PASSWORD = "ocean", "not-the-one-in-the-log"
MECHANISMS = ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]

pytestmark = [
    pytest.mark.skipif(unavailable() is not None, reason=f"needs Apache Kafka from Maven: {unavailable()}"),
    pytest.mark.timeout(180),
]


class Certificate(NamedTuple):
    """A self-signed one for 127.0.0.1, which is its own authority."""

    file: Path
    key_file: Path

    @classmethod
    def make(cls, directory: Path, name: str) -> Certificate:
        made = cls(directory / f"{name}.pem", directory / f"{name}-key.pem")
        command = ["openssl", "req", "-x509", "-days", "2", "-nodes", "-subj", f"/CN={name}"]
        command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        command += ["-addext", "subjectAltName=IP:127.0.0.1"]
        command += ["-keyout", str(made.key_file), "-out", str(made.file)]
        subprocess.run(command, check=True, capture_output=True)
        return made

    def joined(self) -> Path:
        """One file with both, as Kafka wants it."""
        joined = self.file.with_suffix(".both.pem")
        joined.write_text(self.key_file.read_text() + self.file.read_text())
        return joined


class Secured(NamedTuple):
    """A broker that speaks SASL_SSL, and the certificate to trust."""

    servers: str
    certificate: Certificate

    def environ(self, **changes: str) -> dict[str, str]:
        """The settings to use it with, and changes to them; an empty one leaves a setting out."""
        right = {
            "KAFKA_BOOTSTRAP_SERVERS": self.servers,
            "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
            "KAFKA_SASL_USERNAME": USER,
            "KAFKA_SASL_PASSWORD": PASSWORD,
            "KAFKA_SSL_CA_FILE": str(self.certificate.file),
            "KAFKA_PARTITIONS": "2",
            "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
        }
        return {name: value for name, value in (right | changes).items() if value}

    def settings(self, **changes: str) -> Settings:
        return Settings.from_env(self.environ(**changes))


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    certificate = Certificate.make(tmp_path_factory.mktemp("secured"), "broker")
    security = Security("SASL_SSL", users={USER: PASSWORD}, certificate_file=certificate.joined())
    with MavenBroker(parent=scratch_directory(), security=security) as broker:
        yield Secured(broker.servers, certificate)


async def assert_goes_round(settings: Settings) -> None:
    """Topics can be made, and a record produced and consumed."""
    made = await create_topics(settings)
    assert [each.partitions for each in made] == [settings.kafka_partitions] * 7
    topic = settings.topic_submission
    async with started_producer(settings, "test") as producer:
        await producer.send_and_wait(topic, b"sent")
    consumer = AIOKafkaConsumer(topic, **client_arguments(settings, "test"), auto_offset_reset="earliest")
    async with consumer:
        assert (await consumer.getone()).value == b"sent"


async def assert_refused(settings: Settings, *named: str) -> None:
    """Neither a producer nor the making of topics works, and both say why, without the password."""
    for attempt in (_produce, create_topics):
        with pytest.raises(KafkaUnavailable) as raised:
            await attempt(settings)
        assert all(text in str(raised.value) for text in named), str(raised.value)
        assert PASSWORD not in str(raised.value)


async def _produce(settings: Settings) -> None:
    async with started_producer(settings, "test"):
        pass


@pytest.mark.parametrize("mechanism", MECHANISMS)
async def test_a_login_over_tls_is_taken(secured: Secured, mechanism: str) -> None:
    customer = mechanism.lower()
    await assert_goes_round(secured.settings(KAFKA_SASL_MECHANISM=mechanism, CUSTOMER_NAME=customer))


@pytest.mark.parametrize("mechanism", MECHANISMS)
async def test_a_wrong_password_for_kafka_is_named(secured: Secured, mechanism: str) -> None:
    settings = secured.settings(KAFKA_SASL_MECHANISM=mechanism, KAFKA_SASL_PASSWORD="wrong-one")
    await assert_refused(settings, "KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD", USER, mechanism, secured.servers)


async def test_a_certificate_that_is_not_trusted_is_named(secured: Secured, tmp_path: Path) -> None:
    other = Certificate.make(tmp_path, "other")
    for ca_file in ("", str(other.file)):
        await assert_refused(secured.settings(KAFKA_SSL_CA_FILE=ca_file), "KAFKA_SSL_CA_FILE", secured.servers)


async def test_a_certificate_for_another_name_is_not_trusted(secured: Secured) -> None:
    servers = secured.servers.replace("127.0.0.1", "localhost")
    settings = secured.settings(KAFKA_BOOTSTRAP_SERVERS=servers)
    await assert_refused(settings, "KAFKA_SSL_CA_FILE", "localhost")


@pytest.mark.parametrize("protocol", ["PLAINTEXT", "SASL_PLAINTEXT", "SSL"])
async def test_a_protocol_that_the_broker_does_not_speak_is_named(secured: Secured, protocol: str) -> None:
    await assert_refused(secured.settings(KAFKA_SECURITY_PROTOCOL=protocol), "KAFKA_SECURITY_PROTOCOL", protocol)


def test_a_certificate_that_cannot_be_read_is_named(secured: Secured, tmp_path: Path) -> None:
    settings = secured.settings(KAFKA_SSL_CA_FILE=str(tmp_path / "absent.pem"))
    with pytest.raises(SettingsError, match=r"KAFKA_SSL_CA_FILE: .*absent\.pem.*No such file"):
        client_arguments(settings, "test")
    (tmp_path / "empty.pem").write_text("nothing")
    empty = str(tmp_path / "empty.pem")
    settings = secured.settings(KAFKA_SSL_CERT_FILE=empty, KAFKA_SSL_KEY_FILE=empty)
    with pytest.raises(SettingsError, match=r"KAFKA_SSL_CERT_FILE.*empty\.pem"):
        client_arguments(settings, "test")


async def test_the_command_line_reports_a_failed_login_in_one_line(
    secured: Secured, spawn: Callable[..., Spawned]
) -> None:
    process = spawn("topics", "create", **secured.environ(KAFKA_SASL_PASSWORD="wrong-one"))
    assert await process.wait() == 1
    assert process.log().startswith("Error: KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD: ")
    assert process.log().count("\n") == 1
    assert "wrong-one" not in process.log()


async def test_a_broker_that_demands_certificates_gets_the_configured_one(tmp_path: Path) -> None:
    ours, brokers = Certificate.make(tmp_path, "client"), Certificate.make(tmp_path, "broker")
    security = Security("SSL", certificate_file=brokers.joined(), client_ca_file=ours.file)
    with MavenBroker(parent=scratch_directory(), security=security) as broker:
        secured = Secured(broker.servers, brokers)
        shown = {"KAFKA_SSL_CERT_FILE": str(ours.file), "KAFKA_SSL_KEY_FILE": str(ours.key_file)}
        await assert_goes_round(secured.settings(KAFKA_SECURITY_PROTOCOL="SSL", **shown))
        await assert_refused(secured.settings(KAFKA_SECURITY_PROTOCOL="SSL"), "KAFKA_SSL_CERT_FILE")


async def test_a_login_without_tls_is_taken() -> None:
    security = Security("SASL_PLAINTEXT", users={USER: PASSWORD})
    with MavenBroker(parent=scratch_directory(), security=security) as broker:
        environ = {
            "KAFKA_BOOTSTRAP_SERVERS": broker.servers,
            "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
            "KAFKA_SASL_MECHANISM": "SCRAM-SHA-256",
            "KAFKA_SASL_USERNAME": USER,
            "KAFKA_SASL_PASSWORD": PASSWORD,
            "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
        }
        await assert_goes_round(Settings.from_env(environ))
