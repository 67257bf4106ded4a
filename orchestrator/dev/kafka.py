"""Kafka brokers for development, the demo, benchmarks and tests.

    with temporary_broker() as broker:
        AIOKafkaProducer(bootstrap_servers=broker.servers, enable_idempotence=broker.idempotent)

Apache Kafka runs in a container (kafka_docker.py) or from jars (kafka_maven.py); the broker of a wheel
(kafka_wheel.py) needs nothing but pip.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from orchestrator.dev import kafka_docker, kafka_maven, kafka_wheel
from orchestrator.dev.kafka_broker import Broker
from orchestrator.dev.kafka_docker import DockerBroker
from orchestrator.dev.kafka_maven import MavenBroker, Security
from orchestrator.dev.kafka_wheel import WheelBroker
from orchestrator.errors import OrchestratorError

__all__ = [
    "Broker",
    "DockerBroker",
    "Kind",
    "MavenBroker",
    "Security",
    "WheelBroker",
    "available_kind",
    "temporary_broker",
]

Kind = Literal["docker", "maven", "wheel"]

# In the order of preference: as close to production as this machine allows.
_UNAVAILABLE: dict[Kind, Callable[[], str | None]] = {
    "docker": kafka_docker.unavailable,
    "maven": kafka_maven.unavailable,
    "wheel": kafka_wheel.unavailable,
}


def available_kind() -> Kind:
    """The first kind that can run here. Raises OrchestratorError, with every reason, when none can."""
    reasons = []
    for kind, unavailable in _UNAVAILABLE.items():
        reason = unavailable()
        if reason is None:
            return kind
        reasons.append(f"{kind}: {reason}")
    raise OrchestratorError(
        f"no Kafka broker can run here: {'; '.join(reasons)}; or set KAFKA_BOOTSTRAP_SERVERS to one"
    )


def temporary_broker(kind: str | None = None, *, parent: Path | None = None) -> Broker:
    """A broker not yet started, whose data goes when it is closed; enter it or start it.

    `kind` is ``docker``, ``maven`` or ``wheel``; None: `available_kind`. `parent` is the directory that a temporary
    one for the data is made in. Raises OrchestratorError if no kind can run.
    """
    match kind or available_kind():
        case "docker":
            return DockerBroker()
        case "maven":
            return MavenBroker(parent=parent)
        case "wheel":
            return WheelBroker(parent=parent)
        case other:
            raise OrchestratorError(f"{other!r} is no kind of Kafka broker: expected {', '.join(_UNAVAILABLE)}")
