"""Apache Kafka in a container, where a Docker engine runs; testcontainers speaks to it."""

from __future__ import annotations

import importlib.util
import os
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from orchestrator.dev.kafka_broker import Broker
from orchestrator.dev.operating_system import free_port, until
from orchestrator.errors import OrchestratorError

_SOCKET = Path("/var/run/docker.sock")
_IMAGE = "apache/kafka:4.3.1"
_STARTED = b"Kafka Server started"
_START_TIMEOUT_S = 120.0


def unavailable() -> str | None:
    """Why it cannot run here; None when it can."""
    if importlib.util.find_spec("testcontainers") is None:
        return "testcontainers is not installed"
    if not os.environ.get("DOCKER_HOST") and not _SOCKET.exists():
        return f"no Docker engine: neither DOCKER_HOST nor {_SOCKET}"
    docker = import_module("docker")
    try:
        docker.from_env().ping()
    except docker.errors.DockerException as error:
        return f"no Docker engine answers: {error}"
    return None


class DockerBroker(Broker):
    """Apache Kafka in a container of its own, which keeps its data until `close` removes it."""

    name = f"Apache Kafka in Docker ({_IMAGE})"
    idempotent = True
    transactions = True
    keeps_data = True
    makes_topics = False

    def __init__(self) -> None:
        if (reason := unavailable()) is not None:
            raise OrchestratorError(f"Apache Kafka cannot run in Docker here: {reason}")
        # Typed as unknown: the package is optional.
        self._container: Any = import_module("testcontainers.core.container").DockerContainer(_IMAGE)
        self._created = False
        port = free_port()
        self._container.with_bind_ports(port, port)
        self.servers = f"{self._container.get_docker_client().host()}:{port}"
        for name, value in _properties(port, self.servers).items():
            self._container.with_env(f"KAFKA_{name.upper().replace('.', '_')}", value)

    def start(self) -> Self:
        if not self._created:
            self._container.start()
            self._created = True
        wrapped = self._container.get_wrapped_container()
        wrapped.start()  # nothing, when it runs
        wrapped.reload()
        since = wrapped.attrs["State"]["StartedAt"]
        for _ in until(_START_TIMEOUT_S):
            # The log goes on from start to start.
            if wrapped.logs(since=_timestamp(since)).find(_STARTED) >= 0:
                return self
        raise OrchestratorError(f"{self.name} does not start; its log ends with:\n{wrapped.logs(tail=20).decode()}")

    def stop(self) -> None:
        if self._created:
            self._container.get_wrapped_container().stop()

    def kill(self) -> None:
        if self._created:
            self._container.get_wrapped_container().kill()

    def close(self) -> None:
        self._container.stop()
        self._created = False


def _timestamp(moment: str) -> float:
    """Docker tells times to the nanosecond, which datetime does not read."""
    from datetime import datetime

    return datetime.fromisoformat(moment[:19] + "+00:00").timestamp()


def _properties(port: int, servers: str) -> dict[str, str]:
    return {
        "node.id": "1",
        "process.roles": "broker,controller",
        "listeners": f"CLIENT://0.0.0.0:{port},CONTROLLER://127.0.0.1:9093",
        "advertised.listeners": f"CLIENT://{servers}",
        "listener.security.protocol.map": "CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "CLIENT",
        "controller.listener.names": "CONTROLLER",
        "controller.quorum.voters": "1@127.0.0.1:9093",
        "auto.create.topics.enable": "false",
        "offsets.topic.replication.factor": "1",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "group.initial.rebalance.delay.ms": "0",
        "group.min.session.timeout.ms": "1000",
    }
