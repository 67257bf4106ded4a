"""Apache Kafka itself, from jars that Maven fetches once; nothing is installed but Java and Maven.

One process is broker and controller (KRaft). Topics must be created, groups rebalance at once, and sessions may be
as short as a second, for tests of what happens when a consumer dies.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from orchestrator.dev.environment import user_directory
from orchestrator.dev.kafka_broker import BrokerProcess
from orchestrator.dev.operating_system import exclusive, free_port
from orchestrator.errors import OrchestratorError

_POM = Path(__file__).with_name("kafka-pom.xml")
_JAVA_NEEDED = 17
_FETCH_TIMEOUT_S = 900.0
_FORMAT_TIMEOUT_S = 60.0

# One collector thread: the cores are for what is developed or measured.
_JVM = ("-Xms128m", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError", "-Djava.awt.headless=true")
_LOGGING = (
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.log.kafka.server.KafkaRaftServer=info",  # says when it has started
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS",
)
_STARTED = b"Kafka Server started"

_PROPERTIES = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "auto.create.topics.enable": "false",
    "num.partitions": "4",
    "default.replication.factor": "1",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "4",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    # A broker that was killed is waited for before its successor may take its id; one voter needs no patience.
    "broker.session.timeout.ms": "2000",
    "broker.heartbeat.interval.ms": "300",
    "controller.quorum.election.timeout.ms": "200",
    "controller.quorum.election.backoff.max.ms": "100",
    "controller.quorum.fetch.timeout.ms": "300",
    "log.segment.delete.delay.ms": "1000",
}


@dataclass(frozen=True)
class Security:
    """How a broker wants to be spoken to."""

    protocol: Literal["SSL", "SASL_PLAINTEXT", "SASL_SSL"]
    users: Mapping[str, str] = field(default_factory=dict)
    """Name → password, for PLAIN and for both kinds of SCRAM."""
    certificate_file: Path | None = None
    """Its private key and certificate (PEM), for the protocols with SSL."""
    client_ca_file: Path | None = None
    """When given, clients must show a certificate that one of these (PEM) signed."""


def unavailable() -> str | None:
    """Why it cannot run here; None when it can."""
    java = _java()
    if java is None:
        return "java is not installed"
    version = _java_version(java)
    if version < _JAVA_NEEDED:
        return f"{java} is version {version}, and {_JAVA_NEEDED} is needed"
    try:
        jars = _jar_directory()
    except OrchestratorError as error:
        return str(error)
    if jars.is_dir():
        return None
    if shutil.which("mvn") is None:
        return "mvn (Maven) is not installed"
    existing = next(parent for parent in jars.parents if parent.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{jars} cannot be made; set XDG_CACHE_HOME to a directory that can be written"
    return None


class MavenBroker(BrokerProcess):
    """Apache Kafka on 127.0.0.1. With a `directory` its data is kept there; `parent` is where a temporary one goes.

    `properties` override and add to those of the server.
    """

    idempotent = True
    transactions = True
    keeps_data = True
    makes_topics = False

    def __init__(
        self,
        directory: Path | None = None,
        *,
        port: int = 0,
        parent: Path | None = None,
        security: Security | None = None,
        properties: Mapping[str, str] | None = None,
        heap_mb: int = 512,
    ) -> None:
        if (reason := unavailable()) is not None:
            raise OrchestratorError(f"Apache Kafka cannot run here: {reason}")
        super().__init__(directory, parent=parent)
        self.name = f"Apache Kafka {_kafka_version()}"
        self.port: int = port or free_port()
        self.servers = f"127.0.0.1:{self.port}"
        self._controller_port = free_port()
        self._internal_port = free_port()
        self._security = security
        self._properties = dict(properties or {})
        self._heap_mb = heap_mb

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    @property
    def _properties_file(self) -> Path:
        return self.directory / "server.properties"

    def _command(self) -> Sequence[str]:
        properties = {**_PROPERTIES, **self._listeners(), "log.dirs": str(self._data), **self._properties}
        self._properties_file.touch(mode=0o600)
        self._properties_file.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
        if not (self._data / "meta.properties").exists():
            self._format()
        return [*self._java_command(f"-Xmx{self._heap_mb}m"), "kafka.Kafka", str(self._properties_file)]

    def _java_command(self, *options: str) -> list[str]:
        java = _java()
        assert java is not None
        return [java, *_JVM, *options, *_LOGGING, "-cp", f"{fetched_jars()}{os.sep}*"]

    def _is_ready(self) -> bool:
        return _STARTED in self.log_file.read_bytes()

    def _listeners(self) -> dict[str, str]:
        """Clients have a listener; with security, the broker has one of its own to speak to itself."""
        addresses = {"CLIENT": self.port, "CONTROLLER": self._controller_port}
        protocols = {"CLIENT": "PLAINTEXT", "CONTROLLER": "PLAINTEXT"}
        made: dict[str, str] = {}
        if self._security is not None:
            addresses["INTERNAL"] = self._internal_port
            protocols |= {"CLIENT": self._security.protocol, "INTERNAL": "PLAINTEXT"}
            made |= _secured(self._security)
        listeners = {name: f"{name}://127.0.0.1:{port}" for name, port in addresses.items()}
        return made | {
            "controller.quorum.voters": f"1@127.0.0.1:{self._controller_port}",
            "listeners": ",".join(listeners.values()),
            "advertised.listeners": ",".join(value for name, value in listeners.items() if name != "CONTROLLER"),
            "listener.security.protocol.map": ",".join(f"{name}:{protocol}" for name, protocol in protocols.items()),
            "inter.broker.listener.name": "CLIENT" if self._security is None else "INTERNAL",
        }

    def _format(self) -> None:
        """Makes the empty data directory that a cluster begins with."""
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        # Joined, for an id may begin with a dash.
        options = ["format", f"--cluster-id={cluster}", "--config", str(self._properties_file)]
        for user, password in (self._security.users if self._security else {}).items():
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512"):
                options += ["--add-scram", f'{mechanism}=[name="{user}",password="{password}"]']
        done = subprocess.run(
            # The first compiler is enough for less than a second.
            [*self._java_command("-XX:TieredStopAtLevel=1"), "kafka.tools.StorageTool", *options],
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_FORMAT_TIMEOUT_S,
            text=True,
        )
        if done.returncode != 0:
            raise OrchestratorError(f"{self._data}: Kafka cannot make its storage here:\n{done.stdout.strip()}")


def _secured(security: Security) -> dict[str, str]:
    made: dict[str, str] = {}
    if security.protocol.startswith("SASL"):
        module = "org.apache.kafka.common.security"
        users = " ".join(f'user_{name}="{password}"' for name, password in security.users.items())
        made |= {
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
            "listener.name.client.plain.sasl.jaas.config": f"{module}.plain.PlainLoginModule required {users};",
            "listener.name.client.scram-sha-256.sasl.jaas.config": f"{module}.scram.ScramLoginModule required;",
            "listener.name.client.scram-sha-512.sasl.jaas.config": f"{module}.scram.ScramLoginModule required;",
        }
    if security.protocol.endswith("SSL"):
        made |= {
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(security.certificate_file),
        }
    if security.client_ca_file is not None:
        made |= {
            "ssl.client.auth": "required",
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(security.client_ca_file),
        }
    return made


def _java() -> str | None:
    home = os.environ.get("JAVA_HOME", "")
    if home and os.access(Path(home) / "bin" / "java", os.X_OK):
        return str(Path(home) / "bin" / "java")
    return shutil.which("java")


@cache
def _java_version(java: str) -> int:
    """Its major version; 0 when it does not say one."""
    said = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=_FORMAT_TIMEOUT_S)
    found = re.search(r'version "(?:1\.)?(\d+)', said.stderr)
    return int(found[1]) if found else 0


def _kafka_version() -> str:
    found = re.search(r"<artifactId>kafka_[\d.]+</artifactId>\s*<version>([\d.]+)</version>", _POM.read_text())
    assert found is not None
    return found[1]


def _jar_directory() -> Path:
    """Where this pom's jars are kept for all checkouts of the user; another pom's are elsewhere."""
    digest = hashlib.sha256(_POM.read_bytes()).hexdigest()[:12]
    return user_directory(os.environ, "XDG_CACHE_HOME", ".cache") / f"kafka-{_kafka_version()}-{digest}"


def fetched_jars() -> Path:
    """The directory with the jars, fetched by Maven unless they are there already."""
    directory = _jar_directory()
    if directory.is_dir():
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Maven's own store of what it has fetched is not for two at once.
        with exclusive(directory.parent, _FETCH_TIMEOUT_S) as lock:
            if not directory.is_dir():
                _fetch(directory, lock)
    except OSError as error:
        raise OrchestratorError(f"{directory}: Apache Kafka cannot be kept here: {error.strerror}") from error
    return directory


def _fetch(directory: Path, lock: int) -> None:
    """Beside the final place first, so that what was fetched in part is never used."""
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = ["mvn", "--batch-mode", "--quiet", "--no-transfer-progress", f"--file={_POM}"]
    command += ["dependency:copy-dependencies", f"-DoutputDirectory={partial}"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_FETCH_TIMEOUT_S,
            text=True,
            pass_fds=[lock],
        )
    except subprocess.TimeoutExpired:
        raise OrchestratorError(f"Maven did not fetch Apache Kafka within {_FETCH_TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        raise OrchestratorError(f"Maven cannot fetch Apache Kafka:\n{done.stdout.strip()[-2000:]}")
    partial.rename(directory)
